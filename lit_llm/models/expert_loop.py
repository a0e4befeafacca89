"""Experts one after the other, each on its own rows: the whole MLP of one while its numbers are still in the caches.

Every product is written where it belongs, so neither outputs nor the experts' gradients are joined afterwards. Of the forward
pass only the outputs of the first projections are kept; what the last one reads is formed again.

Shapes: n rows sorted by expert, m rows of one expert, E experts, H hidden size, F inner size, P first projections: 2 where one is
a gate for the other, else 1; their weights stand one above the other, I = PF.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_llm.models.activation_kernels import Activated, Activation
from lit_llm.models.dispatch import product_dtype


def loop_experts(
    x_nH: Tensor,
    in_EIH: Tensor,
    in_bias_EI: Tensor | None,
    out_EHF: Tensor,
    out_bias_EH: Tensor | None,
    counts: list[int],
    activation: Activation,
) -> Tensor:
    """(n, H) outputs of each row's expert; an expert without rows gets a gradient of zeros.

    Args:
        x_nH: sorted by expert.
        in_EIH: weights of the first projections.
        in_bias_EI: their biases, or None.
        out_EHF: weights of the last projection.
        out_bias_EH: their biases, or None.
        counts: rows of each expert.
        activation: of the first projection, which is then multiplied by the second where there is one; without parameters
            and chance.
    """
    dtype = product_dtype(in_EIH)
    tensors = [None if t is None else t.to(dtype) for t in (x_nH, in_EIH, in_bias_EI, out_EHF, out_bias_EH)]
    return _LoopExperts.apply(*tensors, counts, activation)


class _LoopExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_nH, in_EIH, in_bias_EI, out_EHF, out_bias_EH, counts, activation) -> Tensor:
        ctx.counts, ctx.activation = counts, activation
        y_nH = x_nH.new_empty(len(x_nH), out_EHF.shape[1])
        scratch_nF = _scratch(x_nH, counts, out_EHF)
        projected = []
        for e, (x_mH, y_mH) in enumerate(zip(x_nH.split(counts), y_nH.split(counts), strict=True)):
            weights = in_EIH[e].split(out_EHF.shape[2])
            biases = [None] * len(weights) if in_bias_EI is None else in_bias_EI[e].split(out_EHF.shape[2])
            parts = [_affine(x_mH, weight_FH, bias_F) for weight_FH, bias_F in zip(weights, biases, strict=True)]
            scratch_mF = scratch_nF[: len(x_mH)]
            activated = Activated(activation, parts[0], scratch_mF, with_gradient=False)
            hidden_mF = _hidden(activated.value_mF, parts[1:], scratch_mF)
            _affine(hidden_mF, out_EHF[e], None if out_bias_EH is None else out_bias_EH[e], out=y_mH)
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
        first_nF, second_nF = (_scratch(x_nH, ctx.counts, out_EHF) for _ in range(2))
        num_parts, end = len(projected) // len(in_EIH), 0
        for e, count in enumerate(ctx.counts):
            rows, end = slice(end, end + count), end + count
            grad_mH, parts = grad_nH[rows], projected[e * num_parts : (e + 1) * num_parts]
            activated = Activated(ctx.activation, parts[0], first_nF[:count], with_gradient=True)
            if grad_out_EHF is not None:
                torch.mm(grad_mH.T, _hidden(activated.value_mF, parts[1:], second_nF[:count]), out=grad_out_EHF[e])
            if grad_out_bias_EH is not None:
                torch.sum(grad_mH, 0, out=grad_out_bias_EH[e])
            if not any(wanted[:3]):
                continue
            grad_hidden_mF = torch.mm(grad_mH, out_EHF[e], out=second_nF[:count])
            grads = []
            if num_parts == 2:
                grads = [torch.mul(grad_hidden_mF, activated.value_mF, out=first_nF[:count])]
                grad_hidden_mF.mul_(parts[1])
            grads = [activated.gradient(grad_hidden_mF), *grads]
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


def _hidden(activated_mF: Tensor, second: list[Tensor], memory_mF: Tensor) -> Tensor:
    """What the last projection reads: the activated first projection, times the second where there is one."""
    return torch.mul(activated_mF, *second, out=memory_mF) if second else activated_mF


def _scratch(x_nH: Tensor, counts: list[int], out_EHF: Tensor) -> Tensor:
    """Rows of the inner size for the largest expert, used by one after the other: fresh memory costs a page fault a page."""
    return x_nH.new_empty(max(counts), out_EHF.shape[2])


def _empty(like: Tensor, wanted: bool) -> Tensor | None:
    return torch.empty_like(like, memory_format=torch.contiguous_format) if wanted else None
