"""Frozen models whose decoder layers are divided among processes; each is gathered where it runs, and let go after it.

In a training step all processes run a frozen model equally often, so those that gather a layer find each other. In an evaluation
they have different numbers of batches, so they take turns: before each run all agree whose model it is, and the processes that
do not run it, or have no batches left, help to gather its layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from lit_llm.models.fully_sharded import belongs_to, forget_order
from lit_llm.models.language_model import Frozen, LanguageModel
from lit_llm.models.surgery import layer_stack


class Body(nn.Module):
    """Runs the body of a frozen model; for `fully_shard`, what the forward pass is."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, run: Callable, *args, **kwargs):
        return run(*args, **kwargs)


class DividedFrozen:
    """Keeps a part of every decoder layer of a method's frozen models in this process, on the device of the mesh.

    Embeddings, final norm and head stay whole: losses and projectors read them. Models that live in the student are its own.

    Args:
        method: holds its models by `Frozen`.
        mesh: of one dimension.

    Raises:
        ValueError: there is no such model, or one with weights that are no floating-point numbers.
    """

    def __init__(self, method: nn.Module, mesh) -> None:
        holders = (part.model for part in method.modules() if isinstance(part, Frozen))
        models = list(dict.fromkeys(model for model in holders if isinstance(model, LanguageModel)))
        if not models:
            raise ValueError(
                f"strategy.divide_frozen is true, but {type(method).__name__} holds no frozen model in this run, or only one that "
                f"lives in the student. Leave it out."
            )
        self._group, self._device = mesh.get_group(), mesh.device_type
        self._bodies = [self._divided(model, number, mesh) for number, model in enumerate(models, start=1)]
        self._batches_left: int | None = None  # None: nobody takes turns

    def take_turns(self, batches: int) -> None:
        """From now on all processes evaluate, each as many batches as it has."""
        self._batches_left = batches
        self._end_without_batches()

    def batch_done(self) -> None:
        """After each batch of an evaluation; after its last one a process helps the others until all are done."""
        self._batches_left -= 1
        self._end_without_batches()

    def _end_without_batches(self) -> None:
        if self._batches_left == 0:
            self._wait_for_turn(0)
            self._batches_left = None

    @torch.inference_mode(False)
    def _wait_for_turn(self, number: int) -> None:
        """Until it is a body's turn (0: until all are done), help those whose turn it is."""
        while (turn := self._agreed(number)) != number:
            for layer in self._bodies[turn - 1].layers:
                layer.unshard()
                layer.reshard()

    def _agreed(self, number: int) -> int:
        wanted = torch.tensor(number, device=self._device)
        torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(wanted)

    def _divided(self, model: LanguageModel, number: int, mesh) -> Body:
        from torch.distributed.fsdp import fully_shard

        layers, entry = layer_stack(model.transformer), model.transformer.base_model
        for name, parameter in layers.named_parameters():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"strategy.divide_frozen is true, but {name} of a frozen model is {parameter.dtype}: quantised weights are not "
                    f"divided among processes. Leave it out, or leave out the model's quantization."
                )
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        body = fully_shard(Body(layers), mesh=mesh)
        body._get_fsdp_state()._lazy_init()  # a body may be gathered before it runs
        belongs_to(model, body)
        run = entry.forward

        @functools.wraps(run)
        @torch.no_grad()
        @torch.inference_mode(False)  # what is gathered outlives an evaluation
        def forward(*args, **kwargs):
            if self._batches_left is not None:
                self._wait_for_turn(number)
            output = body(run, *args, **kwargs)
            forget_order(body)  # no backward pass comes
            return output

        entry.forward = forward
        return body
