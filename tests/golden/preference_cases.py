"""Golden cases of log-probabilities, preference losses and token rewards inside PPO."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_llm.losses import rto
from lit_llm.losses.head import Head
from lit_llm.losses.preference import (
    PreferenceTerms,
    dpo,
    ipo,
    kto,
    kto_baseline,
    mean_by_sequence,
    paired_kto,
    simpo,
    sum_by_sequence,
    tdpo1,
    tdpo2,
)
from lit_llm.losses.token_log_probs import token_log_probs, token_log_probs_with_kl
from tests.golden import released_masks
from tests.golden.golden import Case

_SUMS = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


def identity(vocabulary: int, dtype: torch.dtype) -> Head:
    """A frozen head whose hidden states are logits."""
    return Head(torch.eye(vocabulary, dtype=dtype))


def check_token_log_probs(case: Case) -> None:
    batch, mask_NL = released_masks.rows_of(
        case["in.input_ids"], case["in.attention_mask"], case["in.prompt_lens"].tolist()
    )
    logits_NLV = case["in.logits"]
    value_T = token_log_probs(logits_NLV[mask_NL], identity(logits_NLV.shape[-1], case.dtype), batch.target_T)
    num = len(logits_NLV)
    grid_NL = torch.zeros(mask_NL.shape, dtype=case.dtype)
    grid_NL[mask_NL] = value_T
    case.check("out.token_logps", grid_NL[:, :-1])
    case.check("out.loss_mask", mask_NL[:, :-1])
    case.check("out.logp_sum", sum_by_sequence(value_T, batch.sequence_T, num))
    case.check("out.logp_mean", mean_by_sequence(value_T, batch.sequence_T, num))


def check_dpo(case: Case) -> None:
    policy, reference = [case.leaf(f"in.{name}") for name in _SUMS[:2]], [case[f"in.{name}"] for name in _SUMS[2:]]
    terms = _released_choice(case)(*policy, *reference)
    case.check("out.per_pair_loss", terms.loss_N)
    margin_N = terms.chosen_reward_N - terms.rejected_reward_N
    case.check("out.margin", margin_N.mean())
    case.check("out.accuracy", (margin_N > 0).to(case.dtype).mean())
    _check_terms(case, terms, policy)


def check_dpo_from_logits(case: Case) -> None:
    lengths = case["in.prompt_lens"].tolist()
    batch, mask_NL = released_masks.rows_of(case["in.input_ids"], case["in.attention_mask"], lengths)
    num, pairs, loss = len(lengths), len(lengths) // 2, _released_choice(case)
    reference_N = sum_by_sequence(_log_probs(case["in.ref_logits"], mask_NL, batch), batch.sequence_T, num)
    for name in ("forward", "reverse"):
        logits_NLV = case.leaf("in.policy_logits")
        value_T = _log_probs(logits_NLV, mask_NL, batch)
        policy_N = sum_by_sequence(value_T, batch.sequence_T, num)
        roles = [slice(0, pairs), slice(pairs, num)][:: 1 if name == "forward" else -1]
        terms = loss(*(policy_N[role] for role in roles), *(reference_N[role] for role in roles))
        terms.loss_N.mean().backward()
        case.check(f"out.{name}_loss", terms.loss_N.mean())
        case.check(f"out.{name}_chosen_rewards", terms.chosen_reward_N)
        case.check(f"out.{name}_rejected_rewards", terms.rejected_reward_N)
        for side, role in zip(("chosen", "rejected"), roles, strict=True):
            case.check(f"out.{name}_{side}_logps", policy_N[role])
            case.check(f"out.{name}_ref_{side}_logps", reference_N[role])
        nll_N = -mean_by_sequence(value_T, batch.sequence_T, num)
        case.check(f"out.{name}_chosen_nll", nll_N[roles[0]].mean())
        case.check(f"out.{name}_accuracy", (terms.chosen_reward_N > terms.rejected_reward_N).to(case.dtype).mean())
        _check_gradient(case, f"out.{name}_grad_policy_logits", logits_NLV.grad)


def check_tdpo(case: Case) -> None:
    policy, reference = [case.leaf(f"in.{name}") for name in _SUMS[:2]], [case[f"in.{name}"] for name in _SUMS[2:]]
    kls = [case.leaf(f"in.{side}_seq_kl") for side in ("chosen", "rejected")]
    settings = {name: case.hparams[name] for name in ("beta", "label_smoothing")}
    if case.hparams["variant"] == 1:
        terms = tdpo1(*policy, *reference, *kls, **settings)
    else:
        terms = tdpo2(*policy, *reference, *kls, alpha=case.hparams["alpha"], **settings)
    _check_terms(case, terms, policy)
    for side, kl in zip(("chosen", "rejected"), kls, strict=True):
        _check_gradient(case, f"out.grad_{side}_kl", torch.zeros_like(kl) if kl.grad is None else kl.grad)


def check_sequence_kl(case: Case) -> None:
    assert case.hparams["direction"] == "ref||policy", "token-level DPO sums KL(reference || policy)"
    policy_NLV, reference_NLV = case["in.policy_logits"], case["in.ref_logits"]
    num, vocabulary = len(policy_NLV), policy_NLV.shape[-1]
    head, attention_NL, lengths = identity(vocabulary, case.dtype), case["in.attention_mask"], case["in.prompt_lens"]
    _, mask_NL = released_masks.rows_of(case["in.input_ids"], attention_NL, lengths.tolist())

    def summed(mask_NL: Tensor) -> Tensor:
        rows = policy_NLV[mask_NL], head, torch.zeros(int(mask_NL.sum()), dtype=torch.int64), reference_NLV[mask_NL]
        kl_T = token_log_probs_with_kl(*rows, head, chunk_size=5).kl_T
        return sum_by_sequence(kl_T, mask_NL.nonzero()[:, 0], num)

    case.check("out.seq_kl", summed(mask_NL))
    case.check("out.seq_kl_released", summed(_one_late(mask_NL)))


def check_simpo(case: Case) -> None:
    policy = [case.leaf(f"in.policy_{side}_mean_logps") for side in ("chosen", "rejected")]
    settings = {name: case.hparams[name] for name in ("beta", "gamma_beta_ratio", "label_smoothing")}
    _check_terms(case, simpo(*policy, **settings), policy)


def check_kto(case: Case) -> None:
    policy, reference = [case.leaf(f"in.{name}") for name in _SUMS[:2]], [case[f"in.{name}"] for name in _SUMS[2:]]
    settings = {name: case.hparams[name] for name in ("beta", "desirable_weight", "undesirable_weight")}
    baseline = kto_baseline(case["in.policy_kl_logps"], case["in.ref_kl_logps"])
    good = len(policy[0])
    desirable_N = torch.arange(good + len(policy[1])) < good
    terms = kto(torch.cat(policy), torch.cat(reference), desirable_N, baseline, **settings)
    terms.loss_N.mean().backward()
    case.check("out.loss", terms.loss_N.mean())
    case.check("out.kl", baseline)
    case.check("out.chosen_rewards", terms.reward_N[:good])
    case.check("out.rejected_rewards", terms.reward_N[good:])
    _check_gradient(case, "out.grad_policy_chosen", policy[0].grad)
    _check_gradient(case, "out.grad_policy_rejected", policy[1].grad)
    pairs = min(map(len, policy))
    # the released paired variant knows no weights
    paired = paired_kto(*(side[:pairs] for side in (*policy, *reference)), beta=case.hparams["beta"])
    case.check("out.paired_loss", paired.loss_N.mean())


def check_rto(case: Case) -> None:
    given, mask_BA = case.hparams, case["in.mask"].to(case.dtype)
    new_BA, new_values_BA = case.leaf("in.new_logps"), case.leaf("in.new_values")
    old_BA, reference_BA, old_values_BA = case["in.old_logps"], case["in.ref_logps"], case["in.old_values"]
    case.check("out.token_kl", rto.log_ratio(old_BA, reference_BA, mask_BA))
    reward_BA = rto.token_rewards(
        case["in.dpo_logps"],
        reference_BA,
        old_BA,
        mask_BA,
        beta=given["beta"],
        kl_coefficient=given["kl_coef"],
        clip=tuple(given["reward_clip"]),
    )
    case.check("out.token_reward", reward_BA)
    found = rto.advantages(reward_BA, old_values_BA, mask_BA, discount=given["gamma"], decay=given["lam"])
    case.check("out.advantages", found.advantage_BA)
    case.check("out.returns", found.return_BA)
    policy_BA = rto.clipped_policy_loss(new_BA, old_BA, found.advantage_BA, clip=given["clip"])
    value_BA = rto.clipped_value_loss(new_values_BA, old_values_BA, found.return_BA, clip=given["value_clip"])
    policy_loss, value_loss = (((loss * mask_BA).sum(1) / mask_BA.sum(1)).mean() for loss in (policy_BA, value_BA))
    (policy_loss + value_loss).backward()
    case.check("out.policy_loss", policy_loss)
    case.check("out.value_loss", value_loss)
    _check_gradient(case, "out.grad_new_logps", new_BA.grad)
    _check_gradient(case, "out.grad_new_values", new_values_BA.grad)


def _released_choice(case: Case) -> Callable[..., PreferenceTerms]:
    beta, smoothing = case.hparams["beta"], case.hparams["label_smoothing"]
    match case.hparams["loss_type"]:
        case "sigmoid":
            return lambda *sums: dpo(*sums, beta=beta, label_smoothing=smoothing)
        case "ipo":  # the released code smooths no labels here
            return lambda *sums: ipo(*sums, beta=beta)
        case other:
            raise KeyError(f"nobody compares a loss_type {other!r}")


def _log_probs(logits_NLV: Tensor, mask_NL: Tensor, batch) -> Tensor:
    return token_log_probs(
        logits_NLV[mask_NL], identity(logits_NLV.shape[-1], logits_NLV.dtype), batch.target_T, chunk_size=7
    )


def _one_late(mask_NL: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(mask_NL[:, :1]), mask_NL[:, :-1]], 1)


def _check_terms(case: Case, terms: PreferenceTerms, policy: list[Tensor]) -> None:
    terms.loss_N.mean().backward()
    case.check("out.loss", terms.loss_N.mean())
    case.check("out.chosen_rewards", terms.chosen_reward_N)
    case.check("out.rejected_rewards", terms.rejected_reward_N)
    _check_gradient(case, "out.grad_policy_chosen", policy[0].grad)
    _check_gradient(case, "out.grad_policy_rejected", policy[1].grad)


def _check_gradient(case: Case, name: str, gradient: Tensor) -> None:
    case.check(name, gradient, **case.gradient_tolerance(name))


HANDLERS = {
    "token_logps": check_token_log_probs,
    "dpo_loss": check_dpo,
    "dpo_full": check_dpo_from_logits,
    "tdpo_loss": check_tdpo,
    "sequence_kl": check_sequence_kl,
    "simpo_loss": check_simpo,
    "kto_loss": check_kto,
    "rto_ppo": check_rto,
}
