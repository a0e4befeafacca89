"""KTO: answers that are good or bad by themselves, not in pairs (arXiv 2402.01306).

Shapes: B answers, T supervised tokens, K answers to other prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Optional

import torch
from torch import Tensor

from lit_llm.data.batch import LabelledBatch, PreferenceBatch, TokenBatch
from lit_llm.data.labelled_answers import LabelledAnswers
from lit_llm.losses.preference import AnswerTerms, kto, sum_by_sequence
from lit_llm.losses.token_log_probs import token_log_probs
from lit_llm.methods.answers import Generation
from lit_llm.methods.base import Optimization
from lit_llm.methods.preference import PreferenceMethod
from lit_llm.models.language_model import ModelSpec


class KTO(PreferenceMethod):
    """Make good answers more likely and bad ones less, measured from how far the policy went as a whole.

    Loss of a good answer: desirable_weight sigmoid(beta (z_0 - d)), of a bad one undesirable_weight sigmoid(beta (d -
    z_0)), with d its log-ratio to the reference; the mean over all answers of the optimizer step. z_0 is the mean of d
    over the step's prompts with answers to other prompts, all accumulation steps and ranks together, at least 0 and
    without a gradient. It is found by one more forward pass before the step, so that another split of a batch changes
    nothing. Dropout is off.

    Args:
        student: the policy that is trained.
        beta: scales log-ratios: how far the policy may go from the reference.
        desirable_weight: of good answers. The paper wants desirable_weight times the number of good answers to be 1 to
            4/3 of undesirable_weight times that of the bad ones.
        undesirable_weight: of bad answers.
        reference: the frozen model, asked once and kept in the cache; None: the policy as it starts.
        optimization: optimizer and schedule.
        generation: answers generated during evaluation.
        loss_chunk: supervised tokens whose logits exist at a time. None chooses by the vocabulary.
    """

    data_classes = (LabelledAnswers,)

    def __init__(
        self,
        student: ModelSpec,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reference: Optional[ModelSpec] = None,
        optimization: Optimization = Optimization(),
        generation: Generation = Generation(),
        loss_chunk: Optional[int] = None,
    ) -> None:
        super().__init__(student, reference, optimization, generation, loss_chunk)
        settings = {"beta": beta, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        for name, value in settings.items():
            if value <= 0:
                raise ValueError(f"model.{name} is {value}; it must be above 0.")
        self.settings = settings
        self._baseline: tuple[int, Tensor] | None = None  # the optimizer step that it is of
        self._evaluation_baseline: Tensor | None = None

    # -------------------------------------------------------------- training

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        baseline = self._baseline_of_step(batch)
        terms = self.score(batch, baseline)
        loss = terms.loss_N.sum() * self.step_weight(batch, batch.step_pairs)

        self.log_step({"loss": terms.loss_N.sum()}, len(batch.examples))
        self.log("train/baseline", baseline)
        for name, (reward, count) in self._rewards(terms, batch).items():
            if count:
                self.log_step({name: reward}, count)
        return loss

    def loss_terms(self, batch: LabelledBatch) -> dict[str, Callable[[], Tensor]]:
        weight = self.step_weight(batch, batch.step_pairs)
        return {"preference": lambda: self.score(batch, self._baseline_of_step(batch)).loss_N.sum() * weight}

    def score(self, batch: LabelledBatch, baseline: Tensor) -> AnswerTerms:
        """Losses and rewards of the answers of a batch."""
        policy_B = self._log_probs(batch.chosen, len(batch.examples))
        return kto(policy_B, batch.reference_B2[:, 0], batch.good_B, baseline, **self.settings)

    def _baseline_of_step(self, batch: LabelledBatch) -> Tensor:
        """z_0 of the optimizer step, found at its first micro-batch."""
        if self._baseline is None or self._baseline[0] != self.global_step:
            rest = self.trainer.datamodule.rest_of_step(batch.examples)
            self._baseline = (self.global_step, self._mean_log_ratio(rest))
        return self._baseline[1]

    @torch.no_grad()
    def _mean_log_ratio(self, batches: Iterable[PreferenceBatch]) -> Tensor:
        """Mean log-ratio of answers to other prompts, over the batches of all ranks, at least 0."""
        total = torch.zeros(
            2, device=self.device, dtype=torch.promote_types(self.student.head.weight_VD.dtype, torch.float32)
        )
        with self.trainer.precision_plugin.forward_context():
            for batch in batches:
                batch = batch.to(self.device)
                ratio_K = self._log_probs(batch.rejected, len(batch.examples)) - batch.reference_B2[:, 1]
                total += torch.stack([ratio_K.sum(), torch.ones_like(ratio_K).sum()])
        total = self.trainer.strategy.reduce(total, reduce_op="sum")
        return (total[0] / total[1].clamp(min=1)).clamp(min=0)

    def _log_probs(self, tokens: TokenBatch, answers: int) -> Tensor:
        """(B,) the policy's log-probabilities of whole answers."""
        hidden_TD = self.student.hidden(tokens)
        value_T = token_log_probs(hidden_TD, self.student.head, tokens.target_T, chunk_size=self.loss_chunk)
        return sum_by_sequence(value_T, tokens.sequence_T, answers)

    @staticmethod
    def _rewards(terms: AnswerTerms, batch: LabelledBatch) -> dict[str, tuple[Tensor, int]]:
        """Summed rewards of good and of bad answers, with how many there are."""
        good_N, bad = batch.good_B, len(batch.examples) - batch.num_good
        return {
            "good_reward": ((terms.reward_N * good_N).sum(), batch.num_good),
            "bad_reward": ((terms.reward_N * ~good_N).sum(), bad),
        }

    # ------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self) -> None:
        self._evaluation_baseline = self._baseline_of_part("validation")

    def on_test_epoch_start(self) -> None:
        self._evaluation_baseline = self._baseline_of_part("test")

    def _baseline_of_part(self, part: str) -> Tensor:
        return self._mean_log_ratio(self.trainer.datamodule.evaluation_loader(part))

    def evaluate(self, batch: LabelledBatch, stage: str) -> None:
        """Loss and rewards, and how many answers are on their label's side of the baseline of the whole part."""
        baseline, answers = self._evaluation_baseline, len(batch.examples)
        terms = self.score(batch, baseline)
        right_N = (terms.reward_N > self.settings["beta"] * baseline) == batch.good_B
        self.log_means(stage, {"loss": terms.loss_N.sum(), "label_accuracy": right_N.sum()}, answers)
        self.log_means(stage, {"baseline": baseline * answers}, answers)
        for name, (reward, count) in self._rewards(terms, batch).items():
            # a batch without any weighs nothing, but every rank must log the same names
            self.log(
                f"{stage}/{name}",
                reward / max(count, 1),
                batch_size=count,
                on_step=False,
                on_epoch=True,
                sync_dist=True,
            )

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), **self.settings}
