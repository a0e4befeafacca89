"""Log-probabilities of given tokens, one per position and differentiable, without a tensor of [tokens, vocabulary].

A preference loss weighs a token's gradient by a number that is known only when its whole sequence has been summed, so
the gradient cannot be formed at once as in `chunks`. Two ways out: where the head is trained, the backward pass
forms the logits anew; where it is frozen, the forward pass keeps the gradient for a weight of one, which has the size of
the hidden states, and the backward pass only scales its rows.

Logits that are not finite carry no probability. A target at such a logit counts as a log-probability of about -10,000,
with no gradient at that logit.

Shapes: T tokens, C tokens of a chunk, D and E widths, V and W vocabularies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_llm.losses.chunks import automatic_chunk, walk_over_chunks
from lit_llm.losses.divergence import Divergence, at_least_float32, exclude_infinite_
from lit_llm.losses.head import Head
from lit_llm.losses.logit_gradient import Formed, divergence_gradient_, log_softmax_, softmax_

_KL = Divergence(name="forward_kl", temperature=1.0)


class LogProbsWithKL(NamedTuple):
    """Per token.

    Attributes:
        log_prob_T: log policy(target), differentiable.
        kl_T: KL(reference || policy) over the whole vocabulary, differentiable.
        reference_log_prob_T: log reference(target), detached.
    """

    log_prob_T: Tensor
    kl_T: Tensor
    reference_log_prob_T: Tensor


def token_log_probs(hidden_TD: Tensor, head: Head, target_T: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """log softmax(head(hidden))[target] of every row, (T,), in at least float32.

    Args:
        hidden_TD: last hidden states at the positions that predict the targets.
        head: trained, or detached.
        target_T: token ids.
        chunk_size: rows at a time; None chooses by the vocabulary.

    Raises:
        ValueError: rows and targets differ in number.
    """
    _same_rows(hidden=hidden_TD, target=target_T)
    return _apply(hidden_TD, head, target_T, None, chunk_size)[0]


@torch.no_grad()
def best_tokens(
    hidden_TD: Tensor, head: Head, target_T: Tensor, *, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The best token of every row, (T,), and log softmax(head(hidden))[target], (T,), from one product with the head.

    Arguments and errors as in `token_log_probs`.
    """
    _same_rows(hidden=hidden_TD, target=target_T)
    frozen, chunk_size = head.detach().in_compute_dtype(), chunk_size or automatic_chunk(head.num_rows)
    best, log_probs = [target_T[:0]], [at_least_float32(hidden_TD.new_zeros(0))]
    for hidden_CD, target_C in zip(hidden_TD.split(chunk_size), target_T.split(chunk_size), strict=True):
        if len(target_C):
            logits_CV = frozen(hidden_CD)
            best.append(logits_CV.argmax(-1))
            log_probs.append(log_prob_(logits_CV, target_C, False)[0])
    return torch.cat(best), torch.cat(log_probs)


def token_log_probs_with_kl(
    hidden_TD: Tensor,
    head: Head,
    target_T: Tensor,
    reference_TE: Tensor,
    reference_head: Head,
    *,
    chunk_size: int | None = None,
) -> LogProbsWithKL:
    """The same, with the divergence that token-level DPO sums along a response (arXiv 2404.11999).

    Log-probabilities are those of each model's whole head. The divergence compares the two over the shorter head where
    vocabularies of one tokenizer are padded to different lengths.

    Args:
        hidden_TD: the policy's hidden states.
        head: the policy's head, trained or detached.
        target_T: token ids.
        reference_TE: the reference's hidden states of the same positions; no gradient flows into them.
        reference_head: frozen.
        chunk_size: rows at a time; None chooses by the vocabularies.

    Raises:
        ValueError: numbers of rows differ.
    """
    _same_rows(hidden=hidden_TD, target=target_T, reference=reference_TE)
    reference_head = reference_head.detach().in_compute_dtype()
    return LogProbsWithKL(*_apply(hidden_TD, head, target_T, (reference_TE.detach(), reference_head), chunk_size))


def _apply(hidden_TD, head: Head, target_T, reference, chunk_size: int | None) -> tuple[Tensor, ...]:
    if chunk_size is None:
        chunk_size = automatic_chunk(head.num_rows + (0 if reference is None else 3 * reference[1].num_rows))
    if not torch.is_grad_enabled():
        hidden_TD, head = hidden_TD.detach(), head.detach()
    return _TokenLogProbs.apply(head, reference, chunk_size, target_T, hidden_TD, *head.parameters())


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, head, reference, chunk_size, target_T, hidden_TD, *parameters):
        frozen = head.detach().in_compute_dtype()
        unit = ctx.needs_input_grad[4] and not any(ctx.needs_input_grad[5:])
        values, gradients = [], []
        for start in range(0, len(target_T), chunk_size):
            span = slice(start, start + chunk_size)
            hidden_CD = hidden_TD[span].detach().requires_grad_(unit)
            with torch.set_grad_enabled(unit):
                logits_CV = frozen(hidden_CD)
            found, at = [], []
            if reference is not None:
                kl_C, reference_C, gradient_CV = _kl(logits_CV, target_T[span], reference[0][span], reference[1], unit)
                found, at = [kl_C, reference_C], [gradient_CV]
            log_prob_C, gradient_CV = log_prob_(logits_CV.detach(), target_T[span], unit)
            values.append([log_prob_C, *found])
            if unit:
                gradients.append([_carried_on(at_CV, logits_CV, hidden_CD) for at_CV in (gradient_CV, *at)])
        count = 1 if reference is None else 3
        results = [torch.cat(column) for column in zip(*values, strict=True)]
        results = results or [at_least_float32(hidden_TD.new_zeros(0)) for _ in range(count)]
        ctx.unit = unit
        units = [torch.cat(column) for column in zip(*gradients, strict=True)]
        device = hidden_TD.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.head, ctx.reference, ctx.chunk_size = head.detach(), reference, chunk_size
        ctx.save_for_backward(hidden_TD, target_T, *(units if unit else parameters))
        ctx.mark_non_differentiable(*results[2:])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *weights):
        hidden_TD, target_T, *rest = ctx.saved_tensors
        if ctx.unit:
            total_TD = torch.zeros_like(hidden_TD)
            for unit_TD, weight_T in zip(rest, weights, strict=False):
                total_TD += unit_TD * weight_T[:, None].to(unit_TD.dtype)
            return (None, None, None, None, total_TD, *(None for _ in ctx.needs_input_grad[5:]))
        wanted = ctx.needs_input_grad[4:]
        trained = [p.detach().requires_grad_(need) for p, need in zip(rest, wanted[1:], strict=True)]
        head = ctx.head._replace(weight_VD=trained[0], bias_V=(*trained, None)[1])
        extra = () if ctx.reference is None else (weights[1], ctx.reference[0])

        def chunk(rows: Sequence[Tensor], heads: Sequence) -> tuple[Formed, list[Tensor]]:
            hidden_CD, target_C, weight_C, *others = rows
            logits_CV, kl_gradient_CV = heads[0](hidden_CD), None
            if others:
                _, _, kl_gradient_CV = _kl(logits_CV, target_C, others[1], ctx.reference[1], True)
                kl_gradient_CV.mul_(others[0][:, None])
            _, gradient_CV = log_prob_(logits_CV.detach(), target_C, True, value=False)
            gradient_CV.mul_(weight_C[:, None])
            if kl_gradient_CV is not None:
                gradient_CV[:, : kl_gradient_CV.shape[1]] += kl_gradient_CV
            return Formed(weight_C.new_zeros(()), ((logits_CV, gradient_CV),)), []

        rows = (hidden_TD, target_T, weights[0], *extra)
        needs = (wanted[0], *(False for _ in rows[1:]), *wanted[1:])
        device, dtype, enabled = ctx.autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            walked = walk_over_chunks(chunk, rows, (head,), 0, ctx.chunk_size, needs)
        heads = [None if g is None else g.to(p.dtype) for g, p in zip(walked.heads, rest, strict=True)]
        return (None, None, None, None, walked.rows[0], *heads)


@torch.no_grad()
def log_prob_(
    logits_CV: Tensor, target_C: Tensor, wanted: bool, value: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """log softmax(z)[target], (C,), and onehot(target) - softmax(z), (C, V), in the logits' place."""
    logits_CV = at_least_float32(logits_CV)
    excluded_CV, target_C1 = exclude_infinite_(logits_CV), target_C[:, None]
    log_prob_C = None
    if value:
        logits_CV = log_softmax_(logits_CV)
        log_prob_C = logits_CV.gather(-1, target_C1).squeeze(-1)
    if not wanted:
        return log_prob_C, None
    gradient_CV = (logits_CV.exp_() if value else softmax_(logits_CV)).neg_()
    gradient_CV.scatter_add_(1, target_C1, gradient_CV.new_ones((len(target_C), 1)))
    if excluded_CV is not None:
        gradient_CV.masked_fill_(excluded_CV, 0.0)
    return log_prob_C, gradient_CV


@torch.no_grad()
def _kl(
    logits_CV: Tensor, target_C: Tensor, reference_CE: Tensor, reference_head: Head, wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """KL(reference || policy), (C,), log reference(target), (C,), and the gradient of the first, (C, min(V, W))."""
    shared = min(logits_CV.shape[1], reference_head.num_rows)
    policy_CS = at_least_float32(logits_CV.detach())[:, :shared].clone()
    reference_CW = reference_head.wide(reference_CE).to(policy_CS.dtype)
    excluded_CW = exclude_infinite_(reference_CW)
    reference_CW = log_softmax_(reference_CW)
    reference_C = reference_CW.gather(-1, target_C[:, None]).squeeze(-1)
    reference_CS = reference_CW[:, :shared]
    if excluded_CW is not None:
        reference_CS = reference_CS.masked_fill(excluded_CW[:, :shared], -torch.inf)
    exclude_infinite_(policy_CS, reference_CS)
    kl_C, gradient_CS = divergence_gradient_(_KL, policy_CS, reference_CS, wanted)
    return kl_C, reference_C, gradient_CS


def _carried_on(gradient_CV: Tensor, logits_CV: Tensor, hidden_CD: Tensor) -> Tensor:
    """A gradient at the logits, or at the first of their columns, as one at the hidden states."""
    missing = logits_CV.shape[1] - gradient_CV.shape[1]
    gradient_CV = torch.nn.functional.pad(gradient_CV, (0, missing)) if missing else gradient_CV
    return torch.autograd.grad(logits_CV, hidden_CD, gradient_CV.to(logits_CV.dtype), retain_graph=True)[0]


def _same_rows(**tensors: Tensor) -> None:
    counts = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            "Every hidden state needs its target, but there are " + ", ".join(f"{n} {k}" for k, n in counts.items())
        )
