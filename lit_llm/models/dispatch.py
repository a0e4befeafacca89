"""Which rows go to which expert: tokens sorted by expert, gathered, and summed back with their weights.

Only routed rows are computed. Gathering and summing back know that each slot of a token is in one place, so on a GPU both
directions of both are reads: nothing is added atomically, and results are the same in every run. A CPU adds row after row.

Experts lie in stacks (expert 0 alone, then one stack per expansion). The slots of a stack are one stretch of the sorted
slots, a `Segment`. On a CPU its length is known and exact. On a GPU, where reading it would wait for the device, it is a
stretch of fixed length that is large enough, whose tail nobody reads.

Shapes: M tokens, k slots per token, S = Mk slots, N experts of a layer, n rows of a segment, E experts of a stack, H
hidden size, I and O input and output width of a projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Dispatch = Literal["auto", "grouped", "loop"]


@dataclass(frozen=True)
class Segment:
    """The rows of one stack of experts.

    Args:
        token_n: which token each row is.
        slot_n: which slot (token times k plus rank) each row is.
        position_Mk: the row of each slot, wherever `inside_Mk`; any valid row elsewhere. None: `in_order`.
        inside_Mk: slots that belong to this stack. None: `in_order`.
        ends_E: int32, where the rows of each expert end; rows beyond the last have no meaning.
        counts: rows of each expert; None where the host does not know them.
    """

    token_n: Tensor
    slot_n: Tensor
    position_Mk: Tensor | None
    inside_Mk: Tensor | None
    ends_E: Tensor
    counts: list[int] | None

    @property
    def in_order(self) -> bool:
        """Whether each row is a slot of this stack, and rows are added to their tokens one after the other: on a CPU."""
        return self.position_Mk is None


def gather(x_MH: Tensor, parts: list[Segment]) -> tuple[Tensor, ...]:
    """(n, H) rows of the tokens of every segment."""
    return _Gather.apply(x_MH, parts)


def combine(ys_nH: list[Tensor], gate_Mk: Tensor, parts: list[Segment]) -> Tensor:
    """(M, H) sum over slots of gate times the slot's row, in the wider of both types.

    Args:
        ys_nH: rows of every segment.
        gate_Mk: of every slot; of one in no segment it is not read.
        parts: the segments.
    """
    return _Combine.apply(gate_Mk, parts, *ys_nH)


def segments(expert_Mk: Tensor, stacks: list[int], on_host: bool) -> list[Segment]:
    """Sort slots by expert and cut them at the borders of the stacks.

    Args:
        expert_Mk: expert of each slot; a number from the sum of `stacks` on means that the slot is not computed.
        stacks: numbers of experts, in order; the first is expert 0 alone, which a token can choose once.
        on_host: read the counts, so that segments have exactly the rows that they need.
    """
    num_tokens, k = expert_Mk.shape
    expert_S = expert_Mk.flatten()
    order_S = torch.argsort(expert_S, stable=True)
    in_order = on_host and expert_S.device.type == "cpu"  # a GPU would add atomically
    place_Mk = None if in_order else torch.argsort(order_S).view(num_tokens, k)
    numbers_N = torch.arange(sum(stacks), device=expert_S.device)
    ends_N = torch.searchsorted(expert_S[order_S], numbers_N, right=True)
    known = ends_N.tolist() if on_host else None
    found, first = [], 0
    for index, count in enumerate(stacks):
        last = first + count
        if known is not None:
            start = known[first - 1] if first else 0
            slot_n = order_S[start : known[last - 1]]
            counts = [end - begin for begin, end in zip([start, *known[first:]], known[first:last])]
        else:
            start = ends_N[first - 1] if first else 0
            length = num_tokens if index == 0 else num_tokens * k
            slot_n = order_S[(torch.arange(length, device=order_S.device) + start) % max(len(order_S), 1)]
            counts = None
        ends_E = (ends_N[first:last] - start).to(torch.int32)
        position_Mk = inside_Mk = None
        if not in_order:
            position_Mk = place_Mk - start
            inside_Mk = (position_Mk >= 0) & (position_Mk < ends_E[-1])
            position_Mk = position_Mk.clamp(0, max(len(slot_n) - 1, 0))
        found.append(Segment(slot_n // k, slot_n, position_Mk, inside_Mk, ends_E, counts))
        first = last
    return found


def grouped_product(x_nI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, ends_E: Tensor) -> Tensor:
    """(n, O) rows times the weight of their expert, in one product; rows beyond the last end have no meaning."""
    dtype = product_dtype(weight_EOI)
    y_nO = F.grouped_mm(x_nI.to(dtype), weight_EOI.to(dtype).transpose(-2, -1), offs=ends_E)
    if bias_EO is None:
        return y_nO
    row_n = torch.arange(len(x_nI), device=ends_E.device)[:, None]
    starts_E = F.pad(ends_E, (1, 0))[:-1]
    mine_nE = (row_n >= starts_E) & (row_n < ends_E)
    # a product with zeros and ones: its gradient adds up in a fixed order
    bias_nO = mine_nE.to(dtype) @ bias_EO.to(dtype)
    return y_nO + torch.where(row_n < ends_E[-1], bias_nO, 0.0)  # no gradient from meaningless rows


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Of products with this tensor: that of autocast, of which the products here know nothing themselves, or its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def backend(wanted: Dispatch, dtype: torch.dtype, device: torch.device, widths: tuple[int, ...]) -> str:
    """`grouped` or `loop`: what is wanted, or for `auto` the loop on a CPU, elsewhere the grouped product where it works.

    Args:
        dtype: of the product.
        widths: lengths of the rows that enter or leave products.

    Raises:
        ValueError: `grouped` is wanted and does not work here.
    """
    if wanted == "loop" or (wanted == "auto" and device.type == "cpu"):
        return "loop"
    obstacle = _obstacle(dtype, device, widths)
    if wanted == "grouped" and obstacle is not None:
        raise ValueError(f"dispatch is 'grouped', but {obstacle}. Set it to 'auto' or 'loop'.")
    chosen = "grouped" if obstacle is None else "loop"
    _tell_once(chosen, device.type, str(dtype), obstacle)
    return chosen


def _obstacle(dtype: torch.dtype, device: torch.device, widths: tuple[int, ...]) -> str | None:
    """Why grouped products cannot be used, or None."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped products do not take {dtype}"
    odd = [width for width in widths if width * dtype.itemsize % 16]
    if odd:
        return f"rows of {odd[0]} numbers in {dtype} are no multiple of 16 bytes long"
    return _failed_self_test(dtype, device)


