"""Routed layers on small MLPs, with experts that differ from the original."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lit_llm.models.experts import Classifier, RoutedMLP
from lit_llm.models.mlp_kinds import mlp_kind


class GatedMLP(nn.Module):
    """As in Llama."""

    def __init__(self, hidden: int, inner: int, activation: str = "silu", bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, inner, bias), nn.Linear(hidden, inner, bias)
        self.down_proj = nn.Linear(inner, hidden, bias)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class FusedMLP(nn.Module):
    """As in Phi-3."""

    def __init__(self, hidden: int, inner: int, activation: str = "silu") -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(hidden, 2 * inner, False), nn.Linear(inner, hidden, False)
        self.activation_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


class PlainMLP(nn.Module):
    """As in Phi."""

    def __init__(self, hidden: int, inner: int, activation: str = "gelu_pytorch_tanh") -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.activation_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class TransposedMLP(nn.Module):
    """As in GPT-2, without its dropout."""

    def __init__(self, hidden: int, inner: int, activation: str = "gelu_new") -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.c_fc, self.c_proj = Conv1D(inner, hidden), Conv1D(hidden, inner)
        self.act = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class LengthUnknown(RoutedMLP):
    """Computes as on a GPU, where no length is read: segments of fixed length with tails that mean nothing."""

    def reads_counts(self, x_MH: Tensor, backend: str) -> bool:
        return False


KINDS = {"gated": GatedMLP, "fused": FusedMLP, "plain": PlainMLP, "transposed": TransposedMLP}


def routed(
    kind: str = "gated",
    counts: tuple[int, ...] = (3, 2),
    hidden: int = 16,
    inner: int = 32,
    k: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    classifier: str | None = None,
    layer: type[RoutedMLP] = RoutedMLP,
    **settings,
) -> RoutedMLP:
    """A routed layer whose experts, one bank per entry of `counts`, are no copies."""
    torch.manual_seed(seed)
    block = layer(KINDS[kind](hidden, inner).to(dtype), experts_per_token=k, **settings)
    for group, count in enumerate(counts, start=1):
        block.add_experts(group, count)
    block.set_router(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in block.experts.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if classifier is not None:
        block.classifier = Classifier(hidden, classifier)
        block.classifier.reset(torch.Generator().manual_seed(seed + 1))
    block.base.requires_grad_(False)
    return block.to(dtype)


def experts_one_by_one(block: RoutedMLP) -> list:
    """Each expert of a routed layer as a module of its own, the original first."""
    import copy

    modules = [block.base]
    for bank in block.experts.values():
        for index in range(bank.count):
            modules.append(_with_weights(copy.deepcopy(block.base), bank, index))
    return modules


def _with_weights(module: nn.Module, bank, index: int) -> nn.Module:
    kind = mlp_kind(module)
    first, second = kind.stacked_names
    for suffix, stacked in (("weight", ""), ("bias", "_bias")):
        for names, name in ((kind.inputs, first), ((kind.output,), second)):
            whole = getattr(bank, f"{name}{stacked}", None)
            if whole is not None:
                for part, own in zip(whole[index].detach().chunk(len(names)), names):
                    layer = getattr(module, own)
                    transposed = suffix == "weight" and type(layer) is not nn.Linear
                    getattr(layer, suffix).data.copy_(part.T if transposed else part)
    return module
