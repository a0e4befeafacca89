"""Golden cases of adaptive policy distillation: coefficients, teachers, losses, whole steps, and its siblings."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_llm.losses.adaptive_policy import (
    AdaptivePolicy,
    AdaptivePolicyTerms,
    adaptive_coefficient,
    adaptive_policy,
    adaptive_policy_values,
    combined_log_probs,
    combined_logits,
    sample_weights,
)
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.expected_advantage import expected_advantage
from lit_llm.losses.fused_head import HeadTerms, distillation
from lit_llm.losses.preference import mean_by_sequence, sum_by_sequence
from lit_llm.losses.sparse_teacher import sparse_forward_kl
from tests.golden import released_masks
from tests.golden.golden import Case
from tests.golden.preference_cases import identity

_CHUNK = 5


def settings_of(case: Case) -> AdaptivePolicy:
    """The settings of a case in our names; the released slope is on the L1 distance."""
    given, rule = case.hparams, case.hparams.get("mode", "adaptive_extrapolation")
    strength = (
        {"slope": given["slope_tvd"], "floor": given["epsilon"]} if "adaptive" in rule else {"beta": given["beta"]}
    )
    temperature, scope = given.get("temperature", 1.0), given.get("temperature_scope", "n/a")
    if temperature != 1.0:
        sides = {"teacher_only": "teacher", "student_and_teacher": "both"}
        strength |= {"temperature": temperature, "tempered": sides[scope]}
    return AdaptivePolicy(rule=rule, dpo_beta=given["beta0"], **strength)


def check_coefficient(case: Case) -> None:
    settings = settings_of(case)
    sides = case["in.dpo_logits"], case["in.rdpo_logits"]
    tvd_BT, alpha_BT, beta_BT = adaptive_coefficient(*sides, settings)
    fused = _fused(sides[0], *sides, settings, torch.ones(alpha_BT.numel(), dtype=case.dtype))
    for found in ((tvd_BT, alpha_BT, beta_BT), (fused.tvd_T, fused.alpha_T, fused.beta_T)):
        tvd_BT, alpha_BT, beta_BT = (value.view(sides[0].shape[:-1]) for value in found)
        case.check("out.l1", 2 * tvd_BT)
        case.check("out.tvd", tvd_BT)
        case.check("out.alpha", alpha_BT)
        case.check("out.beta_t", beta_BT)


def check_teacher(case: Case) -> None:
    settings, sides = settings_of(case), (case["in.dpo_logits"], case["in.other_logits"])
    alpha_BT = adaptive_coefficient(*sides, settings).alpha_T
    case.check("out.weight", alpha_BT)
    case.check("out.combined_logits", combined_logits(*sides, alpha_BT, settings))
    case.check("out.teacher_logprobs", combined_log_probs(*sides, alpha_BT, settings))
    normalised = [side.log_softmax(-1) for side in sides]
    case.check("out.teacher_logprobs", combined_log_probs(*normalised, alpha_BT, settings))


def check_loss(case: Case) -> None:
    settings, mask_BT = settings_of(case), case["in.mask"].bool()
    frozen = case["in.dpo_logits"], case["in.other_logits"]
    weight_T, samples = _weights(case, mask_BT)
    for form in ("decomposed", "combined"):
        policy_BTV = case.leaf("in.student_logits")
        terms = _fused(policy_BTV, *frozen, settings, weight_T / samples, form)
        terms.loss.backward()
        name = "out.grad_student_logits"
        case.check(name, policy_BTV.grad, **case.gradient_tolerance(name))
        if form == "decomposed":
            without_normaliser_T = terms.value_T
    case.check("out.loss", terms.loss)
    grid = {name: value.view(mask_BT.shape) for name, value in terms._asdict().items() if name != "loss"}
    defined_BT = adaptive_policy_values(case["in.student_logits"], *frozen, settings)
    for value_BT in (grid["beta_T"] * grid["value_T"], defined_BT):
        per_sample_B = (weight_T.view(mask_BT.shape) * value_BT).sum(-1)
        case.check("out.loss_per_sample", per_sample_B)
    case.check("out.token_kl", grid["value_T"])
    case.check("out.alpha", grid["alpha_T"])
    case.check("out.beta_t", grid["beta_T"])
    _check_metrics(case, grid, mask_BT)
    if "out.anchor_kl" in case:
        case.check("out.anchor_kl", grid["kl_dpo_T" if settings.extrapolates else "kl_other_T"])
        case.check("out.expected_token_reward", grid["expected_reward_T"])
        normaliser_T = terms.value_T - without_normaliser_T
        case.check("out.log_normaliser", normaliser_T.view(mask_BT.shape))


def check_off_policy(case: Case) -> None:
    lengths, attention_BL = case["in.prompt_lens"], case["in.attention_mask"]
    _, mask_BL = released_masks.rows_of(case["in.input_ids"], attention_BL, lengths.tolist())
    _check_step(case, "shifted", mask_BL)
    _check_step(case, "unshifted", released_masks.unshifted(attention_BL, lengths))


def check_on_policy(case: Case) -> None:
    length, special = int(case["in.input_len"]), (case.hparams["pad_id"], case.hparams["eos_id"])
    ids_BL, attention_BL = released_masks.enforced_end(case["in.raw_sequences"], *special)
    case.check("out.sequences", ids_BL)
    case.check("out.attention_mask", attention_BL)
    prompts = attention_BL[:, :length].sum(-1).tolist()
    _, mask_BL = released_masks.rows_of(ids_BL, attention_BL, prompts)
    action_BA = released_masks.actions(ids_BL, length, *special)
    case.check("out.action_mask", action_BA)
    assert torch.equal(mask_BL[:, length - 1 : -1], action_BA), "the released actions are the supervised positions"
    if "out.mask_shifted" in case:
        _check_step(case, "shifted", mask_BL)
    late_BL = released_masks.released_on_policy(attention_BL, length)
    terms = _check_step(case, "released", late_BL)
    reward_BL = _sampled_reward(case, ids_BL) * late_BL
    assert terms.tvd_T.numel() == reward_BL.numel()
    case.check("out.metric_seq_reward_released", reward_BL.sum(-1).mean())
    case.check("out.metric_token_reward_released", (reward_BL.sum(-1) / late_BL.sum(-1)).mean())


def check_kd(case: Case) -> None:
    mask_BT = case["in.mask"].bool()
    squared = {"scale_by_temperature_squared": case.hparams["temperature_squared_factor"]}
    tokens, samples = int(mask_BT.sum()), len(mask_BT)
    for name, kind, divisor in (
        ("forward_kl", "forward_kl", tokens),
        ("reverse_kl", "reverse_kl", tokens),
        ("sequence_reverse_kl", "reverse_kl", samples),
    ):
        student_BTV = case.leaf("in.student_logits")
        divergence = Divergence(name=kind, temperature=case.hparams["temperature"], **squared)
        target_T = torch.zeros(tokens, dtype=torch.int64)
        terms = _distilled(
            student_BTV[mask_BT], target_T, case["in.teacher_logits"][mask_BT], divergence, 0.0, 1 / divisor
        )
        terms.loss.backward()
        case.check(f"out.{name}_loss", terms.loss)
        case.check(f"out.{name}_grad", student_BTV.grad, **case.gradient_tolerance(f"out.{name}_grad"))


def check_dckd(case: Case) -> None:
    total = 0.0
    for side in ("chosen", "rejected"):
        labels_BT, student_BTV = case[f"in.{side}_labels"], case.leaf(f"in.{side}_student_logits")
        mask_BT = labels_BT != -100
        tokens, teacher_TV = int(mask_BT.sum()), case[f"in.{side}_teacher_logits"][mask_BT]
        terms = _distilled(
            student_BTV[mask_BT],
            labels_BT[mask_BT],
            teacher_TV,
            Divergence(name="forward_kl", temperature=1.0),
            case.hparams["sft_weight"] / tokens if side == "chosen" else 0.0,
            case.hparams[f"w_{side}"] / tokens,
        )
        terms.loss.backward()
        total = total + terms.loss.detach()
        case.check(f"out.grad_{side}", student_BTV.grad, **case.gradient_tolerance(f"out.grad_{side}"))
        case.check(f"out.{side}_fkl_full", terms.kd / tokens)
        sparse_T = _kept_forward_kl(student_BTV.detach()[mask_BT], teacher_TV, case.hparams["top_k"])
        case.check(f"out.{side}_fkl_topk", sparse_T.mean())
        if side == "chosen":
            case.check("out.chosen_nll", terms.ce / tokens)
    case.check("out.total", total)


def check_adpa(case: Case) -> None:
    mask_BT, student_BTV = case["in.labels"] != -100, case.leaf("in.student_logits")
    sides, beta = [case[f"in.{name}_teacher_logits"] for name in ("dpo", "ref")], case.hparams["beta_inside_advantage"]
    case.check("out.advantage", _advantages(*sides, beta))
    tokens, head = int(mask_BT.sum()), identity(student_BTV.shape[-1], case.dtype)
    dpo, reference = (side[mask_BT] for side in sides)
    weight_T = torch.full((tokens,), 1 / tokens, dtype=case.dtype)
    terms = expected_advantage(
        student_BTV[mask_BT], head, dpo, head, reference, head, weight_T, beta=beta, chunk_size=_CHUNK
    )
    terms.loss.backward()  # the expected gradient is that before gamma, like the value
    case.check("out.loss_full", terms.loss)
    case.check("out.grad_full", student_BTV.grad, **case.gradient_tolerance("out.grad_full"))
    for name, value in _released_advantage(student_BTV.detach()[mask_BT], dpo, reference, case.hparams).items():
        case.check(name, value)


def _fused(
    policy: Tensor, dpo: Tensor, other: Tensor, settings: AdaptivePolicy, weight_T: Tensor, form: str = "combined"
) -> AdaptivePolicyTerms:
    """Through heads that pass logits on; rows of all positions."""
    head = identity(policy.shape[-1], policy.dtype)
    rows = (side.flatten(0, -2) for side in (policy, dpo, other))
    policy_TV, dpo_TV, other_TV = rows
    return adaptive_policy(
        policy_TV, head, dpo_TV, head, other_TV, head, settings, weight_T, form=form, chunk_size=_CHUNK
    )


def _weights(case: Case, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of all positions, 0 outside the mask, and the number of samples."""
    reduction = "sample_mean" if case.hparams["length_norm"] else "sum"
    found = sample_weights(mask_BT.nonzero()[:, 0], len(mask_BT), reduction, case.dtype)
    weight_BT = torch.zeros(mask_BT.shape, dtype=case.dtype)
    weight_BT[mask_BT] = found.weight_T
    return weight_BT.flatten(), found.count


