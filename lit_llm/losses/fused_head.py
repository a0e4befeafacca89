"""Output head and loss together, by chunks of tokens; the gradient is formed in the forward pass.

No tensor of [tokens, vocabulary] outlives a chunk, and nothing is recomputed: each chunk is differentiated at once, at
its logits in closed form (`logit_gradient`), and leaves behind gradients of the size of the hidden states and of the
heads.

Shapes: T rows (supervised tokens), C rows of a chunk, D and E widths, V and W vocabularies, K summed quantities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lit_llm.losses.divergence import Divergence, all_finite, at_least_float32
from lit_llm.losses.logit_gradient import Formed, token_terms

_CHUNK_BYTES = 512 * 2**20
_BYTES_PER_LOGIT = 24
_WIDENED_ROWS = 8192


class Head(NamedTuple):
    """An output head as tensors: hidden states to logits.

    Attributes:
        weight_VD: one row per token.
        bias_V: added, where the architecture has one.
        softcap: logits are softcap * tanh(logits / softcap), as in Gemma 2.
        scale: logits are multiplied by it, before the cap.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __call__(self, hidden_TD: Tensor) -> Tensor:
        """(T, D) -> (T, V) logits."""
        return self.shaped(linear(hidden_TD.to(self.weight_VD.dtype), self.weight_VD, self.bias_V))

    def shaped(self, logits_TV: Tensor) -> Tensor:
        """What the architecture does to the product: scaling, soft-capping."""
        if self.scale != 1.0:
            logits_TV = logits_TV * self.scale
        return logits_TV if self.softcap is None else torch.tanh(logits_TV / self.softcap) * self.softcap

    @torch.no_grad()
    def wide(self, hidden_TD: Tensor, out_TV: Tensor | None = None) -> Tensor:
        """(T, D) -> (T, V) logits in at least float32 also where the weights are of half precision; no gradient.

        For logits whose rounding a loss would amplify.

        Args:
            hidden_TD: rounded to the dtype of the weights.
            out_TV: filled and returned where it fits the result.
        """
        weight_VD, hidden_TD = self.weight_VD, hidden_TD.detach().to(self.weight_VD.dtype)
        dtype, shape = at_least_float32(weight_VD[:0]).dtype, (len(hidden_TD), self.num_rows)
        if out_TV is None or out_TV.dtype != dtype or out_TV.shape != shape:
            out_TV = weight_VD.new_empty(shape, dtype=dtype)
        with torch.autocast(weight_VD.device.type, enabled=False):
            if weight_VD.dtype == dtype:
                torch.mm(hidden_TD, weight_VD.T, out=out_TV)
            elif weight_VD.is_cuda:
                torch.mm(hidden_TD, weight_VD.T, out_dtype=dtype, out=out_TV)
            else:
                hidden_TD = hidden_TD.to(dtype)
                for start in range(0, self.num_rows, _WIDENED_ROWS):
                    span = slice(start, start + _WIDENED_ROWS)
                    out_TV[:, span] = hidden_TD @ weight_VD[span].to(dtype).T
            if self.bias_V is not None:
                out_TV += self.bias_V
        return self.shaped(out_TV)

    @property
    def num_rows(self) -> int:
        return self.weight_VD.shape[0]

    def detach(self) -> Head:
        """The same numbers without gradient."""
        return self._replace(
            weight_VD=self.weight_VD.detach(), bias_V=None if self.bias_V is None else self.bias_V.detach()
        )

    def rows(self, num: int) -> Head:
        """The head of the first `num` tokens, for comparing vocabularies padded to different lengths."""
        if num == self.num_rows:
            return self
        return self._replace(weight_VD=self.weight_VD[:num], bias_V=None if self.bias_V is None else self.bias_V[:num])

    def in_compute_dtype(self) -> Head:
        """The head in the precision of autocast, so that it is not converted again for every chunk."""
        device = self.weight_VD.device.type
        if not torch.is_autocast_enabled(device):
            return self
        dtype = torch.get_autocast_dtype(device)
        return self._replace(
            weight_VD=self.weight_VD.to(dtype), bias_V=None if self.bias_V is None else self.bias_V.to(dtype)
        )

    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors that a gradient may reach."""
        return (self.weight_VD,) if self.bias_V is None else (self.weight_VD, self.bias_V)


class HeadTerms(NamedTuple):
    """Sums over rows. `loss` is weighted and differentiable, the others are detached.

    Attributes:
        loss: the weighted sum.
        tokens: number of rows.
        ce: cross-entropy with the data.
        correct: rows whose best token is the data's.
        kd: divergence from the teacher.
        agree: rows where student and teacher have the same best token.
    """

    loss: Tensor
    tokens: int
    ce: Tensor
    correct: Tensor
    kd: Tensor | None = None
    agree: Tensor | None = None


def cross_entropy(hidden_TD: Tensor, head: Head, target_T: Tensor, *, chunk_size: int | None = None) -> HeadTerms:
    """Sum over tokens of -log softmax(head(hidden))[target].

    Args:
        hidden_TD: last hidden states of supervised tokens.
        head: a detached one gets no gradient.
        target_T: token ids.
        chunk_size: rows at a time; None chooses by the vocabulary.

    Raises:
        ValueError: rows and targets differ in number.
    """
    _same_rows(hidden=hidden_TD, target=target_T)

    def chunk(rows: Sequence[Tensor], heads: Sequence[Head]) -> tuple[Formed, list[Tensor]]:
        hidden_CD, target_C = rows
        terms = token_terms(heads[0](hidden_CD), target_C=target_C, consume=True)
        return terms.formed, [terms.ce, (terms.best_C == target_C).sum()]

    loss, (ce, correct) = sum_over_chunks(chunk, (hidden_TD, target_T), (head,), 2, chunk_size)
    return HeadTerms(loss, len(target_T), ce, correct)


def distillation(
    student_TD: Tensor,
    student_head: Head,
    target_T: Tensor,
    teacher_TE: Tensor,
    teacher_head: Head,
    divergence: Divergence,
    *,
    ce_weight: float,
    kd_weight: float,
    chunk_size: int | None = None,
) -> HeadTerms:
    """Sum over tokens of ce_weight * CE + kd_weight * divergence(student, teacher): vanilla KD (arXiv 2406.17328, eq. 3).

    Vocabularies of one tokenizer that are padded to different lengths are compared over the shorter one.

    Args:
        student_TD: the student's hidden states, row t the same position as row t of the teacher.
        student_head: trained, or detached.
        target_T: token ids of the data.
        teacher_TE: the teacher's hidden states; no gradient flows into them.
        teacher_head: frozen.
        divergence: compares the two distributions.
        ce_weight: of cross-entropy, the caller's 1/denominator included.
        kd_weight: of the divergence, likewise.
        chunk_size: rows at a time; None chooses by the vocabularies.

    Raises:
        ValueError: numbers of rows differ.
    """
    _same_rows(student=student_TD, teacher=teacher_TE, target=target_T)
    shared = min(student_head.num_rows, teacher_head.num_rows)
    teacher_head = teacher_head.detach().rows(shared).in_compute_dtype()

    def chunk(rows: Sequence[Tensor], heads: Sequence[Head]) -> tuple[Formed, list[Tensor]]:
        student_CD, teacher_CE, target_C = rows
        with torch.no_grad():
            teacher_CV = teacher_head(teacher_CE)
            teacher_best_C = teacher_CV.argmax(-1)
        terms = token_terms(
            heads[0](student_CD),
            target_C=target_C,
            ce_weight=ce_weight,
            teacher_NS=teacher_CV,
            divergence=divergence,
            kd_weight=kd_weight,
            consume=True,
        )
        hits = [(terms.best_C == target_C).sum(), (terms.best_C == teacher_best_C).sum()]
        return terms.formed, [terms.ce, terms.kd, *hits]

    rows = (student_TD, teacher_TE.detach(), target_T)
    loss, (ce, kd, correct, agree) = sum_over_chunks(chunk, rows, (student_head,), 4, chunk_size, extra_logits=shared)
    return HeadTerms(loss, len(target_T), ce, correct, kd, agree)


def finite_logits(logits_TV: Tensor) -> Tensor:
    """Logits in at least float32; one that is not finite counts as 0, as in the published code's cross-entropy."""
    logits_TV = at_least_float32(logits_TV)
    return logits_TV if all_finite(logits_TV) else logits_TV.masked_fill(~torch.isfinite(logits_TV), 0.0)


