"""AlignDistil: preference alignment as token-level distillation from a DPO and a reverse-DPO model (arXiv 2503.02832).

Shapes: B pairs or samples, T supervised tokens, P those of all answers of pairs (chosen, then rejected), D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Optional

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_llm.data.batch import PreferenceBatch, TokenBatch
from lit_llm.data.teacher_store import TeacherStore
from lit_llm.data.tokenized import EvaluationPrompt
from lit_llm.losses.adaptive_policy import AdaptivePolicy, AdaptivePolicyTerms, adaptive_policy, sample_weights
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.fused_head import distillation
from lit_llm.losses.preference import mean_by_sequence, sum_by_sequence
from lit_llm.losses.token_log_probs import token_log_probs
from lit_llm.methods.answers import Generation
from lit_llm.methods.base import Optimization
from lit_llm.methods.frozen_pair import FrozenPair
from lit_llm.methods.on_policy import OnPolicy
from lit_llm.methods.preference import hidden_of_pairs, sums_of_answers
from lit_llm.methods.preference_distillation import PreferenceDistillation
from lit_llm.methods.stored_pair import StoredFrozen
from lit_llm.methods.token_view import TokenView
from lit_llm.models.language_model import Frozen, ModelSpec
from lit_llm.models.sharding import gathered
from lit_llm.models.teacher_head import TeacherHead

_LARGE = 50.0  # beta_t k_t of one token, in units of the mean, that is told
_PER_TOKEN = ("alpha", "tvd", "beta", "expected_reward", "kl_dpo", "kl_other", "entropy", "teacher_entropy")


class AlignDistil(PreferenceDistillation):
    """Distil a policy from the distribution that lies beyond a DPO model, away from a reverse-DPO model.

    Loss of a token: beta_t KL(policy || teacher) over the whole vocabulary, with teacher and beta_t as in `combination`
    (sections 3 and 4 of the paper). Tokens are those of the chosen answers, or of answers that the policy samples. Dropout
    is off. The paper's three models: the policy, which starts where DPO started, and two frozen ones.

    Args:
        student: the policy that is trained.
        dpo: a model trained with DPO on the pairs.
        other: a model trained with DPO on the swapped pairs (`reverse: true`); where `combination.rule` interpolates,
            the model that DPO started from.
        combination: of the two frozen models, and the weight of each token.
        form: `combined` compares with the normalised teacher; `decomposed` has the same gradient, another value, and
            does not form the amplified logits.
        reduction: `sample_mean`: mean over answers of the mean over tokens, as published; `sum`: mean over answers of
            the sum; `token_mean`: mean over all tokens.
        on_policy: learn on answers that the policy samples. None: on the chosen answers. In the paper
            `student_fraction: 1`.
        watch_start: keep the starting model beside the others and log the KL to it during evaluation.
        teacher_store: keep the hidden states of the two frozen models on disk, so that they run over the data once; not
            with `on_policy`. None: they run live.
        optimization: optimizer and schedule.
        generation: answers generated during evaluation.
        loss_chunk: supervised tokens whose logits exist at a time. None chooses by the vocabulary.
    """

    trains_on_both = False
    one_base = True
    needs_teacher_embedding = False
    teacher_words = "DPO model"

    def __init__(
        self,
        student: ModelSpec,
        dpo: ModelSpec,
        other: ModelSpec,
        combination: AdaptivePolicy = AdaptivePolicy(),
        form: Literal["combined", "decomposed"] = "combined",
        reduction: Literal["sample_mean", "sum", "token_mean"] = "sample_mean",
        on_policy: Optional[OnPolicy] = None,
        watch_start: bool = False,
        teacher_store: Optional[TeacherStore] = None,
        optimization: Optimization = Optimization(),
        generation: Generation = Generation(),
        loss_chunk: Optional[int] = None,
    ) -> None:
        super().__init__(student, {"dpo": dpo, "other": other}, on_policy, optimization, generation, loss_chunk)
        _check_store(teacher_store, on_policy)
        self.dpo_spec, self.other_spec, self.combination = dpo, other, combination
        self.form, self.reduction, self.watch_start = form, reduction, watch_start
        self.view = self._new_view()
        self.frozen_pair = FrozenPair(self)
        holders = {"dpo": "frozen_teacher", "other": "frozen_other"} if teacher_store is not None else {}
        self.stores = {name: StoredFrozen(teacher_store, self, name, holder) for name, holder in holders.items()}

    @property
    def keeps_start(self) -> bool:
        return self.watch_start

    def check_divided(self, weights: bool, frozen: bool, norms: bool) -> None:
        super().check_divided(weights, frozen, norms)
        for store in self.stores.values() if frozen else ():
            store.settings.refuse_divided()

    # ---------------------------------------------------------------- models

    def frozen_model(self, name: str) -> Frozen:
        """One of the two, only its head where a store has the rest."""
        return Frozen(self.stores[name].open()) if name in self.stores else super().frozen_model(name)

    def on_fit_start(self) -> None:
        with gathered(self):  # frozen models may live in the policy
            for store in self.stores.values():
                store.fill()
        super().on_fit_start()

    def teacher_result(self, stage: str, prompts: list[EvaluationPrompt]) -> dict[str, Any] | None:
        if isinstance(self.teacher, TeacherHead):
            return self.stores["dpo"].answers(prompts)
        return super().teacher_result(stage, prompts)

    # -------------------------------------------------------------- training

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        tokens, step_tokens = self.learned_on(batch)
        frozen = self.frozen_pair.of_chosen(batch) if tokens is batch.chosen else None
        samples = len(batch.examples)
        weights = sample_weights(tokens.sequence_T, samples, self.reduction)
        count = step_tokens if self.reduction == "token_mean" else batch.step_pairs
        terms = self.compared(tokens, weights.weight_T * self.step_weight(batch, count), frozen)

        self.log_loss(terms.loss)
        self._log_tokens(terms, tokens, samples)
        return terms.loss

    def loss_terms(self, batch: PreferenceBatch) -> dict[str, Callable[[], Tensor]]:
        weights = sample_weights(batch.chosen.sequence_T, len(batch.examples), self.reduction)
        count = batch.step_tokens if self.reduction == "token_mean" else batch.step_pairs
        weight_T = weights.weight_T * self.step_weight(batch, count)
        return {"kl": lambda: self.compared(batch.chosen, weight_T, self.frozen_pair.of_chosen(batch)).loss}

    def compared(
        self, tokens: TokenBatch, weight_T: Tensor, frozen: tuple[Tensor, Tensor] | None = None
    ) -> AdaptivePolicyTerms:
        """The policy beside the two frozen models on these tokens.

        Args:
            tokens: T supervised ones.
            weight_T: of each.
            frozen: (T, D) hidden states of the DPO model and of the other one; None: they are run.
        """
        frozen = self.frozen_pair.hidden(tokens) if frozen is None else frozen
        return self._terms(self.student.hidden(tokens), frozen, weight_T)

    def _terms(self, policy_TD: Tensor, frozen: tuple[Tensor, Tensor], weight_T: Tensor) -> AdaptivePolicyTerms:
        return adaptive_policy(
            policy_TD,
            self.student.head,
            frozen[0],
            self.teacher.head,
            frozen[1],
            self.other.head,
            self.combination,
            weight_T,
            form=self.form,
            chunk_size=self.loss_chunk,
        )

    def _log_tokens(self, terms: AdaptivePolicyTerms, tokens: TokenBatch, samples: int) -> None:
        """Means over answers of their means over tokens (section 14 of our specification), and the heaviest token."""
        self.log_step(self._means(terms, tokens, samples), samples)
        self.log_step({"answer_tokens": tokens.num_supervised}, samples)
        if self.form == "decomposed":
            return
        heavy_T = terms.beta_T * terms.value_T
        self.step_sums.largest("max_beta_kl", heavy_T.max())
        largest, mean = heavy_T.max(), heavy_T.abs().mean()
        if self.global_step == 0 and len(heavy_T) > 1 and largest > _LARGE * mean:
            rank_zero_warn(
                f"One token weighs {largest / mean:.0f} times the mean (beta_t KL {largest:.3g}, alpha_t "
                f"{terms.alpha_T[heavy_T.argmax()]:.3g}): the two frozen models agree there, while the policy does not. See "
                "train/max_beta_kl; model.combination.beta_cap limits beta_t."
            )

    @staticmethod
    def _means(terms: AdaptivePolicyTerms, tokens: TokenBatch, samples: int) -> dict[str, Tensor]:
        """Sums over answers of their mean over tokens."""
        values = {name: getattr(terms, f"{name}_T") for name in _PER_TOKEN} | {
            # without log Z_t, as in the decomposed form, the value is no divergence
            "kl": terms.value_T if terms.teacher_entropy_T is not None else None,
            "agreement": terms.agree_T,
        }
        return {
            name: mean_by_sequence(value_T, tokens.sequence_T, samples).sum()
            for name, value_T in values.items()
            if value_T is not None
        }

    # ------------------------------------------------------------ evaluation

    def evaluate(self, batch: PreferenceBatch, stage: str) -> None:
        """Loss on chosen answers, and how the pairs are judged by the policy and by the two frozen models."""
        samples, tokens = len(batch.examples), batch.chosen
        weights = sample_weights(tokens.sequence_T, samples, self.reduction)
        held_out = self.frozen_pair.of_pairs(batch, stage)
        policy_PD = hidden_of_pairs(self.student, batch)
        policy_TD = policy_PD[: tokens.num_supervised]
        terms = self._terms(policy_TD, (held_out.hidden["dpo"], held_out.hidden["other"]), weights.weight_T)
        self.log_means(stage, {"loss": terms.loss}, int(weights.count))
        self.log_means(stage, self._means(terms, tokens, samples), samples)
        self.log_means(stage, {"tvd_below_0.01": (terms.tvd_T < 0.01).sum()}, tokens.num_supervised)
        if self.frozen_start is not None:
            kl = self._kl_to_start(policy_TD, held_out.hidden["start"], tokens)
            self.log_means(stage, {"kl_start": kl}, tokens.num_supervised)
        log_probs = held_out.log_probs | {"policy": self._log_probs(policy_PD, batch)}
        self._log_rewards(batch, stage, log_probs)

        self.view.add({"alpha": terms.alpha_T, "tvd": terms.tvd_T})
        reward_T = self.combination.dpo_beta * (log_probs["dpo"] - log_probs["other"])[: tokens.num_supervised]
        scores = {"alpha": terms.alpha_T, "reward": reward_T, "kl_dpo": terms.kl_dpo_T}
        self.view.add_answers(batch.examples, tokens, self.student_tokenizer, scores)

    def _log_probs(self, hidden_PD: Tensor, batch: PreferenceBatch) -> Tensor:
        """(P,) log-probabilities of the tokens of all answers under the policy."""
        target_P = torch.cat([batch.chosen.target_T, batch.rejected.target_T])
        return token_log_probs(hidden_PD, self.student.head, target_P, chunk_size=self.loss_chunk)

    def _log_rewards(self, batch: PreferenceBatch, stage: str, log_probs: dict[str, Tensor]) -> None:
        """Pairs under the policy's and the DPO model's reward relative to the start, and under the contrastive one."""
        beta, start_2B = self.combination.dpo_beta, batch.reference_B2.T
        sums = {name: sums_of_answers(value_P, batch) for name, value_P in log_probs.items()}
        rewards = {
            "": sums["policy"] - start_2B,
            "dpo_": sums["dpo"] - start_2B,
            "contrastive_": sums["dpo"] - sums["other"],
        }
        for name, reward_2B in rewards.items():
            self.log_order(stage, name, beta * reward_2B)

    def _new_view(self) -> TokenView:
        return TokenView(("alpha", "tvd"), self.generation.shown)

    def on_validation_epoch_start(self) -> None:
        self.view = self._new_view()

    def on_test_epoch_start(self) -> None:
        self.view = self._new_view()

    def on_test_epoch_end(self) -> None:
        self._show_tokens("test")
        super().on_test_epoch_end()

    def _show_tokens(self, stage: str) -> None:
        """Hand over what the callbacks show of tokens."""
        self.token_scores, self.histograms = self.view.answers(self), self.view.histograms(self)
        self._log_percentiles(f"{stage}/alpha", self.histograms["alpha"])

    def _log_percentiles(self, name: str, value_T: Tensor) -> None:
        for percent in (50, 95) if len(value_T) else ():
            self.log(f"{name}_p{percent}", value_T.quantile(percent / 100))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self._show_tokens("val")
        super().on_validation_epoch_end()

    def evaluate_sampled(self, tokens: TokenBatch) -> None:
        """Rewards, divergences and lengths of answers that the policy samples to validation prompts."""
        samples = len(tokens.length_B)
        policy_TD, frozen = self.student.hidden(tokens), self.frozen_pair.hidden(tokens)
        terms = self._terms(policy_TD, frozen, torch.ones_like(tokens.target_T, dtype=torch.float32))
        for name, value in self._means(terms, tokens, samples).items():
            self.log(f"val/sampled_{name}", value / samples)
        self.histograms |= {"sampled_alpha": terms.alpha_T.cpu(), "sampled_tvd": terms.tvd_T.cpu()}
        self._log_percentiles("val/sampled_alpha", terms.alpha_T.float())
        log_probs = [
            token_log_probs(hidden_TD, model.head, tokens.target_T, chunk_size=self.loss_chunk)
            for hidden_TD, model in zip(frozen, (self.teacher, self.other), strict=True)
        ]
        sums = {
            "kl_dpo_of_answer": terms.kl_dpo_T,
            "expected_reward_of_answer": terms.expected_reward_T,
            "reward_of_answer": self.combination.dpo_beta * (log_probs[0] - log_probs[1]),
        }
        for name, value_T in sums.items():
            self.log(f"val/sampled_{name}", sum_by_sequence(value_T, tokens.sequence_T, samples).mean())
        if self.frozen_start is not None:
            kl = self._kl_to_start(policy_TD, self.frozen_start.model.hidden(tokens), tokens)
            self.log("val/sampled_kl_start_of_answer", kl / samples)

    def _kl_to_start(self, policy_TD: Tensor, start_TD: Tensor, tokens: TokenBatch) -> Tensor:
        """KL(policy || start), summed over tokens."""
        terms = distillation(
            policy_TD,
            self.student.head,
            tokens.target_T,
            start_TD,
            self.frozen_start.model.head,
            Divergence(name="reverse_kl", temperature=1.0),
            ce_weight=0.0,
            kd_weight=1.0,
            chunk_size=self.loss_chunk,
        )
        return terms.kd

    def identity(self) -> dict[str, Any]:
        base = {} if self.student.base is None else {"base": self.student.base["weights"]}
        return {**super().identity(), "rule": self.combination.rule, "slope": self.combination.slope, **base}


def _check_store(store: TeacherStore | None, on_policy: OnPolicy | None) -> None:
    if store is not None and on_policy is not None:
        raise ValueError(
            f"model.teacher_store.folder is {store.folder!r} and model.on_policy is set, but a store knows nothing of answers "
            "that are still to be sampled. Leave one of the two out."
        )
    if store is not None and store.top_k is not None:
        raise ValueError(
            f"model.teacher_store.top_k is {store.top_k}, but AlignDistil combines two whole distributions and takes their "
            "distance over all tokens. Leave it out to store hidden states."
        )
