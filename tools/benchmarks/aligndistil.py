"""Contenders of the suite `aligndistil`: a policy and two frozen models of its size, adaptive extrapolation.

The released formula takes softmax, distance, combination and KL on whole logits in float32, prompts and padding
included, and masks at the end. `loss` contenders get the hidden states of all three models and differentiate with
respect to those of the policy and its head; `answers only` is the same formula after dropping what the mask leaves out.

Shapes: B sequences, L positions, T supervised tokens, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax, softmax

from benchmarks.workload import IGNORED, Step, Workload, parameters
from lit_llm.losses.adaptive_policy import AdaptivePolicy, adaptive_policy, sample_weights
from lit_llm.losses.head import Head

SETTINGS = AdaptivePolicy(rule="adaptive_extrapolation", dpo_beta=0.1, slope=20.0)


def plain(work: Workload, _: str | None) -> Step:
    """Textbook PyTorch: three models in full, the released formula, automatic differentiation."""
    frozen, mask_BL = _frozen(work), work.labels_BL.ne(IGNORED)

    def loss() -> Tensor:
        policy_BLV = work.student(input_ids=work.ids_BL).logits
        with torch.no_grad():
            dpo_BLV, other_BLV = (model(input_ids=work.ids_BL).logits for model in frozen)
        total = _formula(policy_BLV, dpo_BLV, other_BLV, mask_BL)
        total.backward()
        return total.detach()

    return Step(loss, parameters(work.student))


def plain_loss(work: Workload, _: str | None) -> Step:
    """The released formula, given hidden states of all positions."""
    (policy_BLD, *frozen_BLD), heads = _hidden_and_heads(work)
    mask_BL = work.labels_BL.ne(IGNORED)

    def loss() -> Tensor:
        policy_BLV = linear(policy_BLD, heads[0])
        with torch.no_grad():
            dpo_BLV, other_BLV = (linear(*pair) for pair in zip(frozen_BLD, heads[1:], strict=True))
        total = _formula(policy_BLV, dpo_BLV, other_BLV, mask_BL)
        total.backward()
        return total.detach()

    return Step(loss, [policy_BLD, heads[0]])


def plain_loss_of_answers(work: Workload, _: str | None) -> Step:
    """The released formula on the positions that count, given hidden states; all answers have one length here."""
    hidden, heads = _hidden_and_heads(work)
    sequences, rows = work.setting.sequences, work.tokens.position_T
    mask_BL = torch.ones(sequences, len(rows) // sequences, dtype=torch.bool, device=rows.device)

    def loss() -> Tensor:
        def logits(side: int) -> Tensor:
            return linear(hidden[side].flatten(0, 1)[rows], heads[side]).unflatten(0, mask_BL.shape)

        policy_BLV = logits(0)
        with torch.no_grad():
            dpo_BLV, other_BLV = logits(1), logits(2)
        total = _formula(policy_BLV, dpo_BLV, other_BLV, mask_BL)
        total.backward()
        return total.detach()

    return Step(loss, [hidden[0], heads[0]])


def fused(work: Workload, _: str | None) -> Step:
    """lit_llm."""
    return _ours(work, stored=False)


def store(work: Workload, _: str | None) -> Step:
    """lit_llm with the frozen models' hidden states at hand, as from a teacher store."""
    return _ours(work, stored=True)


def fused_loss(work: Workload, _: str | None) -> Step:
    """lit_llm's loss, given hidden states of all positions."""
    hidden, heads = _hidden_and_heads(work)
    weight_T, rows = _weights(work), work.tokens.position_T

    def loss() -> Tensor:
        rows_TD = (side.flatten(0, 1)[rows] for side in hidden)
        pairs = [item for pair in zip(rows_TD, map(Head, heads), strict=True) for item in pair]
        terms = adaptive_policy(*pairs, SETTINGS, weight_T)
        terms.loss.backward()
        return terms.loss.detach()

    return Step(loss, [hidden[0], heads[0]])


def _ours(work: Workload, stored: bool) -> Step:
    policy, *frozen = work.as_language_models(work.student, *_frozen(work))
    weight_T = _weights(work)
    with torch.no_grad():
        stored_TD = [model.hidden(work.tokens) for model in frozen] if stored else None

    def loss() -> Tensor:
        with torch.no_grad():
            frozen_TD = stored_TD or [model.hidden(work.tokens) for model in frozen]
        models = zip((policy.hidden(work.tokens), *frozen_TD), (policy, *frozen), strict=True)
        pairs = [item for hidden_TD, model in models for item in (hidden_TD, model.head)]
        terms = adaptive_policy(*pairs, SETTINGS, weight_T)
        terms.loss.backward()
        return terms.loss.detach()

    return Step(loss, parameters(work.student))


def _formula(policy_BLV: Tensor, dpo_BLV: Tensor, other_BLV: Tensor, mask_BL: Tensor) -> Tensor:
    """The released loss: mean over samples of the mean over counted positions of beta_t KL(policy || combined)."""
    policy_BLV, dpo_BLV, other_BLV = (side.float() for side in (policy_BLV, dpo_BLV, other_BLV))
    with torch.no_grad():
        l1_BL = (softmax(dpo_BLV, -1) - softmax(other_BLV, -1)).abs().sum(-1)
        alpha_BL = SETTINGS.slope / 2 * l1_BL + SETTINGS.floor
        teacher_BLV = log_softmax(dpo_BLV + alpha_BL[..., None] * (dpo_BLV - other_BLV), -1)
    log_q_BLV = log_softmax(policy_BLV, -1)
    kl_BL = (log_q_BLV.exp() * (log_q_BLV - teacher_BLV)).sum(-1)
    per_sample_B = (SETTINGS.dpo_beta / alpha_BL * kl_BL * mask_BL).sum(-1) / mask_BL.sum(-1)
    return per_sample_B.mean()


def _frozen(work: Workload) -> list[nn.Module]:
    """The DPO and the reverse-DPO model; the larger teacher of the other suites is not needed."""
    work.teacher = None
    return [work.frozen_like_student(seed) for seed in (4, 5)]


def _hidden_and_heads(work: Workload) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states of all positions and heads of policy, DPO and reverse-DPO model; the bodies are let go."""
    models = [work.student, *_frozen(work)]
    with torch.no_grad():
        hidden = [model.base_model(input_ids=work.ids_BL).last_hidden_state.clone() for model in models]
    heads = [model.lm_head.weight for model in models]
    for model in models:
        model.base_model.layers = nn.ModuleList()
    hidden[0] = nn.Parameter(hidden[0])
    return hidden, heads


def _weights(work: Workload) -> Tensor:
    found = sample_weights(work.tokens.sequence_T, work.setting.sequences)
    return found.weight_T / found.count


# name: (contender, gate, needs)
CONTENDERS = {
    "lit_llm": (fused, "step", None),
    "lit_llm store": (store, "step", None),
    "plain PyTorch": (plain, "step", None),
    "lit_llm loss": (fused_loss, "loss", None),
    "plain loss, answers only": (plain_loss_of_answers, "loss", None),
    "plain loss": (plain_loss, "loss", None),
}
