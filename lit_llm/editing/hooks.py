"""The neurons of a transformer, and hooks at the linear map that reads them.

A neuron is one coordinate of the input of the feed-forward block's last linear map, the down projection: changing it by x
adds x times one column of that map to the residual stream. Locating, optimising, caching and writing into weights all
use this one place.

Shapes: R rows, T columns (padded positions), N = R * T of them flattened, d hidden size, m neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps the parts that an edit needs.

    Attributes:
        blocks: path of the list of blocks.
        down: path of the down projection in a block.
        final_norm: path of what turns the last block's output into hidden states for the head.
        up: path, in a block, of the linear map whose output enters the nonlinearity; None where it is fused with another.
        norm_after: path, in a block, of a norm between the down projection and the residual stream.
    """

    blocks: str
    down: str
    final_norm: str
    up: str | None
    norm_after: str | None = None


_LLAMA = Family("model.layers", "mlp.down_proj", "model.norm", "mlp.gate_proj")
_NORM_AFTER = Family("model.layers", "mlp.down_proj", "model.norm", "mlp.gate_proj", "post_feedforward_layernorm")
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo", "gemma"), _LLAMA),
    "phi3": Family("model.layers", "mlp.down_proj", "model.norm", None),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), _NORM_AFTER),
    "gpt2": Family("transformer.h", "mlp.c_proj", "transformer.ln_f", "mlp.c_fc"),
    "gptj": Family("transformer.h", "mlp.fc_out", "transformer.ln_f", "mlp.fc_in"),
    "gpt_neox": Family("gpt_neox.layers", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm", "mlp.dense_h_to_4h"),
    "bloom": Family("transformer.h", "mlp.dense_4h_to_h", "transformer.ln_f", "mlp.dense_h_to_4h"),
    "opt": Family("model.decoder.layers", "fc2", "model.decoder.final_layer_norm", "fc1"),
}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


