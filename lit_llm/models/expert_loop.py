"""Experts one after the other, each on its own rows: the whole MLP of one while its numbers are still in the caches.

Every product is written where it belongs, so neither outputs nor the experts' gradients are joined afterwards. Of the forward
pass only the outputs of the first projections are kept; what the last one reads is formed again.

Shapes: n rows sorted by expert, m rows of one expert, E experts, H hidden size, F inner size, P first projections: 2 where one is
a gate for the other, else 1; their weights stand one above the other, I = PF.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_llm.models.dispatch import product_dtype

Activation = Callable[[list[Tensor]], Tensor]


def loop_experts(
    x_nH: Tensor,
    in_EIH: Tensor,
    in_bias_EI: Tensor | None,
    out_EHF: Tensor,
    out_bias_EH: Tensor | None,
    counts: list[int],
    hidden: Activation,
) -> Tensor:
    """(n, H) outputs of each row's expert; an expert without rows gets a gradient of zeros.

    Args:
        x_nH: sorted by expert.
        in_EIH: weights of the first projections.
        in_bias_EI: their biases, or None.
        out_EHF: weights of the last projection.
        out_bias_EH: their biases, or None.
        counts: rows of each expert.
        hidden: what the last projection reads, from what the first ones give; without parameters and chance.
    """
    dtype = product_dtype(in_EIH)
    tensors = [None if t is None else t.to(dtype) for t in (x_nH, in_EIH, in_bias_EI, out_EHF, out_bias_EH)]
    return _LoopExperts.apply(*tensors, counts, hidden)


class _LoopExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_nH, in_EIH, in_bias_EI, out_EHF, out_bias_EH, counts, hidden) -> Tensor:
        ctx.counts, ctx.hidden = counts, hidden
        y_nH = x_nH.new_empty(len(x_nH), out_EHF.shape[1])
        projected = []
        for e, (x_mH, y_mH) in enumerate(zip(x_nH.split(counts), y_nH.split(counts), strict=True)):
            weights = in_EIH[e].split(out_EHF.shape[2])
            biases = [None] * len(weights) if in_bias_EI is None else in_bias_EI[e].split(out_EHF.shape[2])
            parts = [_affine(x_mH, weight_FH, bias_F) for weight_FH, bias_F in zip(weights, biases, strict=True)]
            _affine(hidden(parts), out_EHF[e], None if out_bias_EH is None else out_bias_EH[e], out=y_mH)
            projected += parts
        ctx.save_for_backward(x_nH, in_EIH, out_EHF, *projected)
        return y_nH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nH: Tensor):
        x_nH, in_EIH, out_EHF, *projected = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad_x_nH, grad_in_EIH = _empty(x_nH, wanted[0]), _empty(in_EIH, wanted[1])
        grad_in_bias_EI = _empty(in_EIH[..., 0], wanted[2])
        grad_out_EHF, grad_out_bias_EH = _empty(out_EHF, wanted[3]), _empty(out_EHF[..., 0], wanted[4])
        num_parts, end = len(projected) // len(in_EIH), 0
        for e, count in enumerate(ctx.counts):
            rows, end = slice(end, end + count), end + count
            grad_mH = grad_nH[rows]
            with torch.enable_grad():
                parts = [part.detach().requires_grad_() for part in projected[e * num_parts : (e + 1) * num_parts]]
                hidden_mF = ctx.hidden(parts)
            if grad_out_EHF is not None:
                torch.mm(grad_mH.T, hidden_mF.detach(), out=grad_out_EHF[e])
            if grad_out_bias_EH is not None:
                torch.sum(grad_mH, 0, out=grad_out_bias_EH[e])
            if not any(wanted[:3]):
                continue
            grads = torch.autograd.grad(hidden_mF, parts, grad_mH @ out_EHF[e])
            for number, grad_mF in enumerate(grads):
                place = slice(number * grad_mF.shape[1], (number + 1) * grad_mF.shape[1])
                if grad_in_EIH is not None:
                    torch.mm(grad_mF.T, x_nH[rows], out=grad_in_EIH[e, place])
                if grad_in_bias_EI is not None:
                    torch.sum(grad_mF, 0, out=grad_in_bias_EI[e, place])
                if grad_x_nH is not None:
                    sum_mH = grad_x_nH[rows]
                    torch.addmm(sum_mH, grad_mF, in_EIH[e, place], beta=int(number > 0), out=sum_mH)
        return grad_x_nH, grad_in_EIH, grad_in_bias_EI, grad_out_EHF, grad_out_bias_EH, None, None


def _affine(x_mI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out: Tensor | None = None) -> Tensor:
    if bias_O is None:
        return torch.mm(x_mI, weight_OI.T, out=out)
    return torch.addmm(bias_O, x_mI, weight_OI.T, out=out)


def _empty(like: Tensor, wanted: bool) -> Tensor | None:
    return torch.empty_like(like, memory_format=torch.contiguous_format) if wanted else None