def _check_metrics(case: Case, grid: dict[str, Tensor], mask_BT: Tensor) -> None:
    sequence_T, num = mask_BT.nonzero()[:, 0], len(mask_BT)

    def of(name: str, reduce) -> Tensor:
        return reduce(grid[name][mask_BT], sequence_T, num).mean()

    case.check("out.metric_mean_weight", of("alpha_T", mean_by_sequence))
    case.check("out.metric_expected_reward", of("expected_reward_T", sum_by_sequence))
    case.check("out.metric_teacher_expected_reward", of("dpo_expected_reward_T", sum_by_sequence))
    for side in ("other", "dpo"):
        case.check(f"out.metric_seq_kl_{side}", of(f"kl_{side}_T", sum_by_sequence))
        case.check(f"out.metric_token_kl_{side}", of(f"kl_{side}_T", mean_by_sequence))


def _check_step(case: Case, convention: str, mask_BL: Tensor) -> AdaptivePolicyTerms:
    policy_BLV = case.leaf("in.student_logits")
    weight_T, samples = _weights(case, mask_BL)
    frozen = case["in.dpo_logits"], case["in.rdpo_logits"]
    terms = _fused(policy_BLV, *frozen, settings_of(case), weight_T / samples)
    terms.loss.backward()
    case.check(f"out.mask_{convention}", mask_BL)
    case.check(f"out.loss_{convention}", terms.loss)
    name = f"out.grad_{convention}"
    case.check(name, policy_BLV.grad, **case.gradient_tolerance(name))
    alpha_T = terms.alpha_T.view(mask_BL.shape)[mask_BL]
    mean_B = mean_by_sequence(alpha_T, mask_BL.nonzero()[:, 0], len(mask_BL))
    case.check(f"out.metric_mean_weight_{convention}", mean_B.sum() / samples)
    return terms