class FeedForwards:
    """The feed-forward blocks of a causal language model of transformers.

    Args:
        transformer: the model itself, without adapters around its down projections.

    Attributes:
        hidden_size: d.
        width: m.

    Raises:
        ValueError: an architecture that is not in the table, a mixture of experts, or modules that are not where or what
            the table says.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer, self.family = transformer, _family_of(transformer)
        self.blocks = list(transformer.get_submodule(self.family.blocks))
        self.hidden_size = transformer.config.get_text_config().hidden_size
        sizes = {_sizes(self.down(layer), self._name(layer)) for layer in range(self.num_layers)}
        if len(sizes) > 1 or self.hidden_size not in {size[0] for size in sizes}:
            raise ValueError(
                f"The down projections of {type(transformer).__name__} have outputs x inputs {sorted(sizes)}, but all must map "
                f"one number of neurons to hidden_size {self.hidden_size}. This model cannot be edited."
            )
        self.width = sizes.pop()[1]

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and hidden states."""
        return self.transformer.dtype

    @property
    def final_norm(self) -> nn.Module:
        return self.transformer.get_submodule(self.family.final_norm)

    def down(self, layer: int) -> nn.Module:
        """The down projection of a layer."""
        return self.blocks[layer].get_submodule(self.family.down)

    def weight(self, layer: int) -> Tensor:
        """(d, m) live view of the down projection, outputs x inputs whatever the module's orientation.

        Raises:
            ValueError: the weights are quantised, so they are not numbers that could be read or changed one by one.
        """
        module = self.down(layer)
        if not module.weight.is_floating_point():
            raise ValueError(
                f"{self._name(layer)} is quantised ({module.weight.dtype}), so its weights cannot be edited. Edits of the cache "
                f"work on it; for weight edits load the model without quantisation."
            )
        return module.weight.T if self.transposed(layer) else module.weight

    def transposed(self, layer: int) -> bool:
        """Whether the module keeps its weight as inputs x outputs; told by its class, never by shapes."""
        return _is_transposed(self.down(layer))

    def norm_after(self, layer: int) -> nn.Module | None:
        """The norm between the down projection and the block's output, where the architecture has one."""
        if self.family.norm_after is not None:
            return self.blocks[layer].get_submodule(self.family.norm_after)
        before = getattr(self.transformer.config, "do_layer_norm_before", True)  # OPT-350m normalises the sum
        return None if before else self.blocks[layer].final_layer_norm

    def check_layers(self, layers: Sequence[int]) -> None:
        """See that layers exist and ascend.

        Raises:
            ValueError: they do not.
        """
        ascending = len(layers) > 0 and all(low < high for low, high in pairwise(layers))
        if not ascending or layers[0] < 0 or layers[-1] >= self.num_layers:
            raise ValueError(
                f"layers are {list(layers)}, but they must ascend within 0 to {self.num_layers - 1}, the blocks of "
                f"{type(self.transformer).__name__}."
            )

    def default_layers(self) -> list[int]:
        """The layers that the published editors take in models of this depth, or the same share of the depth."""
        known = {("gptj", 28): range(3, 9), ("gpt2", 48): range(13, 18), ("qwen2", 28): range(4, 9)}
        kind = (self.transformer.config.model_type, self.num_layers)
        if kind in known or self.num_layers == 32:
            return list(known.get(kind, range(4, 9)))
        within = [layer for layer in range(self.num_layers) if 0.13 <= layer / self.num_layers <= 0.27]
        return within or [self.num_layers // 5]

    def middle_layers(self) -> list[int]:
        """From 0.44 to 0.67 of the depth: 8 to 12 of 18, where values of neurons did best (docs/neuron_edit.md)."""
        last = self.num_layers - 1
        return list(range(min(round(0.44 * self.num_layers), last), min(round(0.67 * self.num_layers), last) + 1))

    @contextmanager
    def restoring(self, layers: Sequence[int]) -> Iterator[None]:
        """Down projections may be changed while open; afterwards they are bit for bit what they were."""
        parameters = [parameter for layer in layers for parameter in self.down(layer).parameters()]
        before = [(parameter.detach().clone(), parameter.requires_grad) for parameter in parameters]
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, (value, flag) in zip(parameters, before, strict=True):
                    parameter.copy_(value)
                    parameter.requires_grad_(flag)

    @contextmanager
    def at_inputs(self, changes: Mapping[int, Change]) -> Iterator[None]:
        """While open, each function sees the neurons (N, m) of its layer and may return others in their place."""
        with ExitStack() as stack:
            for layer, change in changes.items():
                stack.callback(self.down(layer).register_forward_pre_hook(_before(change)).remove)
            yield

    @contextmanager
    def at_outputs(self, changes: Mapping[int, Change]) -> Iterator[None]:
        """The same for what the down projections give, (N, d), bias included."""
        with ExitStack() as stack:
            for layer, change in changes.items():
                stack.callback(self.down(layer).register_forward_hook(_after(change)).remove)
            yield

    @contextmanager
    def at_block_outputs(self, changes: Mapping[int, Change]) -> Iterator[None]:
        """The same for the outputs of whole blocks, (N, d)."""
        with ExitStack() as stack:
            for layer, change in changes.items():
                stack.callback(self.blocks[layer].register_forward_hook(_after(change)).remove)
            yield

    @contextmanager
    def at_ups(self, changes: Mapping[int, Change]) -> Iterator[None]:
        """The same for what enters the nonlinearity, (N, m): the place that knowledge-neuron code reads.

        Raises:
            ValueError: the architecture computes it together with something else.
        """
        if self.family.up is None:
            raise ValueError(
                f"{type(self.transformer).__name__} computes what enters its nonlinearity together with the gated values, so "
                f"there is no such place. Take the neurons at the down projection."
            )
        with ExitStack() as stack:
            for layer, change in changes.items():
                module = self.blocks[layer].get_submodule(self.family.up)
                stack.callback(module.register_forward_hook(_after(change)).remove)
            yield

    def _name(self, layer: int) -> str:
        return f"{self.family.blocks}.{layer}.{self.family.down} of {type(self.transformer).__name__}"


def _family_of(transformer: nn.Module) -> Family:
    config = transformer.config
    experts = {name: getattr(config, name, None) for name in _EXPERT_COUNTS}
    mixed = {name: count for name, count in experts.items() if count and count > 1}
    if mixed:
        raise ValueError(
            f"{type(transformer).__name__} is a mixture of experts ({mixed}): which down projection reads a token's neurons "
            f"depends on a router, so one value at one place does not edit it. Editable: {', '.join(sorted(FAMILIES))}."
        )
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{type(transformer).__name__} is of the type {config.model_type!r}, and where it keeps its neurons is not known. "
            f"Editable: {', '.join(sorted(FAMILIES))}."
        )
    family = FAMILIES[config.model_type]
    projected = getattr(config, "word_embed_proj_dim", None)
    if config.model_type == "opt" and projected != config.hidden_size:
        raise ValueError(
            f"This OPT model maps its hidden states to {projected} dimensions before the head (hidden_size is "
            f"{config.hidden_size}), as OPT-350m does. Such a model cannot be edited; the other sizes of OPT can."
        )
    return family


def _sizes(module: nn.Module, name: str) -> tuple[int, int]:
    """Outputs and inputs of a linear map, told by its class: shapes cannot tell where both are equal."""
    if _is_transposed(module):
        return module.nf, module.weight.shape[0]
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    raise ValueError(
        f"{name} is a {type(module).__name__}, but a Linear or a Conv1D is needed. Merge adapters into the model first."
    )


def _is_transposed(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _before(change: Change):
    def hook(module, args):
        changed = change(args[0].flatten(0, -2))
        return None if changed is None else (changed.view(args[0].shape), *args[1:])

    return hook


def _after(change: Change):
    def hook(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        changed = change(first.flatten(0, -2))
        if changed is None:
            return None
        changed = changed.view(first.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook
