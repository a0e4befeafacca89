"""A loss over all tokens as a sum over chunks of tokens, differentiated chunk by chunk.

No tensor of [tokens, vocabulary] outlives a chunk, and nothing is recomputed: each chunk is differentiated at once, and
leaves behind gradients of the size of the hidden states and of the heads.

Shapes: T rows (supervised tokens), C rows of a chunk, D width, V vocabulary, K summed quantities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_llm.losses.head import ChunkLinear, Head
from lit_llm.losses.logit_gradient import Formed

_CHUNK_BYTES = 512 * 2**20
_BYTES_PER_LOGIT = 12  # of each head: its logits, and half of what is formed from both in between


def automatic_chunk(logits_per_row: int, num_rows: int | None = None) -> int:
    """Rows of a chunk whose logits and gradients fit in about 512 MB, at least 16; chunks of equal size for `num_rows`."""
    fitting = max(16, _CHUNK_BYTES // (logits_per_row * _BYTES_PER_LOGIT))
    if not num_rows:
        return fitting
    return math.ceil(num_rows / math.ceil(num_rows / fitting))


def sum_over_chunks(
    function: Callable[[Sequence[Tensor], Sequence[Head]], tuple[Tensor | Formed, list[Tensor]]],
    rows: Sequence[Tensor],
    heads: Sequence[Head],
    num_sums: int,
    chunk_size: int | None = None,
    extra_logits: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """Add up a loss over chunks of rows, forming the gradients on the way.

    Args:
        function: from the rows of one chunk and the heads to (weighted loss, list of K sums). The loss is a tensor, which
            is differentiated, or `Formed`. What the function closes over gets no gradient.
        rows: tensors that are cut alike; the first is the longest, shorter ones run out early. Floating ones that
            require gradients receive them.
        heads: output heads; parameters that require gradients receive them, accumulated in at least float32. Detached
            heads may as well be closed over.
        num_sums: K.
        chunk_size: rows at a time; None chooses by the heads.
        extra_logits: logits per row that `function` makes beside those of `heads`, for the automatic size.

    Returns:
        The loss (differentiable with respect to rows and heads) and the K detached sums.
    """
    if chunk_size is None:
        chunk_size = automatic_chunk(sum(head.num_rows for head in heads) + extra_logits, len(rows[0]))
    if not torch.is_grad_enabled():
        rows, heads = [row.detach() for row in rows], [head.detach() for head in heads]
    flat = [parameter for head in heads for parameter in head.parameters()]
    results = _SumOverChunks.apply(function, tuple(heads), num_sums, chunk_size, len(rows), *rows, *flat)
    return results[0], list(results[1:])


class Walked(NamedTuple):
    """What a walk over chunks leaves behind.

    Attributes:
        totals: (1 + K,) the loss and the sums.
        rows: a gradient for each tensor of rows, None where none was wanted.
        heads: likewise for the parameters of the heads, in order, in at least float32.
    """

    totals: Tensor
    rows: list[Tensor | None]
    heads: list[Tensor | None]


def walk_over_chunks(
    function: Callable[[Sequence[Tensor], Sequence[Head]], tuple[Tensor | Formed, list[Tensor]]],
    rows: Sequence[Tensor],
    heads: Sequence[Head],
    num_sums: int,
    chunk_size: int,
    wanted: Sequence[bool],
) -> Walked:
    """The work of `sum_over_chunks`, for an autograd function of one's own.

    Args:
        function: see `sum_over_chunks`; so are the next three.
        rows: tensors that are cut alike.
        heads: output heads; those whose parameters require gradients receive them.
        num_sums: K.
        chunk_size: rows at a time.
        wanted: for each tensor of rows whether its gradient is; then for each parameter of the heads.
    """
    row_gradients = [torch.zeros_like(row) if need else None for row, need in zip(rows, wanted, strict=False)]
    live = [_LiveHead(head) for head in heads]
    tensors = (*rows, *(parameter for head in heads for parameter in head.parameters()))
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    totals = torch.zeros(1 + num_sums, dtype=dtype, device=rows[0].device)
    for start in range(0, rows[0].shape[0], chunk_size):
        span = slice(start, start + chunk_size)
        with torch.set_grad_enabled(any(wanted)):
            pieces = [row[span].detach().requires_grad_(need) for row, need in zip(rows, wanted, strict=False)]
            loss, sums = function(pieces, live)
        totals += torch.stack([value.detach().to(dtype) for value in (_value(loss), *sums)])
        if isinstance(loss, Formed) or loss.requires_grad:
            loss.backward(inputs=[t for t in (*pieces, *(head.trigger for head in live)) if t.requires_grad])
        for piece, gradient in zip(pieces, row_gradients, strict=True):
            if piece.grad is not None:
                gradient[span] = piece.grad
    return Walked(totals, row_gradients, [gradient for head in live for gradient in head.gradients()])


class _SumOverChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, heads, num_sums, chunk_size, num_rows, *tensors):
        rows, wanted = tensors[:num_rows], ctx.needs_input_grad[5:]
        walked = walk_over_chunks(function, rows, heads, num_sums, chunk_size, wanted)
        ctx.save_for_backward(*walked.rows, *walked.heads)
        ctx.dtypes = [t.dtype for t in tensors]
        results = walked.totals.unbind()
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        # asking for the value is free where it need not be waited for, and spares a copy of the head's gradient
        as_it_is = grad_loss.device.type == "cpu" and grad_loss == 1
        gradients = [
            None if gradient is None else (gradient if as_it_is else gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (None, None, None, None, None, *gradients)


class _LiveHead:
    """A head within a chunk: called like a `Head`, it adds up its own gradient where one is wanted."""

    def __init__(self, head: Head) -> None:
        self.head = head.detach().in_compute_dtype()
        self.num_rows = head.num_rows
        self.trained = [parameter if parameter.requires_grad else None for parameter in head.parameters()]
        self.totals: list[Tensor | None] = [None] * len(self.trained)
        # frozen hidden states alone would not call for a backward pass
        wanted = any(parameter is not None for parameter in self.trained)
        self.trigger = torch.zeros((), device=self.head.weight_VD.device, requires_grad=wanted)

    def __call__(self, hidden_CD: Tensor) -> Tensor:
        if not self.trigger.requires_grad:
            return self.head.chunk(hidden_CD, "student")
        hidden_CD = hidden_CD.to(self.head.weight_VD.dtype)
        return self.head.shaped(
            ChunkLinear.apply(hidden_CD, self.trigger, self.head.weight_VD, self.head.bias_V, self, "student")
        )

    def add(self, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
        """Add what a chunk contributes to the gradients of weight and bias."""
        weight_VD, bias_V = (*self.trained, None)[:2]
        if weight_VD is not None:
            dtype, total_VD = _accumulator(weight_VD), self.totals[0]
            if total_VD is None and gradient_CV.dtype == dtype:
                self.totals[0] = gradient_CV.T @ hidden_CD
            elif total_VD is not None and gradient_CV.dtype == dtype:
                total_VD.addmm_(gradient_CV.T, hidden_CD)
            else:
                self.totals[0] = _sum(total_VD, (gradient_CV.T @ hidden_CD).to(dtype))
        if bias_V is not None:
            self.totals[1] = _sum(self.totals[1], gradient_CV.sum(0, dtype=_accumulator(bias_V)))

    def gradients(self) -> list[Tensor | None]:
        return [
            torch.zeros_like(parameter) if parameter is not None and total is None else total
            for parameter, total in zip(self.trained, self.totals, strict=True)
        ]


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _value(loss: Tensor | Formed) -> Tensor:
    return loss.value if isinstance(loss, Formed) else loss


def _accumulator(parameter: Tensor) -> torch.dtype:
    return parameter.dtype if parameter.dtype == torch.float64 else torch.float32
