"""The MLPs that decoders of transformers have, as data: which projections, which activation, gated or not.

An expert is a copy of a decoder layer's MLP. Many experts share one stacked tensor per projection, so their computation
is written here once, for stacked weights; `mlp_kind` recognises the module that it is a copy of.

Shapes: n rows, H hidden size, F inner size, E experts of a stack, I and O input and output width of a projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_ACTIVATIONS = ("act_fn", "act", "activation_fn")

Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class MlpKind:
    """How an MLP is built.

    Args:
        name: `gated`, `fused_gated` (gate and up in one projection) or `plain`.
        inputs: names of the projections from H to F: gate and up, both in one, or one.
        output: name of the projection from F to H.
    """

    name: str
    inputs: tuple[str, ...]
    output: str

    @property
    def gated(self) -> bool:
        return self.name != "plain"

    @property
    def stacked_names(self) -> tuple[str, str]:
        """Names of the stacked input and output projections."""
        return ("gate_up_proj", "down_proj") if self.gated else ("in_proj", "out_proj")

    def activation(self, mlp: nn.Module) -> Callable[[Tensor], Tensor]:
        return next(getattr(mlp, name) for name in _ACTIVATIONS if callable(getattr(mlp, name, None)))

    def dropout(self, mlp: nn.Module) -> float:
        """Probability of the dropout after the output projection, as it is now."""
        layer = getattr(mlp, "dropout", None)
        return layer.p if isinstance(layer, nn.Dropout) else float(getattr(mlp, "residual_dropout", 0.0))

    def hidden(self, projected: list[Tensor], activation: Callable[[Tensor], Tensor]) -> Tensor:
        """(n, F) what the output projection reads, from the outputs of the input projections."""
        if not self.gated:
            return activation(projected[0])
        gate_nF, up_nF = projected if len(projected) == 2 else projected[0].chunk(2, dim=-1)
        return activation(gate_nF) * up_nF


_KINDS = (
    MlpKind("gated", ("gate_proj", "up_proj"), "down_proj"),
    MlpKind("fused_gated", ("gate_up_proj",), "down_proj"),
    MlpKind("plain", ("fc1",), "fc2"),
    MlpKind("plain", ("dense_h_to_4h",), "dense_4h_to_h"),
    MlpKind("plain", ("c_fc",), "c_proj"),
)


def mlp_kind(mlp: nn.Module) -> MlpKind:
    """Recognise an MLP by its projections, and see on a few rows that it computes what its kind does.

    Raises:
        ValueError: none of the known kinds, or one that does something else with its projections.
    """
    for kind in _KINDS:
        if all(isinstance(getattr(mlp, name, None), nn.Module) for name in (*kind.inputs, kind.output)):
            _check(mlp, kind)
            return kind
    known = "; ".join(", ".join((*kind.inputs, kind.output)) for kind in _KINDS)
    raise ValueError(
        f"{type(mlp).__name__} has the parts {[name for name, _ in mlp.named_children()]}, which is no MLP that experts "
        f"can be copied from. Known are the ones with the projections: {known}."
    )


def weight_of(layer: nn.Module) -> Tensor:
    """(O, I) weight of a linear layer; GPT-2's layers keep it the other way round."""
    return layer.weight.T if _is_transposed(layer) else layer.weight


def stacked_layout(mlp: nn.Module, kind: MlpKind) -> dict[str, list[Tensor]]:
    """Which tensors of an MLP, one above the other, make up each stacked parameter of one expert."""
    first, second = kind.stacked_names
    inputs, output = [getattr(mlp, name) for name in kind.inputs], getattr(mlp, kind.output)
    layout = {first: [weight_of(layer) for layer in inputs], second: [weight_of(output)]}
    for name, layers in ((first, inputs), (second, [output])):
        if getattr(layers[0], "bias", None) is not None:
            layout[f"{name}_bias"] = [layer.bias for layer in layers]
    return layout


def is_plain(mlp: nn.Module, kind: MlpKind) -> bool:
    """Whether the weights say all about this MLP: no adapters, no quantisation, no hooks on its layers."""
    layers = [getattr(mlp, name) for name in (*kind.inputs, kind.output)]
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in (mlp, *layers))
    return not hooked and all(type(layer) is nn.Linear or _is_transposed(layer) for layer in layers)


def as_stack(mlp: nn.Module, kind: MlpKind, x_nH: Tensor, product: Product) -> Tensor:
    """(n, H) output of one MLP computed as a stack of one expert, from views of its own weights."""

    def project(name: str, rows: Tensor) -> Tensor:
        layer = getattr(mlp, name)
        bias = getattr(layer, "bias", None)
        return product(rows, weight_of(layer)[None], None if bias is None else bias[None])

    hidden_nF = kind.hidden([project(name, x_nH) for name in kind.inputs], kind.activation(mlp))
    return project(kind.output, hidden_nF)


def _is_transposed(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return type(layer) is Conv1D


def _product_of_one(x_nI: Tensor, weight_1OI: Tensor, bias_1O: Tensor | None) -> Tensor:
    return nn.functional.linear(x_nI, weight_1OI[0], None if bias_1O is None else bias_1O[0])


@torch.no_grad()
def _check(mlp: nn.Module, kind: MlpKind) -> None:
    """The module's own forward against the kind's formula."""
    weight = weight_of(getattr(mlp, kind.inputs[0]))
    if weight.is_meta or not weight.is_floating_point() or not is_plain(mlp, kind):
        return
    if not any(callable(getattr(mlp, name, None)) for name in _ACTIVATIONS):
        raise ValueError(f"{type(mlp).__name__} has no activation called {', '.join(_ACTIVATIONS)}.")
    activation = kind.activation(mlp)
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        raise ValueError(
            f"The activation of {type(mlp).__name__}, {type(activation).__name__}, has parameters, which experts would share "
            f"with the MLP that they are copies of. This family is not supported."
        )
    width = weight.shape[1]
    probe = torch.linspace(-1, 1, 3 * width, device=weight.device, dtype=torch.float32).sin().view(3, width)
    probe_nH = probe.to(weight.dtype)
    training = mlp.training
    mlp.eval()
    try:
        own = mlp(probe_nH).float()
        ours = as_stack(mlp, kind, probe_nH, _product_of_one).float()
    finally:
        mlp.train(training)
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    if not torch.allclose(own, ours, rtol=tolerance, atol=tolerance * own.abs().max().item()):
        raise ValueError(
            f"{type(mlp).__name__} has the projections of a {kind.name.replace('_', ' ')} MLP, but computes something "
            f"else with them (outputs differ by up to {(own - ours).abs().max().item():.3g}), so experts copied from it "
            f"would be wrong. This family is not supported."
        )
