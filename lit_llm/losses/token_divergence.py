"""A divergence from a frozen model's predictions, one value per position and differentiable, over a frozen head; alone, or
beside the log-probabilities of tokens at other positions, from one product with the head.

Where each position has a weight that is known only later, its gradient is kept for a weight of one, in the size of the
hidden states, and the backward pass only scales its rows.

Shapes: T positions, S positions that are compared, C positions of a chunk, D and E widths, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_llm.losses.chunks import automatic_chunk
from lit_llm.losses.divergence import Divergence, at_least_float32, exclude_infinite_
from lit_llm.losses.head import Head
from lit_llm.losses.logit_gradient import divergence_gradient_
from lit_llm.losses.token_log_probs import log_prob_


def token_divergence(
    hidden_TD: Tensor,
    head: Head,
    reference_TE: Tensor,
    reference_head: Head | None,
    divergence: Divergence,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """The divergence of every position, (T,), in at least float32; the hidden states get a gradient, the heads do not.

    Args:
        hidden_TD: of the model that is changed (the student, in the divergence's words).
        head: its head; taken as frozen.
        reference_TE: hidden states of the same positions that stay as they are (the teacher); or their logits, (T, V).
        reference_head: their head, with as many rows; None: `reference_TE` are logits.
        divergence: which; `reverse_kl` is KL(changed || reference).
        chunk_size: rows at a time; None chooses by the vocabulary.

    Raises:
        ValueError: numbers of rows or vocabularies differ.
    """
    reference_rows = reference_TE.shape[1] if reference_head is None else reference_head.num_rows
    if len(hidden_TD) != len(reference_TE) or head.num_rows != reference_rows:
        raise ValueError(
            f"{len(hidden_TD)} positions over {head.num_rows} tokens are compared with {len(reference_TE)} positions over "
            f"{reference_rows} tokens; both must agree."
        )
    if chunk_size is None:
        chunk_size = automatic_chunk(head.num_rows + reference_rows)
    frozen = head.detach().in_compute_dtype()
    reference_head = None if reference_head is None else reference_head.detach().in_compute_dtype()
    return _TokenDivergence.apply(hidden_TD, frozen, reference_TE.detach(), reference_head, divergence, chunk_size)


def log_probs_and_divergence(
    hidden_TD: Tensor,
    target_T: Tensor,
    hidden_SD: Tensor,
    reference_SV: Tensor,
    head: Head,
    divergence: Divergence,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_log_probs` of some positions, (T,), and `token_divergence` of others, (S,): the head is read once for both, which
    for few positions is most of the cost.

    Args:
        hidden_TD: at the positions that predict the targets.
        target_T: token ids.
        hidden_SD: at the positions that are compared.
        reference_SV: the logits that they are compared with.
        head: taken as frozen.
        divergence: which.
        chunk_size: rows at a time; None chooses by the vocabulary.

    Raises:
        ValueError: numbers of rows or vocabularies differ.
    """
    if len(hidden_TD) != len(target_T) or reference_SV.shape != (len(hidden_SD), head.num_rows):
        raise ValueError(
            f"{len(hidden_TD)} positions have {len(target_T)} targets, and {len(hidden_SD)} positions over {head.num_rows} tokens "
            f"are compared with logits of the shape {tuple(reference_SV.shape)}; both must agree."
        )
    if chunk_size is None:
        chunk_size = automatic_chunk(2 * head.num_rows)
    frozen, hidden_ND = head.detach().in_compute_dtype(), torch.cat([hidden_TD, hidden_SD])
    value_N = _LogProbsAndDivergence.apply(hidden_ND, frozen, target_T, reference_SV.detach(), divergence, chunk_size)
    return value_N[: len(target_T)], value_N[len(target_T) :]


class _KeptGradient(torch.autograd.Function):
    """Keeps the gradient of its first of six inputs for a weight of one; the backward pass scales its rows."""

    @staticmethod
    @once_differentiable
    def backward(ctx, weight_N):
        (unit_ND,) = ctx.saved_tensors
        return unit_ND * weight_N[:, None].to(unit_ND.dtype), None, None, None, None, None


class _LogProbsAndDivergence(_KeptGradient):
    @staticmethod
    def forward(ctx, hidden_ND, head, target_T, reference_SV, divergence, chunk_size):
        wanted, answers = ctx.needs_input_grad[0], len(target_T)
        values, units = [at_least_float32(hidden_ND.new_zeros(0))], [torch.zeros_like(hidden_ND[:0])]
        for start in range(0, len(hidden_ND), chunk_size):
            hidden_CD = hidden_ND[start : start + chunk_size].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits_CV = head(hidden_CD)
            kept_CV, first = at_least_float32(logits_CV.detach()), max(answers - start, 0)
            log_prob_C, of_answers_CV = log_prob_(kept_CV[:first], target_T[start : start + chunk_size], wanted)
            changed_CV, compared = kept_CV[first:].clone(), max(start - answers, 0)
            reference_CV = at_least_float32(reference_SV[compared : compared + len(changed_CV)].clone())
            exclude_infinite_(changed_CV, reference_CV)
            value_C, of_compared_CV = divergence_gradient_(divergence, changed_CV, reference_CV, wanted)
            values += [log_prob_C, value_C]
            if wanted:
                gradient_CV = torch.cat([of_answers_CV, of_compared_CV]).to(logits_CV.dtype)
                units.append(torch.autograd.grad(logits_CV, hidden_CD, gradient_CV)[0])
        ctx.save_for_backward(torch.cat(units))
        return torch.cat(values)


class _TokenDivergence(_KeptGradient):
    @staticmethod
    def forward(ctx, hidden_TD, head, reference_TE, reference_head, divergence, chunk_size):
        wanted = ctx.needs_input_grad[0]
        values, units = [at_least_float32(hidden_TD.new_zeros(0))], [torch.zeros_like(hidden_TD[:0])]
        for start in range(0, len(hidden_TD), chunk_size):
            span = slice(start, start + chunk_size)
            hidden_CD = hidden_TD[span].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits_CV = head(hidden_CD)
            changed_CV = at_least_float32(logits_CV.detach()).clone()
            given_CE = reference_TE[span]  # logits are copied: they are written over below
            reference_CV = at_least_float32(given_CE.clone() if reference_head is None else reference_head(given_CE))
            exclude_infinite_(changed_CV, reference_CV)
            value_C, gradient_CV = divergence_gradient_(divergence, changed_CV, reference_CV, wanted)
            values.append(value_C)
            if wanted:
                units.append(torch.autograd.grad(logits_CV, hidden_CD, gradient_CV.to(logits_CV.dtype))[0])
        ctx.save_for_backward(torch.cat(units))
        return torch.cat(values)