@lru_cache
def _failed_self_test(dtype: torch.dtype, device: torch.device) -> str | None:
    """Three experts, the second without rows, and a tail beyond the last: values and gradients against plain products."""
    numbers = torch.arange(8 * 16 + 3 * 16 * 16, dtype=torch.float32).mul(0.7).sin().to(device, dtype)
    ends = torch.tensor([3, 3, 6], dtype=torch.int32, device=device)
    # checkpointing of activations counts what is saved in the forward pass, and a recomputation makes no test
    unseen = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), unseen:
        x = numbers[: 8 * 16].view(8, 16).clone().requires_grad_()
        weight = numbers[8 * 16 :].view(3, 16, 16).clone().requires_grad_()
        try:
            y = F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
            cotangent = torch.ones_like(y)
            cotangent[6:] = float("nan")
            x_grad, weight_grad = torch.autograd.grad(y, (x, weight), cotangent)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            return f"grouped products fail on {device}: {str(error).splitlines()[0]}"
        x_wide, weight_wide = x.detach().float(), weight.detach().float()
        true_y = torch.cat([x_wide[:3] @ weight_wide[0].T, x_wide[3:6] @ weight_wide[2].T])
        true_x = torch.cat([weight_wide[0].sum(0).expand(3, -1), weight_wide[2].sum(0).expand(3, -1)])
        true_weight = torch.stack([x_wide[:3].sum(0), torch.zeros_like(x_wide[0]), x_wide[3:6].sum(0)])
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        pairs = ((y[:6], true_y), (x_grad[:6], true_x), (weight_grad, true_weight[:, None].expand(3, 16, 16)))
        right = all(torch.allclose(ours.float(), true, rtol=tolerance, atol=tolerance) for ours, true in pairs)
    if not right or weight_grad[1].any():
        return f"grouped products give wrong values or gradients for {dtype} on {device}"
    return None


@lru_cache
def _tell_once(chosen: str, device: str, dtype: str, obstacle: str | None) -> None:
    from lightning.pytorch.utilities import rank_zero_info

    why = "" if obstacle is None else f", because {obstacle}"
    rank_zero_info(f"Experts on {device} in {dtype}: {chosen} products{why}.")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MH: Tensor, parts: list[Segment]) -> tuple[Tensor, ...]:
        ctx.parts, ctx.num_tokens = parts, len(x_MH)
        return tuple(x_MH[part.token_n] for part in parts)

    @staticmethod
    def backward(ctx, *grads_nH: Tensor):
        grad_MH = grads_nH[0].new_zeros(ctx.num_tokens, grads_nH[0].shape[1])
        for part, grad_nH in zip(ctx.parts, grads_nH, strict=True):
            if part.in_order:
                grad_MH.index_add_(0, part.token_n, grad_nH)
            elif len(grad_nH):
                for rank in range(part.inside_Mk.shape[1]):
                    rows_MH = grad_nH[part.position_Mk[:, rank]]
                    grad_MH += torch.where(part.inside_Mk[:, rank, None], rows_MH, 0.0)
        return grad_MH, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_Mk: Tensor, parts: list[Segment], *ys_nH: Tensor) -> Tensor:
        ctx.parts = parts
        ctx.save_for_backward(gate_Mk, *ys_nH)
        wide = torch.promote_types(ys_nH[0].dtype, gate_Mk.dtype)
        sum_MH = gate_Mk.new_zeros(len(gate_Mk), ys_nH[0].shape[1], dtype=wide)
        for part, y_nH in zip(parts, ys_nH, strict=True):
            if part.in_order:
                sum_MH.index_add_(0, part.token_n, y_nH * gate_Mk.flatten()[part.slot_n][:, None])
            elif len(y_nH):
                for rank in range(gate_Mk.shape[1]):
                    rows_MH = y_nH[part.position_Mk[:, rank]] * gate_Mk[:, rank, None]
                    sum_MH += torch.where(part.inside_Mk[:, rank, None], rows_MH, 0.0)
        return sum_MH

    @staticmethod
    def backward(ctx, grad_MH: Tensor):
        gate_Mk, *ys_nH = ctx.saved_tensors
        wanted_gate, _, *wanted_ys = ctx.needs_input_grad
        grad_gate_Mk = torch.zeros_like(gate_Mk) if wanted_gate else None
        grads_nH = []
        for part, y_nH, wanted in zip(ctx.parts, ys_nH, wanted_ys, strict=True):
            grad_nH = grad_MH[part.token_n] if wanted or part.in_order else None
            if grad_gate_Mk is not None:
                _add_gate_gradients(grad_gate_Mk, part, y_nH, grad_MH, grad_nH)
            if wanted:
                grad_nH = grad_nH.mul_(gate_Mk.flatten()[part.slot_n][:, None])
                if not part.in_order:  # the rows behind the last have no meaning
                    inside_n = torch.arange(len(y_nH), device=y_nH.device) < part.ends_E[-1]
                    grad_nH = torch.where(inside_n[:, None], grad_nH, 0.0)
                grad_nH = grad_nH.to(y_nH.dtype)
            grads_nH.append(grad_nH if wanted else None)
        return grad_gate_Mk, None, *grads_nH


def _add_gate_gradients(
    grad_gate_Mk: Tensor, part: Segment, y_nH: Tensor, grad_MH: Tensor, grad_nH: Tensor | None
) -> None:
    """Those of the segment's slots, whose gradients are zero so far; `grad_nH` is the gradient of each row's token."""
    if part.in_order:
        grad_gate_Mk.view(-1)[part.slot_n] = (y_nH * grad_nH).sum(-1).to(grad_gate_Mk.dtype)
    elif len(y_nH):
        for rank in range(grad_gate_Mk.shape[1]):
            dot_M = (y_nH[part.position_Mk[:, rank]] * grad_MH).sum(-1)
            grad_gate_Mk[:, rank] += torch.where(part.inside_Mk[:, rank], dot_M, 0.0)
