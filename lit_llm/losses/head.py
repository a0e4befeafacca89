"""An output head as tensors: hidden states to logits.

Shapes: T rows (supervised tokens), C rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lit_llm.losses.divergence import at_least_float32
from lit_llm.losses.scratch import scratch

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

    def chunk(self, hidden_CD: Tensor, name: str) -> Tensor:
        """(C, D) -> (C, V) logits of a chunk, in the scratch memory of that name where they are the product itself."""
        nothing = torch.zeros((), device=self.weight_VD.device)
        return self.shaped(
            ChunkLinear.apply(
                hidden_CD.to(self.weight_VD.dtype), nothing, self.weight_VD.detach(), self.bias_V, None, name
            )
        )

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


class ChunkLinear(torch.autograd.Function):
    """A linear layer that writes to scratch memory, and whose backward hands the gradient of its weight to a live head."""

    @staticmethod
    def forward(ctx, hidden_CD, trigger, weight_VD, bias_V, live, name):
        ctx.save_for_backward(hidden_CD, weight_VD)
        ctx.live = live
        out_CV = scratch(name, hidden_CD, (len(hidden_CD), len(weight_VD)))
        torch.mm(hidden_CD, weight_VD.T, out=out_CV)
        return out_CV if bias_V is None else out_CV.add_(bias_V)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_CV):
        hidden_CD, weight_VD = ctx.saved_tensors
        if ctx.live is not None:
            ctx.live.add(gradient_CV, hidden_CD)
        return gradient_CV @ weight_VD if ctx.needs_input_grad[0] else None, None, None, None, None, None