def _sampled_reward(case: Case, ids_BL: Tensor) -> Tensor:
    """dpo_beta (log dpo - log reverse) of the token behind each position, (B, L), 0 at the last."""
    dpo_BLV, other_BLV = (case[f"in.{side}_logits"].log_softmax(-1) for side in ("dpo", "rdpo"))
    next_BL1 = ids_BL[:, 1:, None]
    gap_BL = (dpo_BLV - other_BLV)[:, :-1].gather(-1, next_BL1).squeeze(-1)
    return torch.nn.functional.pad(case.hparams["beta0"] * gap_BL, (0, 1))


def _distilled(
    student_TV: Tensor,
    target_T: Tensor,
    teacher_TV: Tensor,
    divergence: Divergence,
    ce_weight: float,
    kd_weight: float,
) -> HeadTerms:
    head = identity(student_TV.shape[-1], student_TV.dtype)
    weights = {"ce_weight": ce_weight, "kd_weight": kd_weight}
    return distillation(student_TV, head, target_T, teacher_TV, head, divergence, chunk_size=_CHUNK, **weights)


def _kept_forward_kl(student_TV: Tensor, teacher_TV: Tensor, top_k: int) -> Tensor:
    log_p_TV = teacher_TV.log_softmax(-1)
    log_p_TK, ids_TK = log_p_TV.topk(min(top_k, log_p_TV.shape[-1]), dim=-1)
    log_rest_T = log_p_TV.scatter(-1, ids_TK, -torch.inf).logsumexp(-1)
    return sparse_forward_kl(student_TV.log_softmax(-1), ids_TK, log_p_TK, log_rest_T)


def _advantages(dpo_BTV: Tensor, reference_BTV: Tensor, beta: float) -> Tensor:
    """The advantage of every token: what a policy expects that is sure of it."""
    vocabulary = dpo_BTV.shape[-1]
    head = identity(vocabulary, dpo_BTV.dtype)
    dpo, reference = (side.flatten(0, -2).repeat_interleave(vocabulary, 0) for side in (dpo_BTV, reference_BTV))
    sure = (1e4 * torch.eye(vocabulary, dtype=dpo.dtype)).repeat(len(dpo) // vocabulary, 1)
    terms = expected_advantage(sure, head, dpo, head, reference, head, torch.ones(len(dpo)), beta=beta)
    return terms.advantage_T.view(dpo_BTV.shape)


def _released_advantage(student_TV: Tensor, dpo_TV: Tensor, reference_TV: Tensor, given: dict) -> dict[str, Tensor]:
    """The authors' sparse targets: what the aligned teacher keeps, and a clamp meant for probabilities."""
    q_TV, p_TV, r_TV = (side.softmax(-1) for side in (student_TV, dpo_TV, reference_TV))
    k = min(given["top_k"], p_TV.shape[-1])
    p_TK, ids_TK = p_TV.topk(k, dim=-1)
    kept_TV = torch.zeros_like(r_TV, dtype=torch.bool).scatter_(-1, r_TV.topk(k, dim=-1).indices, True)
    r_TK = torch.where(kept_TV, r_TV, p_TK[:, -1:]).gather(-1, ids_TK)
    advantage_TK, q_TK = given["beta_inside_advantage"] * (p_TK.log() - r_TK.log()), q_TV.gather(-1, ids_TK)
    return {
        "out.loss_topk": -(q_TK * advantage_TK).sum(-1).mean(),
        "out.loss_topk_released": -(q_TK * advantage_TK.clamp(1e-8, 1 - 1e-8)).sum(-1).mean(),
    }


HANDLERS = {
    "adaptive_alpha": check_coefficient,
    "teacher": check_teacher,
    "loss": check_loss,
    "offpolicy": check_off_policy,
    "onpolicy": check_on_policy,
    "kd_loss": check_kd,
    "dckd": check_dckd,
    "adpa": check_adpa,
}
