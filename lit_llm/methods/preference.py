"""What methods on preference pairs share: sums of log-probabilities, a reference that is asked once, what is logged.

Shapes: B pairs, 2B answers (first the chosen ones), T supervised tokens of all answers, D width.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from lit_llm.data.batch import PreferenceBatch
from lit_llm.data.preferences import Preferences
from lit_llm.losses.preference import PreferenceTerms, sum_by_sequence
from lit_llm.losses.token_log_probs import token_log_probs
from lit_llm.methods.answers import Generation
from lit_llm.methods.base import Method, Optimization
from lit_llm.methods.reference_log_probs import ReferenceLogProbs
from lit_llm.models.dropout import turn_off_dropout
from lit_llm.models.frozen import check_frozen
from lit_llm.models.language_model import Frozen, LanguageModel, ModelSpec


class PreferenceMethod(Method):
    """A policy that learns from pairs of answers.

    Dropout is off: what is compared with a reference must be the policy, not a sample of it.

    Attributes:
        needs_reference: whether losses or metrics compare with it.
        reference_parts: parts of the data for which it is asked.
        trains_on_both: whether training reads the rejected answers too.
        frozen_on_both: whether frozen models read both answers together as well.

    Args:
        student: the policy that is trained.
        reference: the frozen model it is compared with, through the log-probabilities of whole answers, which are asked
            once and kept in the cache; None: the policy as it starts.
        optimization: optimizer and schedule.
        generation: answers generated during evaluation.
        loss_chunk: supervised tokens whose logits exist at a time. None chooses by the vocabulary.
    """

    data_classes = (Preferences,)
    compiles_loss = False
    needs_reference = True
    reference_parts: tuple[str, ...] = ("train", "validation", "test")
    trains_on_both = True
    frozen_on_both = True

    def __init__(
        self,
        student: ModelSpec,
        reference: Optional[ModelSpec] = None,
        optimization: Optimization = Optimization(),
        generation: Generation = Generation(),
        loss_chunk: Optional[int] = None,
    ) -> None:
        super().__init__(student, optimization, generation, loss_chunk)
        if student.lora is not None and student.lora.dropout:
            raise ValueError(
                f"model.student.lora.dropout is {student.lora.dropout}, but {type(self).__name__} turns dropout off: "
                "log-probabilities are compared with those of a reference without it. Set it to 0."
            )
        check_frozen("reference", reference)
        self.reference_spec = reference
        self.reference = ReferenceLogProbs(self)

    def configure_model(self) -> None:
        super().configure_model()
        turn_off_dropout(self.student)

    def check_divided(self, weights: bool, frozen: bool, norms: bool) -> None:
        super().check_divided(weights, frozen, norms)
        frozen &= self.frozen_on_both
        held = [part.model for part in self.modules() if isinstance(part, Frozen)] if frozen else []
        divided = ([self.student] if weights else []) + [model for model in held if isinstance(model, LanguageModel)]
        if self.on_pairs and self.trains_on_both:
            _check_windows(divided, 2 * self.trainer.datamodule.encoding.max_length)

    def on_fit_start(self) -> None:
        if self.needs_reference:
            self.reference.fill(self.reference_parts)

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate" and self.needs_reference:
            self.reference.fill(("validation",))

    def on_test_start(self) -> None:
        if self.needs_reference:
            self.reference.fill(("test",))

    def answer_log_probs(self, model: LanguageModel, batch: PreferenceBatch) -> Tensor:
        """(2, B) log-probabilities of the chosen and the rejected answers, summed over their tokens."""
        return sums_of_answers(self.answer_token_log_probs(model, batch), batch)

    def answer_token_log_probs(self, model: LanguageModel, batch: PreferenceBatch) -> Tensor:
        """(T,) log-probabilities of the tokens of all answers, first those of the chosen ones."""
        target_T = torch.cat([side.target_T for side in (batch.chosen, batch.rejected)])
        return token_log_probs(hidden_of_pairs(model, batch), model.head, target_T, chunk_size=self.loss_chunk)

    def log_preference(self, prefix: str, terms: PreferenceTerms, sums_2B: Tensor, batch: PreferenceBatch) -> None:
        """Log what is known of a batch as means over pairs (log-probabilities: over tokens).

        Args:
            prefix: "train", "val" or "test".
            terms: losses and rewards.
            sums_2B: log-probabilities of the answers under the policy.
            batch: the pairs.
        """
        pairs = len(batch.examples)
        margin_N = terms.chosen_reward_N - terms.rejected_reward_N
        over_pairs = {
            "loss": terms.loss_N.detach().sum(),
            "reward_margin": margin_N.sum(),
            "reward_accuracy": (margin_N > 0).sum(),
            "chosen_reward": terms.chosen_reward_N.sum(),
            "rejected_reward": terms.rejected_reward_N.sum(),
        }
        sides = {"chosen_log_prob": (sums_2B[0], batch.chosen), "rejected_log_prob": (sums_2B[1], batch.rejected)}
        if prefix == "train":
            self.log_step(over_pairs, pairs)
            for name, (sums_B, tokens) in sides.items():
                self.log_step({name: sums_B.sum()}, tokens.num_supervised)
        else:
            self.log_means(prefix, over_pairs, pairs)
            for name, (sums_B, tokens) in sides.items():
                self.log_means(prefix, {name: sums_B.sum()}, tokens.num_supervised)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["lit_llm"]["reference_log_probs"] = self.reference.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.reference.load_state(checkpoint["lit_llm"]["reference_log_probs"])

    def identity(self) -> dict[str, Any]:
        reference = self.reference_spec
        return {**super().identity(), "reference": reference and str(reference.source or reference.config)}


def hidden_of_pairs(model: LanguageModel, batch: PreferenceBatch) -> Tensor:
    """(T, D) hidden states of all answers in the order of `sequences`; prompts are run once where the model allows it."""
    sides = (batch.chosen, batch.rejected)
    if batch.both is None or not model.branches(batch.both):
        return torch.cat([model.hidden(side) for side in sides])
    hidden_TD = model.hidden(batch.both)
    if not batch.is_swapped:
        return hidden_TD
    rejected, chosen = hidden_TD.split([side.num_supervised for side in reversed(sides)])
    return torch.cat([chosen, rejected])


def sequences(batch: PreferenceBatch) -> Tensor:
    """(T,) the answer that each supervised token belongs to: chosen answers 0..B-1, rejected ones B..2B-1."""
    return torch.cat([batch.chosen.sequence_T, batch.rejected.sequence_T + len(batch.examples)])


def sums_of_answers(value_T: Tensor, batch: PreferenceBatch) -> Tensor:
    """(2, B) sums over the tokens of each answer, of values in the order of `sequences`."""
    return sum_by_sequence(value_T, sequences(batch), 2 * len(batch.examples)).view(2, -1)


def _check_windows(models: list[LanguageModel], longest: int) -> None:
    """See that models whose weights are divided run once for each batch of pairs, in every process."""
    for model in models:
        window = getattr(model.transformer.config.get_text_config(), "sliding_window", None)
        if window and window < longest:
            raise ValueError(
                f"A model of the run sees {window} tokens at a time (sliding_window), and a prompt with both answers may have "
                f"{longest} (twice data.max_length): then one process would run it once and another twice, but trainer.strategy "
                f"divides its weights, for which all must do the same. Set data.max_length to {window // 2} or less, or train "
                f"with configs/trainer/deepspeed_z2.yaml, without divide_frozen."
            )
