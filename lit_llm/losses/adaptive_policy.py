"""AlignDistil: token-level alignment as distillation from a teacher that is combined from two models (arXiv 2503.02832).

The teacher of a token is `log pi* = log softmax(z_d + c (z_d - z_o))` with the logits of the DPO model d and of another
model o: the reverse-DPO model where c = alpha (extrapolation), the starting model where c = alpha - 1 (interpolation).
alpha is a constant or grows with the distance of the two: alpha_t = slope * TVD_t + floor. The loss of a token is
beta_t KL(policy || pi*), and beta_t alpha_t is the beta of DPO. For every rule, exactly,

    beta_t KL(policy || pi*) = beta_t (KL(policy || a) - alpha_t E_policy[log d - log o]) + beta_t log Z_t

with a = d in extrapolation and a = o in interpolation, and without the policy in log Z_t. The `decomposed` form leaves
the last term out: same gradient, no teacher to normalise.

Differences from the released code: TVD is half the L1 distance, so the slope is twice the released one; temperature
divides both sides; tokens are weighed by the caller.

Shapes: T tokens, C tokens of a block, D, E and F widths, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_llm.losses.divergence import at_least_float32
from lit_llm.losses.head import Head
from lit_llm.losses.three_heads import mean_, softmax_into, sum_over_three_heads

Rule = Literal["adaptive_extrapolation", "fixed_extrapolation", "adaptive_interpolation", "fixed_interpolation"]
Form = Literal["combined", "decomposed"]
Reduction = Literal["sample_mean", "sum", "token_mean"]


@dataclass(frozen=True)
class AdaptivePolicy:
    """How the teacher is combined and how its tokens are weighed.

    Args:
        rule: adaptive_extrapolation is the published method; the others are its ablations.
        dpo_beta: beta that the DPO models were trained with; scales the reward log d - log o.
        beta: weight of the KL in a fixed rule; its coefficient is dpo_beta / beta. None in an adaptive rule.
        slope: of alpha on the total variation distance (half the L1 distance); the published scripts' 10 and 15 on the
            L1 distance are 20 (off-policy) and 30 (on-policy) here.
        floor: alpha where both models agree. Below 1e-4, single precision no longer carries the loss.
        temperature: divides the logits of the policy and the combined logits; the distance is taken at 1.
        tempered: "both", or "teacher" as in the released off-policy code.
        beta_cap: upper limit of beta_t in an adaptive rule; None: no limit but dpo_beta / floor.

    Raises:
        ValueError: a value out of range, or one that the rule does not use.
    """

    rule: Rule = "adaptive_extrapolation"
    dpo_beta: float = 0.1
    beta: float | None = None
    slope: float = 20.0
    floor: float = 1e-3
    temperature: float = 1.0
    tempered: Literal["both", "teacher"] = "both"
    beta_cap: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule is {self.rule!r}; known are {', '.join(get_args(Rule))}.")
        if self.tempered not in ("both", "teacher"):
            raise ValueError(f"tempered is {self.tempered!r}; known are 'both' and 'teacher'.")
        for name in ("dpo_beta", "beta", "floor", "temperature", "beta_cap"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if not self.slope >= 0:
            raise ValueError(f"slope is {self.slope}; it must be at least 0 (0 is a constant coefficient of `floor`).")
        if self.tempered == "teacher" and self.temperature == 1.0:
            raise ValueError(
                "tempered is 'teacher', but temperature is 1, which divides by nothing. Set a temperature, or leave "
                "tempered at 'both'."
            )
        if not self.is_adaptive and self.beta is None:
            raise ValueError(f"rule is {self.rule!r}, but beta is None. Set beta: the weight of the KL.")
        defaults = type(self).__dataclass_fields__
        unused = ("beta",) if self.is_adaptive else ("slope", "floor", "beta_cap")
        for name in unused:
            if getattr(self, name) != defaults[name].default:
                kind = "adaptive" if self.is_adaptive else "fixed"
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but rule is {self.rule!r}, and {kind} rules do not use {name}. "
                    "Take it out, or choose another rule."
                )

    @property
    def is_adaptive(self) -> bool:
        return self.rule.startswith("adaptive")

    @property
    def extrapolates(self) -> bool:
        return self.rule.endswith("extrapolation")

    @property
    def policy_temperature(self) -> float:
        return self.temperature if self.tempered == "both" else 1.0

    def coefficient(self, tvd_T: Tensor) -> Coefficient:
        """alpha and beta of tokens with these distances."""
        if self.is_adaptive:
            alpha_T = self.slope * tvd_T + self.floor
            beta_T = self.dpo_beta / alpha_T
            return Coefficient(tvd_T, alpha_T, beta_T if self.beta_cap is None else beta_T.clamp(max=self.beta_cap))
        return Coefficient(tvd_T, torch.full_like(tvd_T, self.dpo_beta / self.beta), torch.full_like(tvd_T, self.beta))

    def beyond(self, alpha_T: Tensor) -> Tensor:
        """c: how often the step z_d - z_o is taken from z_d on."""
        return alpha_T if self.extrapolates else alpha_T - 1


class Coefficient(NamedTuple):
    """Per token: total variation distance of the two models, coefficient of the combination, weight of the KL."""

    tvd_T: Tensor
    alpha_T: Tensor
    beta_T: Tensor


class AdaptivePolicyTerms(NamedTuple):
    """The loss, differentiable, and what each token brought to it, detached.

    Attributes:
        loss: sum of weight_t beta_t value_t.
        value_T: KL(policy || teacher) in the combined form; in the decomposed one that without log Z_t.
        tvd_T: total variation distance of the DPO model and the other.
        alpha_T: coefficient of the combination.
        beta_T: weight of the KL.
        expected_reward_T: dpo_beta E_policy[log d - log o].
        dpo_expected_reward_T: the same expected by the DPO model.
        kl_dpo_T: KL(policy || DPO model).
        kl_other_T: KL(policy || other model).
        entropy_T: of the policy.
        teacher_entropy_T: of the combined distribution; None in the decomposed form.
        agree_T: 1 where policy and teacher have the same best token, else 0; None in the decomposed form.
    """

    loss: Tensor
    value_T: Tensor
    tvd_T: Tensor
    alpha_T: Tensor
    beta_T: Tensor
    expected_reward_T: Tensor
    dpo_expected_reward_T: Tensor
    kl_dpo_T: Tensor
    kl_other_T: Tensor
    entropy_T: Tensor
    teacher_entropy_T: Tensor | None = None
    agree_T: Tensor | None = None


class SampleWeights(NamedTuple):
    """Weights of tokens and what their sum is to be divided by.

    Attributes:
        weight_T: per token.
        count: sequences with a token, or tokens, of this batch; the divisor is their sum over the optimizer step.
    """

    weight_T: Tensor
    count: Tensor


def sample_weights(
    sequence_T: Tensor,
    num_sequences: int,
    reduction: Reduction = "sample_mean",
    dtype: torch.dtype = torch.float32,
) -> SampleWeights:
    """How much each token counts before the division by the whole optimizer step.

    Args:
        sequence_T: the sequence of each token.
        num_sequences: sequences of the batch; those without a token are not counted.
        reduction: sample_mean: mean over sequences of the mean over tokens, as published; sum: mean over sequences of
            the sum; token_mean: mean over all tokens.
        dtype: of the weights.

    Raises:
        ValueError: an unknown reduction.
    """
    tokens_N = torch.bincount(sequence_T, minlength=num_sequences)
    ones_T = torch.ones(len(sequence_T), dtype=dtype, device=sequence_T.device)
    if reduction == "sample_mean":
        return SampleWeights(ones_T / tokens_N[sequence_T], tokens_N.count_nonzero())
    if reduction == "sum":
        return SampleWeights(ones_T, tokens_N.count_nonzero())
    if reduction == "token_mean":
        return SampleWeights(ones_T, tokens_N.sum())
    raise ValueError(f"reduction is {reduction!r}; known are {', '.join(get_args(Reduction))}.")


def adaptive_coefficient(dpo_TV: Tensor, other_TV: Tensor, settings: AdaptivePolicy) -> Coefficient:
    """Coefficients from the logits of the two models, at temperature 1."""
    p_TV, q_TV = at_least_float32(dpo_TV.detach()).softmax(-1), at_least_float32(other_TV.detach()).softmax(-1)
    return settings.coefficient(0.5 * (p_TV - q_TV).abs().sum(-1))


def combined_logits(dpo_TV: Tensor, other_TV: Tensor, alpha_T: Tensor, settings: AdaptivePolicy) -> Tensor:
    """Logits of the teacher, (T, V), from logits or from log-probabilities: a constant per token may differ."""
    return dpo_TV + settings.beyond(alpha_T)[..., None] * (dpo_TV - other_TV)


def combined_log_probs(dpo_TV: Tensor, other_TV: Tensor, alpha_T: Tensor, settings: AdaptivePolicy) -> Tensor:
    """log pi* at the temperature of the settings, (T, V)."""
    return (combined_logits(dpo_TV, other_TV, alpha_T, settings) / settings.temperature).log_softmax(-1)


def adaptive_policy_values(
    policy_TV: Tensor, dpo_TV: Tensor, other_TV: Tensor, settings: AdaptivePolicy, form: Form = "combined"
) -> Tensor:
    """The readable definition: beta_t times the value of each token, (T,), from finite logits; `adaptive_policy` is it."""
    dpo_TV, other_TV = at_least_float32(dpo_TV.detach()), at_least_float32(other_TV.detach())
    _, alpha_T, beta_T = adaptive_coefficient(dpo_TV, other_TV, settings)
    log_q_TV = (at_least_float32(policy_TV) / settings.policy_temperature).log_softmax(-1)
    q_TV = log_q_TV.exp()
    if form == "combined":
        log_p_TV = combined_log_probs(dpo_TV, other_TV, alpha_T, settings)
        return beta_T * (q_TV * (log_q_TV - log_p_TV)).sum(-1)
    anchor_TV = ((dpo_TV if settings.extrapolates else other_TV) / settings.temperature).log_softmax(-1)
    reward_TV = (dpo_TV.log_softmax(-1) - other_TV.log_softmax(-1)) / settings.temperature
    return beta_T * (q_TV * (log_q_TV - anchor_TV - alpha_T[..., None] * reward_TV)).sum(-1)


def adaptive_policy(
    policy_TD: Tensor,
    policy_head: Head,
    dpo_TE: Tensor,
    dpo_head: Head,
    other_TF: Tensor,
    other_head: Head,
    settings: AdaptivePolicy,
    weight_T: Tensor,
    *,
    form: Form = "combined",
    chunk_size: int | None = None,
) -> AdaptivePolicyTerms:
    """Sum over tokens of weight_t beta_t KL(policy || combined teacher), without a tensor of [tokens, vocabulary].

    Vocabularies of one tokenizer that are padded to different lengths are compared over the shortest one. A logit that
    is not finite takes its token of the vocabulary out of all three models.

    Args:
        policy_TD: the policy's hidden states, row t the same position as row t of the others.
        policy_head: trained, or detached.
        dpo_TE: the DPO model's hidden states; no gradient flows into them.
        dpo_head: frozen.
        other_TF: hidden states of the reverse-DPO model (extrapolation) or of the starting model (interpolation).
        other_head: frozen.
        settings: rule, coefficients, temperature.
        weight_T: of each token, the caller's 1/denominator included; see `sample_weights`.
        form: "combined", or "decomposed" with the same gradient and another value.
        chunk_size: rows at a time; None chooses by the vocabularies.

    Raises:
        ValueError: numbers of rows differ, or an unknown form.
    """
    if form not in get_args(Form):
        raise ValueError(f"form is {form!r}; known are {', '.join(get_args(Form))}.")

    def block_(*block: Tensor) -> list[Tensor]:
        return _terms_and_gradient_(*block, settings, form)

    frozen = ((dpo_TE, dpo_head), (other_TF, other_head))
    num_values = len(AdaptivePolicyTerms._fields) - (1 if form == "combined" else 3)
    return AdaptivePolicyTerms(
        *sum_over_three_heads(block_, policy_TD, policy_head, frozen, weight_T, num_values, chunk_size)
    )


def _terms_and_gradient_(
    policy_CV: Tensor,
    dpo_CV: Tensor,
    other_CV: Tensor,
    weight_C: Tensor,
    spare_2CV: Tensor,
    settings: AdaptivePolicy,
    form: Form,
) -> list[Tensor]:
    """The numbers of each token; all arguments but the weights are used up, the policy's become the gradient."""
    first_CV, second_CV = spare_2CV
    log_z_dpo_C = torch.add(*softmax_into(dpo_CV, first_CV))
    log_z_other_C = torch.add(*softmax_into(other_CV, second_CV))
    tvd_C = torch.sub(first_CV, second_CV, out=second_CV).abs_().sum(-1).mul_(0.5)
    _, alpha_C, beta_C = settings.coefficient(tvd_C)
    log_z_anchor_C = log_z_dpo_C if settings.extrapolates else log_z_other_C
    if form == "decomposed" and settings.temperature != 1.0:
        anchor_CV = dpo_CV if settings.extrapolates else other_CV
        log_z_anchor_C = torch.logsumexp(anchor_CV / settings.temperature, -1)
    gap_CV, shift_C = torch.sub(dpo_CV, other_CV, out=other_CV), log_z_dpo_C - log_z_other_C
    dpo_reward_C = mean_(first_CV, gap_CV, first_CV) - shift_C

    best_C, above_C = softmax_into(policy_CV, first_CV)
    log_z_C = best_C + above_C
    mean_C = mean_(first_CV, policy_CV, second_CV)
    kl_dpo_C = mean_C - mean_(first_CV, dpo_CV, second_CV) - (log_z_C - log_z_dpo_C)
    reward_C = mean_(first_CV, gap_CV, second_CV) - shift_C
    entropy_C = log_z_C - mean_C

    teacher_CV = dpo_CV.addcmul_(gap_CV, settings.beyond(alpha_C)[:, None])
    if settings.temperature != 1.0:
        teacher_CV.div_(settings.temperature)
    if settings.policy_temperature != 1.0:
        best_C, above_C = softmax_into(policy_CV.div_(settings.policy_temperature), first_CV)
        log_z_C = best_C + above_C
    if form == "combined":
        teacher_best_C, log_z_teacher_C = softmax_into(teacher_CV, second_CV)
        # amplified logits are large: from here on they are relative to the best, and so is their sum
        teacher_CV.sub_(teacher_best_C[:, None])
        teacher_entropy_C = log_z_teacher_C - mean_(second_CV, teacher_CV, second_CV)
        # the largest sum is the policy's largest logit just where both are largest; argmax takes ten times as long
        agree_C = (torch.add(teacher_CV, policy_CV, out=second_CV).amax(-1) >= best_C).to(mean_C.dtype)
        of_teacher = [teacher_entropy_C, agree_C]
    else:
        log_z_teacher_C, of_teacher = log_z_anchor_C + alpha_C * shift_C / settings.temperature, []

    policy_CV.sub_(teacher_CV).sub_((log_z_C - log_z_teacher_C)[:, None])
    value_C = mean_(first_CV, policy_CV, second_CV)
    weight_C = weight_C * beta_C
    policy_CV.sub_(value_C[:, None]).mul_(first_CV).mul_((weight_C / settings.policy_temperature)[:, None])
    rewards = [settings.dpo_beta * reward_C, settings.dpo_beta * dpo_reward_C]
    kls = [kl_dpo_C, kl_dpo_C + reward_C]
    return [weight_C * value_C, value_C, tvd_C, alpha_C, beta_C, *rewards, *kls, entropy_C, *of_teacher]