def token_cross_entropy(logits_TV: Tensor, target_T: Tensor) -> Tensor:
    """-log softmax(logits)[target] of every row, (T,)."""
    return -logits_TV.log_softmax(-1).gather(-1, target_T[:, None]).squeeze(-1)


def paired_first(pair_A: Tensor, num_rows: int) -> Tensor:
    """An order of all rows that starts with the paired ones, so that pairs and rows can be walked over together."""
    unpaired = torch.ones(num_rows, dtype=torch.bool, device=pair_A.device)
    unpaired[pair_A] = False
    return torch.cat([pair_A, unpaired.nonzero().squeeze(1)])


def automatic_chunk(logits_per_row: int) -> int:
    """Rows of a chunk whose logits and their gradients fit in about 512 MB; at least 16."""
    return max(16, _CHUNK_BYTES // (logits_per_row * _BYTES_PER_LOGIT))


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
        chunk_size = automatic_chunk(sum(head.num_rows for head in heads) + extra_logits)
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
        gradients = [
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (None, None, None, None, None, *gradients)


class _LiveHead:
    """A head within a chunk: called like a `Head`, it adds up its own gradient where one is wanted."""

    def __init__(self, head: Head) -> None:
        self.head = head.detach().in_compute_dtype()
        self.num_rows = head.num_rows
        self.totals = [
            torch.zeros_like(p, dtype=_accumulator(p)) if p.requires_grad else None for p in head.parameters()
        ]
        # frozen hidden states alone would not call for a backward pass
        wanted = any(total is not None for total in self.totals)
        self.trigger = torch.zeros((), device=self.head.weight_VD.device, requires_grad=wanted)

    def __call__(self, hidden_CD: Tensor) -> Tensor:
        hidden_CD = hidden_CD.to(self.head.weight_VD.dtype)
        if not self.trigger.requires_grad:
            return self.head(hidden_CD)
        totals = (*self.totals, None)[:2]
        return self.head.shaped(
            _AddingLinear.apply(hidden_CD, self.trigger, self.head.weight_VD, self.head.bias_V, *totals)
        )

    def gradients(self) -> list[Tensor | None]:
        return self.totals


class _AddingLinear(torch.autograd.Function):
    """A linear layer whose backward adds the gradient of its weight to a running total, without a tensor of its own."""

    @staticmethod
    def forward(ctx, hidden_CD, trigger, weight_VD, bias_V, weight_total_VD, bias_total_V):
        ctx.save_for_backward(hidden_CD, weight_VD)
        ctx.totals = weight_total_VD, bias_total_V
        return linear(hidden_CD, weight_VD, bias_V)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_CV):
        hidden_CD, weight_VD = ctx.saved_tensors
        weight_total_VD, bias_total_V = ctx.totals
        if weight_total_VD is not None and weight_total_VD.dtype == gradient_CV.dtype:
            weight_total_VD.addmm_(gradient_CV.T, hidden_CD)
        elif weight_total_VD is not None:
            weight_total_VD += gradient_CV.T @ hidden_CD
        if bias_total_V is not None:
            bias_total_V += gradient_CV.sum(0)
        hidden_gradient = gradient_CV @ weight_VD if ctx.needs_input_grad[0] else None
        return hidden_gradient, None, None, None, None, None


def _value(loss: Tensor | Formed) -> Tensor:
    return loss.value if isinstance(loss, Formed) else loss


def _accumulator(parameter: Tensor) -> torch.dtype:
    return parameter.dtype if parameter.dtype == torch.float64 else torch.float32


def _same_rows(**tensors: Tensor) -> None:
    counts = {name: tensor.shape[0] for name, tensor in tensors.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            "Rows must be paired one to one, but there are " + ", ".join(f"{n} {k}" for k, n in counts.items())
        )
