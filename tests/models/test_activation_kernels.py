"""Activations in given memory are those of autograd, bit for bit."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from lit_llm.models.activation_kernels import Activated

NAMES = ["silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_python", "gelu_new", "relu", "relu2", "linear", "tanh"]
IN_MEMORY = {"silu", "swish", "gelu", "gelu_pytorch_tanh"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_autograd(name, dtype):
    activation = ACT2FN[name]
    x, grad, other = (torch.randn(5, 7, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(3))
    leaf = x.clone().requires_grad_()
    wanted = activation(leaf)
    (wanted_grad,) = torch.autograd.grad(wanted, leaf, grad * other)

    before, memory = x.clone(), torch.empty_like(x)
    activated = Activated(activation, x, memory, with_gradient=True)
    assert torch.equal(activated.value_mF, wanted)
    assert (activated.value_mF.data_ptr() == memory.data_ptr()) == (name in IN_MEMORY)
    torch.mul(grad, activated.value_mF, out=memory)  # as the loop uses its memory again before it asks for the gradient
    assert torch.equal(activated.gradient((grad * other).clone()), wanted_grad)
    assert torch.equal(x, before)


def test_without_gradient_no_graph_is_built():
    activated = Activated(nn.Tanh(), torch.randn(2, 3), torch.empty(2, 3), with_gradient=False)
    assert not activated.value_mF.requires_grad and activated.value_mF.grad_fn is None
