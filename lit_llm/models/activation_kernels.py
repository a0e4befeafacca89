"""Activations that are computed into given memory, and their gradients written over given ones.

Fresh memory costs a page fault a page, which for a product with a few hundred rows is a hundredth of its time. For any other
activation autograd does the same in memory of its own.

Shapes: m rows of one expert, F inner size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]

_ATEN = torch.ops.aten


class Activated:
    """The activation of some rows.

    Args:
        activation: without parameters and chance.
        x_mF: what it reads; it stays as it is.
        memory_mF: may hold the value.
        with_gradient: whether `gradient` will be asked for.

    Attributes:
        value_mF: of the activation, without a graph.
    """

    def __init__(self, activation: Activation, x_mF: Tensor, memory_mF: Tensor, with_gradient: bool) -> None:
        self._kernels = _kernels(activation)
        self._x_mF = x_mF
        if self._kernels is not None:
            self.value_mF = self._kernels[0](x_mF, out=memory_mF)
            return
        with torch.set_grad_enabled(with_gradient):
            self._x_mF = x_mF.detach().requires_grad_(with_gradient)
            self._graph_mF = activation(self._x_mF)
        self.value_mF = self._graph_mF.detach()

    def gradient(self, grad_mF: Tensor) -> Tensor:
        """That of what it read, from that of the value, whose memory may be written over."""
        if self._kernels is not None:
            return self._kernels[1](grad_mF, self._x_mF, grad_input=grad_mF)
        return torch.autograd.grad(self._graph_mF, self._x_mF, grad_mF)[0]


def _kernels(activation: Activation) -> tuple[Callable[..., Tensor], Callable[..., Tensor]] | None:
    """Forward and backward of an activation that has kernels of its own, or None."""
    from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

    if type(activation) in (nn.SiLU, SiLUActivation):
        return _ATEN.silu.out, _ATEN.silu_backward.grad_input
    if type(activation) is GELUActivation and activation.act is nn.functional.gelu:
        approximate = "none"
    elif type(activation) is GELUTanh and isinstance(activation.act, partial):
        approximate = "tanh"
    else:
        return None
    return tuple(partial(f, approximate=approximate) for f in (_ATEN.gelu.out, _ATEN.gelu_backward.grad_input))
