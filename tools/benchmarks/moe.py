"""Suite `moe`: forward and backward of a routed layer whose experts differ, as in stage 1: expert 0 frozen.

`plain loop` is the released layer (MoE-LPR, LayerMoE): a one-hot mask of slots, for each expert the rows that chose it,
its MLP on them, even if there are none, and `index_add` into the result. Contenders take turns on the same weights; one
whose output or gradients differ from the loop's is void. `dense MLP` is one frozen MLP: a routed layer costs k of them at least.

Shapes: M tokens, H hidden size, N experts, k slots of a token.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_llm.models.experts import RoutedMLP

_SETTINGS = {  # tokens, H, F, numbers of experts
    "A": (1024, 512, 1408, (2, 3, 5, 8)),
    "B": (16_384, 1024, 2816, (4, 8, 64)),
    "tiny": (32, 16, 24, (2, 5)),
}
_K = 2
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def measure(given: argparse.Namespace) -> list[dict]:
    """Rows of the suite: for each number of experts, seconds of every contender."""
    torch.set_num_threads(given.threads)
    tokens, width, inner, sizes = _SETTINGS[given.setting]
    dtype = getattr(torch, given.dtype)
    rows = []
    for experts in sizes:
        work = _Work(tokens, width, inner, experts, given.device, dtype)
        rows += _rows(work, experts, given)
    return rows


class _Work:
    """One routed layer in several forms, and its input.

    Attributes:
        steps: name -> does one forward and backward and gives the output.
        compared: name -> the gradients to compare with those of the loop, in its order.
    """

    def __init__(self, tokens: int, width: int, inner: int, experts: int, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        mlps = nn.ModuleList([_mlp(width, inner) for _ in range(experts)]).to(device, dtype)
        mlps[0].requires_grad_(False)
        self.device = device
        self.loop = _PlainLoop(mlps, width).to(device)
        self.x_MH = torch.randn(tokens, width, device=device, dtype=dtype)
        self.cotangent_MH = torch.randn_like(self.x_MH)
        self.dense = copy.deepcopy(mlps[0])
        self.routed = {name: _routed(self.loop, name) for name in ("auto", "loop")}
        self.steps: dict[str, Callable[[], Tensor]] = {
            "lit_llm": lambda: self._step(lambda x_MH: self.routed["auto"](x_MH[None])[0]),
            "lit_llm, dispatch: loop": lambda: self._step(lambda x_MH: self.routed["loop"](x_MH[None])[0]),
            "plain loop": lambda: self._step(self.loop),
            "dense MLP": lambda: self._step(self.dense),
        }

    def _step(self, layer: Callable[[Tensor], Tensor]) -> Tensor:
        for module in (self.loop, *self.routed.values()):
            module.zero_grad(set_to_none=True)
        x_MH = self.x_MH.detach().requires_grad_()
        y_MH = layer(x_MH)
        (y_MH * self.cotangent_MH).sum().backward()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.x_grad_MH = x_MH.grad
        return y_MH.detach()

    def results(self, name: str) -> list[Tensor]:
        """Output and gradients of a contender."""
        y_MH = self.steps[name]()
        if name == "plain loop":
            trained = [e for e in self.loop.mlps if e.gate_proj.weight.requires_grad]
            gate_up = torch.stack([torch.cat([e.gate_proj.weight.grad, e.up_proj.weight.grad]) for e in trained])
            down = torch.stack([e.down_proj.weight.grad for e in trained])
            return [y_MH, self.x_grad_MH, self.loop.router.weight.grad, gate_up, down]
        routed = self.routed["auto" if name == "lit_llm" else "loop"]
        bank = routed.experts["1"]
        found = [routed.router.weight.grad, bank.gate_up_proj.grad, bank.down_proj.grad]
        return [y_MH, self.x_grad_MH, *found]


class _PlainLoop(nn.Module):
    """The released routed layer; its router in float32, as ours."""

    def __init__(self, mlps: nn.ModuleList, width: int) -> None:
        super().__init__()
        self.mlps = mlps
        self.router = nn.Linear(width, len(mlps), bias=False)

    def forward(self, x_MH: Tensor) -> Tensor:
        p_MN = self.router(x_MH.float()).softmax(-1)
        weight_Mk, chosen_Mk = p_MN.topk(min(_K, len(self.mlps)), -1)
        weight_Mk = (weight_Mk / weight_Mk.sum(-1, keepdim=True)).to(x_MH.dtype)
        mask_NkM = nn.functional.one_hot(chosen_Mk, len(self.mlps)).permute(2, 1, 0)
        y_MH = torch.zeros_like(x_MH)
        for mask_kM, mlp in zip(mask_NkM, self.mlps, strict=True):
            slot, row = torch.where(mask_kM)
            y_MH.index_add_(0, row, mlp(x_MH[row]) * weight_Mk[row, slot, None])
        return y_MH


def _rows(work: _Work, experts: int, given: argparse.Namespace) -> list[dict]:
    expected = work.results("plain loop")
    gaps = {
        name: max(_gap(ours, theirs) for ours, theirs in zip(work.results(name), expected, strict=True))
        for name in ("lit_llm", "lit_llm, dispatch: loop")
    }
    seconds: dict[str, list[float]] = {name: [] for name in work.steps}
    for turn in range(given.warmup + given.steps):
        for name, step in work.steps.items():
            start = time.perf_counter()
            step()
            if turn >= given.warmup:
                seconds[name].append(time.perf_counter() - start)
    ours = statistics.median(seconds["lit_llm"])
    rows = []
    for name, taken in seconds.items():
        row = {"experts": experts, "contender": name, "median s": statistics.median(taken), "best s": min(taken)}
        row |= {"gap": gaps.get(name), "our speed-up": statistics.median(taken) / ours}
        wrong = gaps.get(name, 0.0) > _TOLERANCE[work.x_MH.dtype]
        rows.append(row | {"void": "void", "median s": None, "best s": None, "our speed-up": None} if wrong else row)
    return rows


def _gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def _mlp(width: int, inner: int) -> nn.Module:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    sizes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": 1, "num_key_value_heads": 1}
    return LlamaMLP(AutoConfig.for_model("llama", **sizes))


def _routed(loop: _PlainLoop, backend: str) -> RoutedMLP:
    """Our layer with the weights of the loop."""
    base, others = loop.mlps[0], list(loop.mlps)[1:]
    routed = RoutedMLP(copy.deepcopy(base), 0, _K, backend=backend)
    bank = routed.add_experts(1, len(others))
    routed.set_router(torch.Generator())
    with torch.no_grad():
        bank.gate_up_proj.copy_(torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in others]))
        bank.down_proj.copy_(torch.stack([e.down_proj.weight for e in others]))
        routed.router.weight.copy_(loop.router.weight)
    routed.base.requires_grad_(False)
    return routed
