"""Direct preference optimization and its relatives: IPO, SimPO, KTO on pairs, token-level DPO.

Shapes: B pairs, N = B, T supervised tokens of all answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Optional

import torch
from torch import Tensor

from lit_llm.data.batch import PreferenceBatch
from lit_llm.losses import preference
from lit_llm.losses.preference import PreferenceTerms, sum_by_sequence
from lit_llm.losses.token_log_probs import token_log_probs_with_kl
from lit_llm.methods.answers import Generation
from lit_llm.methods.base import Optimization
from lit_llm.methods.preference import PreferenceMethod, hidden_of_pairs, sequences
from lit_llm.models.language_model import Frozen, ModelSpec
from lit_llm.models.shared_base import AdaptedBase, frozen_beside

PreferenceLoss = Literal["sigmoid", "ipo", "simpo", "kto", "tdpo1", "tdpo2"]
_SMOOTHED = ("sigmoid", "simpo", "tdpo1", "tdpo2")


class Scored(NamedTuple):
    """A batch of pairs under the policy: losses and rewards, (2, B) log-probabilities, (2, B) summed KL for TDPO."""

    terms: PreferenceTerms
    sums_2B: Tensor
    kl_2B: Tensor | None


class DPO(PreferenceMethod):
    """Make preferred answers more likely than the others, relative to a reference (arXiv 2305.18290).

    The loss is the mean over the pairs of the optimizer step, all accumulation steps and ranks together. `kto` takes its
    baselines from the pairs of a micro-batch, so there another split gives another loss. `KTO` is for answers without a
    partner, and has no such limit.

    Args:
        student: the policy that is trained.
        loss: sigmoid (DPO), ipo (arXiv 2310.12036), simpo (arXiv 2405.14734, needs no reference), kto on pairs (arXiv
            2402.01306), tdpo1 or tdpo2 (arXiv 2404.11999, which run the reference along).
        beta: scales log-ratios: how far the policy may go from the reference. Usual: 0.1, for simpo 2.5.
        reverse: prefer the rejected answers: the reverse-DPO model of AlignDistil (arXiv 2503.02832).
        label_smoothing: probability that a pair is the wrong way round, below 0.5 (sigmoid, simpo, tdpo).
        ipo_mean: ipo compares log-ratios per token, not per answer.
        simpo_margin: gamma / beta of SimPO, in log-probability per token.
        tdpo_alpha: weight of the difference of KLs in tdpo2.
        sft_weight: weight of cross-entropy on the preferred answers, per token of the step, added to the loss.
        reference: the frozen model, asked once and kept in the cache; None: the policy as it starts.
        optimization: optimizer and schedule.
        generation: answers generated during evaluation.
        loss_chunk: supervised tokens whose logits exist at a time. None chooses by the vocabulary.
    """

    def __init__(
        self,
        student: ModelSpec,
        loss: PreferenceLoss = "sigmoid",
        beta: float = 0.1,
        reverse: bool = False,
        label_smoothing: float = 0.0,
        ipo_mean: bool = False,
        simpo_margin: float = 0.5,
        tdpo_alpha: float = 0.5,
        sft_weight: float = 0.0,
        reference: Optional[ModelSpec] = None,
        optimization: Optimization = Optimization(),
        generation: Generation = Generation(),
        loss_chunk: Optional[int] = None,
    ) -> None:
        super().__init__(student, reference, optimization, generation, loss_chunk)
        _check(loss, beta, label_smoothing, sft_weight)
        unused = {
            "label_smoothing": label_smoothing != 0 and loss not in _SMOOTHED,
            "ipo_mean": ipo_mean and loss != "ipo",
            "simpo_margin": simpo_margin != 0.5 and loss != "simpo",
            "tdpo_alpha": tdpo_alpha != 0.5 and loss != "tdpo2",
            "reference": reference is not None and loss == "simpo",
        }
        for name, is_unused in unused.items():
            if is_unused:
                raise ValueError(
                    f"model.{name} is set, but model.loss is {loss!r}, which does not use it. Leave it out."
                )
        self.loss, self.beta, self.reverse = loss, beta, reverse
        self.label_smoothing, self.ipo_mean = label_smoothing, ipo_mean
        self.simpo_margin, self.tdpo_alpha, self.sft_weight = simpo_margin, tdpo_alpha, sft_weight
        self.frozen_reference: Frozen | None = None

    @property
    def needs_reference(self) -> bool:
        return self.loss != "simpo" and not self.runs_reference

    @property
    def compiles_loss(self) -> bool:
        return self.runs_reference

    @property
    def runs_reference(self) -> bool:
        """Whether the reference is run beside the policy, for its whole distribution."""
        return self.loss.startswith("tdpo")

    def configure_model(self) -> None:
        super().configure_model()
        if self.runs_reference and self.frozen_reference is None:
            self.frozen_reference = self._frozen_reference()

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        batch = batch.swapped() if self.reverse else batch
        scored = self.score(batch)
        loss = scored.terms.loss_N.sum() * self.step_weight(batch, batch.step_pairs)
        if self.sft_weight:
            loss = loss - self.sft_weight * scored.sums_2B[0].sum() * self.step_weight(batch, batch.step_tokens)

        self.log_preference("train", scored.terms, scored.sums_2B.detach(), batch)
        return loss

    def loss_terms(self, batch: PreferenceBatch) -> dict[str, Callable[[], Tensor]]:
        batch = batch.swapped() if self.reverse else batch
        pair_weight, token_weight = (self.step_weight(batch, n) for n in (batch.step_pairs, batch.step_tokens))
        terms = {"preference": lambda: self.score(batch).terms.loss_N.sum() * pair_weight}
        if self.sft_weight:
            terms["ce"] = lambda: -self.sft_weight * self.score(batch).sums_2B[0].sum() * token_weight
        return terms

    def evaluate(self, batch: PreferenceBatch, stage: str) -> None:
        """Rewards of pairs as the data has them, so that reverse DPO is seen to fall below one half."""
        scored = self.score(batch)
        self.log_preference(stage, scored.terms, scored.sums_2B, batch)
        if scored.kl_2B is not None:
            tokens = batch.chosen.num_supervised + batch.rejected.num_supervised
            self.log_means(stage, {"kl": scored.kl_2B.sum()}, tokens)

    def score(self, batch: PreferenceBatch) -> Scored:
        """Losses and rewards of the pairs of a batch."""
        if self.runs_reference:
            return self._token_level(batch)
        sums_2B = self.answer_log_probs(self.student, batch)
        tokens_2B = _tokens(batch)
        if self.loss == "simpo":
            means_2B = sums_2B / tokens_2B.clamp(min=1)
            smoothing = {"gamma_beta_ratio": self.simpo_margin, "label_smoothing": self.label_smoothing}
            return Scored(preference.simpo(*means_2B, beta=self.beta, **smoothing), sums_2B, None)
        against = (*sums_2B, *batch.reference_B2.T)
        if self.loss == "ipo":
            lengths = {"chosen_tokens_N": tokens_2B[0], "rejected_tokens_N": tokens_2B[1]} if self.ipo_mean else {}
            return Scored(preference.ipo(*against, beta=self.beta, **lengths), sums_2B, None)
        if self.loss == "kto":
            return Scored(preference.paired_kto(*against, beta=self.beta), sums_2B, None)
        terms = preference.dpo(*against, beta=self.beta, label_smoothing=self.label_smoothing)
        return Scored(terms, sums_2B, None)

    def _token_level(self, batch: PreferenceBatch) -> Scored:
        sides, model = (batch.chosen, batch.rejected), self.frozen_reference.model
        with torch.no_grad():
            reference_TD = hidden_of_pairs(model, batch)
        found = token_log_probs_with_kl(
            hidden_of_pairs(self.student, batch),
            self.student.head,
            torch.cat([side.target_T for side in sides]),
            reference_TD,
            model.head,
            chunk_size=self.loss_chunk,
        )
        answers, pairs = sequences(batch), len(batch.examples)
        sums_2B, kl_2B, reference_2B = (sum_by_sequence(v, answers, 2 * pairs).view(2, -1) for v in found)
        settings = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        if self.loss == "tdpo1":
            terms = preference.tdpo1(*sums_2B, *reference_2B, *kl_2B, **settings)
        else:
            terms = preference.tdpo2(*sums_2B, *reference_2B, *kl_2B, alpha=self.tdpo_alpha, **settings)
        return Scored(terms, sums_2B, kl_2B.detach())

    def _frozen_reference(self) -> Frozen:
        """The base without its adapters where the policy has them, else a copy of where it started."""
        if self.reference_spec is not None:
            return frozen_beside(self.student, self.student_spec, self.reference_spec, "reference")
        if self.student.base is not None:
            return Frozen(AdaptedBase(self.student))
        spec = self.student_spec
        if spec.source is None:
            raise ValueError(
                f"model.loss {self.loss!r} runs the reference beside the policy, but the policy starts at random "
                "(student.config), which cannot be loaded a second time. Set model.reference."
            )
        return Frozen(spec.load())

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "loss": self.loss, "reverse": self.reverse}


def _tokens(batch: PreferenceBatch) -> Tensor:
    """(2, B) supervised tokens of each answer."""
    return torch.bincount(sequences(batch), minlength=2 * len(batch.examples)).view(2, -1)


def _check(loss: str, beta: float, label_smoothing: float, sft_weight: float) -> None:
    if beta <= 0:
        raise ValueError(f"model.beta is {beta}; it must be above 0. Usual values: 0.1, for loss simpo 2.5.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"model.label_smoothing is {label_smoothing}; it is a probability from 0 to below 0.5.")
    if sft_weight < 0:
        raise ValueError(f"model.sft_weight is {sft_weight}; it must be at least 0.")
