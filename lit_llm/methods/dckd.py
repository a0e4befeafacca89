"""DCKD: an aligned teacher's distribution, distilled on both answers of a pair (arXiv 2502.17927).

Shapes: B pairs, T supervised tokens of all answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from lit_llm.data.batch import PreferenceBatch
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.fused_head import HeadTerms, distillation
from lit_llm.methods.answers import Generation
from lit_llm.methods.base import Optimization
from lit_llm.methods.preference import hidden_of_pairs
from lit_llm.methods.preference_distillation import PreferenceDistillation
from lit_llm.models.language_model import ModelSpec

_FORWARD_KL = Divergence(name="forward_kl", temperature=1.0)


class DCKD(PreferenceDistillation):
    """Distil a teacher that was aligned with DPO, on the chosen and on the rejected answers.

    Loss: cross-entropy of the chosen answers + chosen_weight KL(teacher || policy) on them + rejected_weight the same on
    the rejected ones, each a mean over the tokens of its side in the whole optimizer step. There is no preference term:
    that the teacher is aligned is all that the policy sees of it. Dropout is off.

    Args:
        student: the policy that is trained, usually smaller than the teacher.
        teacher: the frozen aligned model; another size is fine, another tokenizer is not.
        chosen_weight: of the divergence on chosen answers; 0.1 in the released recipe.
        rejected_weight: of that on rejected answers, likewise.
        sft_weight: of cross-entropy on the chosen answers; 1 as published.
        optimization: optimizer and schedule.
        generation: answers generated during evaluation.
        loss_chunk: supervised tokens whose logits exist at a time. None chooses by the vocabularies.
    """

    compiles_loss = True

    def __init__(
        self,
        student: ModelSpec,
        teacher: ModelSpec,
        chosen_weight: float = 0.1,
        rejected_weight: float = 0.1,
        sft_weight: float = 1.0,
        optimization: Optimization = Optimization(),
        generation: Generation = Generation(),
        loss_chunk: Optional[int] = None,
    ) -> None:
        super().__init__(student, {"teacher": teacher}, None, optimization, generation, loss_chunk)
        weights = {"sft_weight": sft_weight, "chosen_weight": chosen_weight, "rejected_weight": rejected_weight}
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"model.{name} is {weight}; it must be at least 0.")
        if chosen_weight == rejected_weight == 0:
            raise ValueError(
                "model.chosen_weight and model.rejected_weight are both 0, so the teacher has no part in the loss. Set one "
                "above 0, or use SFT on the chosen answers."
            )
        self.sft_weight, self.chosen_weight, self.rejected_weight = sft_weight, chosen_weight, rejected_weight

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        chosen, rejected = self.compared(batch, **self._weights(batch))
        loss = chosen.loss + rejected.loss

        self.log_loss(loss)
        sums = {"ce": chosen.ce, "accuracy": chosen.correct, "kl_chosen": chosen.kd, "agreement": chosen.agree}
        self.log_step(sums, chosen.tokens)
        self.log_step({"kl_rejected": rejected.kd}, rejected.tokens)
        return loss

    def loss_terms(self, batch: PreferenceBatch) -> dict[str, Callable[[], Tensor]]:
        def term(name: str, weight: float) -> Tensor:
            return sum(side.loss for side in self.compared(batch, **{name: weight}))

        weights = {name: weight for name, weight in self._weights(batch).items() if weight > 0}
        return {name: lambda name=name, weight=weight: term(name, weight) for name, weight in weights.items()}

    def compared(
        self, batch: PreferenceBatch, *, ce: float = 0.0, kl_chosen: float = 0.0, kl_rejected: float = 0.0
    ) -> tuple[HeadTerms, HeadTerms]:
        """The policy beside the teacher on the chosen and on the rejected answers.

        Args:
            batch: the pairs.
            ce: weight of the summed cross-entropy of the chosen answers.
            kl_chosen: of the summed divergence on them.
            kl_rejected: of that on the rejected ones.
        """
        with torch.no_grad():
            teacher_TE = hidden_of_pairs(self.teacher, batch)
        sides = (batch.chosen, batch.rejected)
        hidden = (
            h.split([side.num_supervised for side in sides]) for h in (hidden_of_pairs(self.student, batch), teacher_TE)
        )
        weights = ({"ce_weight": ce, "kd_weight": kl_chosen}, {"ce_weight": 0.0, "kd_weight": kl_rejected})
        return tuple(
            distillation(
                policy,
                self.student.head,
                side.target_T,
                teacher,
                self.teacher.head,
                _FORWARD_KL,
                chunk_size=self.loss_chunk,
                **of_side,
            )
            for side, policy, teacher, of_side in zip(sides, *hidden, weights, strict=True)
        )

    def evaluate(self, batch: PreferenceBatch, stage: str) -> None:
        """Cross-entropy per token of the chosen answers as `loss`, the divergences, and how the policy orders the pairs."""
        chosen, rejected = self.compared(batch)
        sums = {"loss": chosen.ce, "accuracy": chosen.correct, "kl_chosen": chosen.kd, "agreement": chosen.agree}
        self.log_means(stage, sums, chosen.tokens)
        self.log_means(stage, {"kl_rejected": rejected.kd}, rejected.tokens)
        self.log_order(stage, "", self.answer_log_probs(self.student, batch) - batch.reference_B2.T)

    def _weights(self, batch: PreferenceBatch) -> dict[str, float]:
        chosen, rejected = (self.step_weight(batch, n) for n in (batch.step_tokens, batch.step_rejected_tokens))
        return {
            "ce": self.sft_weight * chosen,
            "kl_chosen": self.chosen_weight * chosen,
            "kl_rejected": self.rejected_weight * rejected,
        }

    def identity(self) -> dict[str, Any]:
        weights = (self.sft_weight, self.chosen_weight, self.rejected_weight)
        return {**super().identity(), "weights": list(weights)}
