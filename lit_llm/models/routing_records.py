"""What routed layers decided in one forward pass, for losses and figures.

Shapes: M token positions of the batch (rows times length), N experts of a layer, k experts per token, B rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """The decisions of one routed layer.

    Args:
        router_logits_MN: float32, with gradient; for all positions, also where a classifier passes the router by.
        chosen_Mk: the router's choice, most probable expert first.
        gates_Mk: the router's weights of the chosen experts, with gradient.
        classifier_logits: (M, 2), or (B, 2) for scope `sequence_sum`; class 0 is the original languages. None without
            classifier.
        bypass_M: positions that use expert 0 alone, with weight one. None without classifier.
        real_M: positions that are not padding; None: all.
    """

    router_logits_MN: Tensor
    chosen_Mk: Tensor
    gates_Mk: Tensor
    classifier_logits: Tensor | None = None
    bypass_M: Tensor | None = None
    real_M: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.router_logits_MN.shape[1]

    @property
    def experts_Mk(self) -> Tensor:
        """The experts that are computed, after the classifier; N means none."""
        if self.bypass_M is None:
            return self.chosen_Mk
        alone_k = torch.full_like(self.chosen_Mk[:1], self.num_experts)
        alone_k[:, 0] = 0
        return torch.where(self.bypass_M[:, None], alone_k, self.chosen_Mk)

    @property
    def weights_Mk(self) -> Tensor:
        """The weights of `experts_Mk`."""
        if self.bypass_M is None:
            return self.gates_Mk
        alone_k = torch.zeros_like(self.gates_Mk[:1])
        alone_k[:, 0] = 1
        return torch.where(self.bypass_M[:, None], alone_k, self.gates_Mk)

    @property
    def mixture_MN(self) -> Tensor:
        """The weight of every expert in the output."""
        padded = self.weights_Mk.new_zeros(len(self.weights_Mk), self.num_experts + 1)
        return padded.scatter(1, self.experts_Mk, self.weights_Mk)[:, : self.num_experts]

    @property
    def counts_N(self) -> Tensor:
        """Slots of real tokens that each expert computed."""
        used_MkN = self.experts_Mk[:, :, None] == torch.arange(self.num_experts, device=self.chosen_Mk.device)
        if self.real_M is not None:
            used_MkN = used_MkN & self.real_M[:, None, None]
        return used_MkN.sum((0, 1))


class Collector:
    """Takes the records of one forward pass, and tells layers the labels of its tokens.

    A recomputation (activation checkpointing) leaves no second record. It does read the labels again, after the
    collector was closed: a gate that follows labels must decide as it did.
    """

    def __init__(self, token_labels: Tensor | None, mask: Tensor | None) -> None:
        self._labels_M = None if token_labels is None else token_labels.flatten()
        self._real_M = None if mask is None else mask.flatten().bool()
        self._with_gradients = torch.is_grad_enabled()
        self._open = True
        self.records: dict[int, Routing] = {}

    @property
    def takes_records(self) -> bool:
        return self._open and not _in_backward()

    @property
    def labels_M(self) -> Tensor | None:
        return self._labels_M if self._open or _in_backward() else None

    def take(self, layer: int, training: bool, routing: Routing) -> None:
        """Keep a layer's record.

        Raises:
            RuntimeError: a second forward pass, or one without gradients although they were on.
            ValueError: labels or mask of another number of tokens.
        """
        if training and self._with_gradients and not torch.is_grad_enabled():
            raise RuntimeError(
                "A routed layer runs without gradients inside `collect_routing`, which was opened with gradients: losses "
                "on the routers would silently have none. Checkpoint activations with use_reentrant=False, or open "
                "`collect_routing` inside torch.no_grad()."
            )
        if layer in self.records:
            raise RuntimeError(
                f"Layer {layer} ran twice inside one `collect_routing`, which takes the records of one forward pass. "
                f"Open another for the second."
            )
        positions = len(routing.router_logits_MN)
        for name, given in (("token_labels", self._labels_M), ("mask", self._real_M)):
            if given is not None and len(given) != positions:
                raise ValueError(
                    f"`collect_routing` got {name} for {len(given)} positions, but layer {layer} sees {positions}. "
                    f"Give one value per position of the batch, padding included."
                )
        self.records[layer] = routing if self._real_M is None else _with_mask(routing, self._real_M)

    def close(self) -> None:
        self._open = False
        self.records = {}


@contextmanager
def collect_routing(
    model: nn.Module, token_labels: Tensor | None = None, mask: Tensor | None = None
) -> Iterator[dict[int, Routing]]:
    """Collect what the routed layers of `model` decide in the one forward pass inside the block.

    Args:
        model: anything that holds routed layers.
        token_labels: (B, T) language group of every position, 0 = original languages; read by classifiers whose gate
            follows labels.
        mask: (B, T) which positions are real tokens, for the counts.

    Yields:
        Records by layer index, filled by the forward pass; they live on after the block.

    Raises:
        ValueError: the model has no routed layer.
        RuntimeError: see `Collector.take`.
    """
    layers = [module for module in model.modules() if hasattr(module, "collector")]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no routed layer, so there is no routing to collect. Expand it first."
        )
    collector = Collector(token_labels, mask)
    for layer in layers:
        layer.collector = collector
    try:
        yield collector.records
    finally:
        collector.close()
        if token_labels is None:  # nothing that a recomputation would ask for
            for layer in layers:
                layer.collector = None


def _with_mask(routing: Routing, real_M: Tensor) -> Routing:
    from dataclasses import replace

    return replace(routing, real_M=real_M)


def _in_backward() -> bool:
    """Whether autograd is running on this thread, as torch.utils.checkpoint tells it."""
    return torch._C._current_graph_task_id() != -1
