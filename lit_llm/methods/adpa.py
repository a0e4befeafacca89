"""ADPA: the advantage of an aligned teacher over itself before alignment, as a reward at every token (arXiv 2502.17927).

Shapes: B pairs or samples, T supervised tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Optional, get_args

import torch
from torch import Tensor

from lit_llm.data.batch import PreferenceBatch, TokenBatch
from lit_llm.losses.expected_advantage import AdvantageTerms, expected_advantage
from lit_llm.losses.fused_head import cross_entropy
from lit_llm.methods.answers import Generation
from lit_llm.methods.base import Optimization
from lit_llm.methods.on_policy import OnPolicy
from lit_llm.methods.preference import hidden_of_pairs
from lit_llm.methods.preference_distillation import PreferenceDistillation
from lit_llm.models.language_model import LanguageModel, ModelSpec

Answers = Literal["start", "policy", "chosen", "rejected"]
_SAMPLED = ("start", "policy")
_PUBLISHED = OnPolicy(student_fraction=1.0, temperature=0.0)


class ADPA(PreferenceDistillation):
    """Raise the advantage that an aligned teacher sees in the policy's next token, beside cross-entropy.

    Loss: sft_weight cross-entropy of the chosen answers - gamma E_policy[beta (log teacher - log reference_teacher)],
    the first a mean over the chosen answers' tokens of the whole optimizer step, the second over those of `answers`. The
    expectation is over the whole vocabulary, and advantages are not clamped as in the released loader. Dropout is off.

    Args:
        student: the policy that is trained, usually smaller than the teacher. ADPA+ starts it from DCKD.
        teacher: the frozen aligned model, such as one trained with DPO.
        reference_teacher: the frozen model that the teacher was before its alignment.
        answers: whose answers the advantage is expected on. `start`: those that the policy gives as it starts, as
            published (another frozen model is kept for it); `policy`: as it is now; `chosen` or `rejected`: of the data.
        gamma: weight of the advantage; 1.5 was best in the paper, above 3 it overshot.
        beta: of the teacher's DPO run, scales the advantage; the released code leaves it to gamma. The product counts.
        sft_weight: of cross-entropy on the chosen answers; 1 as published.
        on_policy: how answers are sampled, with `start` and `policy`; greedily by default, as released. Micro-batches
            that are not sampled (`student_fraction` below 1) take the chosen answers.
        optimization: optimizer and schedule.
        generation: answers generated during evaluation.
        loss_chunk: supervised tokens whose logits exist at a time. None chooses by the vocabularies.
    """

    compiles_loss = True
    frozen_on_both = False  # they read one answer

    def __init__(
        self,
        student: ModelSpec,
        teacher: ModelSpec,
        reference_teacher: ModelSpec,
        answers: Answers = "start",
        gamma: float = 1.5,
        beta: float = 1.0,
        sft_weight: float = 1.0,
        on_policy: OnPolicy = _PUBLISHED,
        optimization: Optimization = Optimization(),
        generation: Generation = Generation(),
        loss_chunk: Optional[int] = None,
    ) -> None:
        _check(student, answers, gamma, beta, sft_weight, on_policy)
        teachers = {"teacher": teacher, "reference_teacher": reference_teacher}
        sampling = on_policy if answers in _SAMPLED else None
        super().__init__(student, teachers, sampling, optimization, generation, loss_chunk)
        self.answers, self.gamma, self.beta, self.sft_weight = answers, gamma, beta, sft_weight

    @property
    def keeps_start(self) -> bool:
        return self.answers == "start"

    @property
    def sampler(self) -> LanguageModel:
        return self.frozen_start.model if self.keeps_start else super().sampler

    # -------------------------------------------------------------- training

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        tokens, step_tokens = self.learned_on(batch)
        chosen_TD, hidden_TD = self._hidden(batch, tokens)
        ce = cross_entropy(chosen_TD, self.student.head, batch.chosen.target_T, chunk_size=self.loss_chunk)
        reward = self.advantage(hidden_TD, tokens, self.gamma * self.step_weight(batch, step_tokens))
        loss = self.sft_weight * self.step_weight(batch, batch.step_tokens) * ce.loss + reward.loss

        self.log_loss(loss)
        self.log_step({"ce": ce.ce, "accuracy": ce.correct}, ce.tokens)
        self.log_step({"expected_advantage": reward.advantage_T.sum()}, tokens.num_supervised)
        self.log_step({"answer_tokens": tokens.num_supervised}, len(batch.examples))
        return loss

    def learned_on(self, batch: PreferenceBatch) -> tuple[TokenBatch, int]:
        if self.answers == "rejected":
            return batch.rejected, batch.step_rejected_tokens
        return super().learned_on(batch)

    def loss_terms(self, batch: PreferenceBatch) -> dict[str, Callable[[], Tensor]]:
        sides = {"rejected": (batch.rejected, batch.step_rejected_tokens)}
        tokens, count = sides.get(self.answers, (batch.chosen, batch.step_tokens))
        ce_weight = self.sft_weight * self.step_weight(batch, batch.step_tokens)
        weight = self.gamma * self.step_weight(batch, count)

        def ce() -> Tensor:
            hidden_TD = self.student.hidden(batch.chosen)
            target_T = batch.chosen.target_T
            return ce_weight * cross_entropy(hidden_TD, self.student.head, target_T, chunk_size=self.loss_chunk).loss

        def advantage() -> Tensor:
            return self.advantage(self.student.hidden(tokens), tokens, weight).loss

        return ({"ce": ce} if ce_weight else {}) | {"advantage": advantage}

    def advantage(self, policy_TD: Tensor, tokens: TokenBatch, weight: float) -> AdvantageTerms:
        """Minus the weighted sum of expected advantages over these tokens, and each one.

        Args:
            policy_TD: the policy's hidden states at the tokens.
            tokens: what the two teachers read.
            weight: of every token.
        """
        with torch.no_grad():
            teacher_TE, reference_TF = self.teacher.hidden(tokens), self.other.hidden(tokens)
        dtype = torch.promote_types(policy_TD.dtype, torch.float32)
        weight_T = torch.full((tokens.num_supervised,), weight, dtype=dtype, device=policy_TD.device)
        return expected_advantage(
            policy_TD,
            self.student.head,
            teacher_TE,
            self.teacher.head,
            reference_TF,
            self.other.head,
            weight_T,
            beta=self.beta,
            chunk_size=self.loss_chunk,
        )

    def _hidden(self, batch: PreferenceBatch, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
        """The policy's hidden states on the chosen answers, and on those that the advantage is expected on."""
        if tokens is batch.rejected:
            sizes = [side.num_supervised for side in (batch.chosen, batch.rejected)]
            return hidden_of_pairs(self.student, batch).split(sizes)
        chosen_TD = self.student.hidden(batch.chosen)
        return chosen_TD, chosen_TD if tokens is batch.chosen else self.student.hidden(tokens)

    # ------------------------------------------------------------ evaluation

    def evaluate(self, batch: PreferenceBatch, stage: str) -> None:
        """On chosen answers cross-entropy per token as `loss` and the advantage; how policy and teacher order the pairs."""
        tokens = batch.chosen
        hidden_TD = self.student.hidden(tokens)
        ce = cross_entropy(hidden_TD, self.student.head, tokens.target_T, chunk_size=self.loss_chunk)
        advantage_T = self.advantage(hidden_TD, tokens, 1.0).advantage_T
        sums = {"loss": ce.ce, "accuracy": ce.correct, "expected_advantage": advantage_T.sum()}
        self.log_means(stage, sums, tokens.num_supervised)
        policy_2B = self.answer_log_probs(self.student, batch) - batch.reference_B2.T
        self.log_order(stage, "", self.beta * policy_2B)
        self.log_order(stage, "dpo_", self.beta * self.contrast(batch, stage))

    def evaluate_sampled(self, tokens: TokenBatch) -> None:
        advantage_T = self.advantage(self.student.hidden(tokens), tokens, 1.0).advantage_T
        self.log("val/sampled_expected_advantage", advantage_T.mean())

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "answers": self.answers, "gamma": self.gamma * self.beta}


def _check(student: ModelSpec, answers: str, gamma: float, beta: float, sft_weight: float, on_policy: OnPolicy) -> None:
    if answers not in get_args(Answers):
        raise ValueError(f"model.answers is {answers!r}; known are {', '.join(get_args(Answers))}.")
    for name, value in {"gamma": gamma, "beta": beta}.items():
        if value <= 0:
            raise ValueError(f"model.{name} is {value}; it must be above 0. Usual: gamma 1.5, beta 1.")
    if sft_weight < 0:
        raise ValueError(f"model.sft_weight is {sft_weight}; it must be at least 0.")
    if answers not in _SAMPLED and on_policy != _PUBLISHED:
        raise ValueError(
            f"model.on_policy is set, but model.answers is {answers!r}, so nothing is sampled. Leave on_policy out, or set "
            "answers: start or policy."
        )
    if answers == "start" and student.source is None:
        raise ValueError(
            "model.answers is 'start', but the policy starts at random (student.config), which cannot be loaded a second "
            "time. Set model.answers: policy."
        )
