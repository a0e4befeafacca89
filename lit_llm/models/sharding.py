"""Weights that a strategy divides among processes: their true size, and how they become whole for a while.

DeepSpeed's ZeRO stage 3 leaves an empty tensor in a parameter's place outside its module's own forward and backward pass,
FSDP2 the part of this process (`fully_sharded`). Everything here does nothing to parameters that are whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lit_llm.models import fully_sharded


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, also where this process holds a part of it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def whole_numel(parameter: nn.Parameter) -> int:
    """How many numbers a parameter has, also where this process holds a part of it."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within the block every process holds all weights of a module, however often, and in whatever order, each runs it.

    All processes enter and leave together. Not for backward passes.
    """
    if (root := fully_sharded.divided_by(module)) is not None:
        with fully_sharded.unsharded(module, root):
            yield
        return
    divided = divided_parameters(module)
    if not divided:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    _let_arrive(divided)
    missing = [parameter for parameter in divided if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    if missing:
        missing[0].all_gather(param_list=missing)
    try:
        with _without_fetching(divided):
            yield
    finally:
        if missing:
            missing[0].partition(param_list=missing, has_been_updated=False)


@contextmanager
def whole_on(module: nn.Module, here: bool) -> Iterator[None]:
    """Within the block the processes that ask for it hold all weights of a module on the CPU, to write them somewhere.

    All processes enter together; weights are gathered one by one, so a device need not hold all at once. Inside, the
    module is not run.

    Args:
        module: divided or not.
        here: whether this process asks.
    """
    if (root := fully_sharded.divided_by(module)) is not None:
        with fully_sharded.whole_parameters_on(module, root, here):
            yield
        return
    divided, copies = divided_parameters(module), []
    if divided:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        _let_arrive(divided)
        for parameter in divided:
            with GatheredParameters([parameter]):
                if here:
                    copies.append(parameter.data.to("cpu", copy=True))
    parts = [parameter.data for parameter in divided]
    try:
        for parameter, copied in zip(divided, copies):  # none where they are not asked for
            parameter.data = copied
        yield
    finally:
        for parameter, part in zip(divided, parts, strict=True):
            parameter.data = part


def divided_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of a module of which this process holds a part under ZeRO."""
    return [parameter for parameter in module.parameters() if hasattr(parameter, "ds_status")]


def remember_offload(offload) -> None:
    """Let parameters know who fetches them: DeepSpeed's `DeepSpeedZeRoOffload`."""
    for parameter in divided_parameters(offload.module):
        parameter.divided_by = offload


def _offload(divided: list[nn.Parameter]):
    return getattr(divided[0], "divided_by", None)


def _let_arrive(divided: list[nn.Parameter]) -> None:
    """What was asked for ahead of its use comes, and is let go again."""
    if (offload := _offload(divided)) is not None:
        offload.get_param_coordinator()._clean_inflight_param_registry()


@contextmanager
def _without_fetching(divided: list[nn.Parameter]) -> Iterator[None]:
    """Within the block modules neither gather nor release, and nobody compares the order of their calls among processes."""
    offload = _offload(divided)
    if offload is None:
        yield
        return
    from deepspeed.runtime.zero import parameter_offload

    before = dict(vars(offload))
    # a module's hook takes itself from the stack again
    offload.pre_sub_module_forward_function = lambda module: parameter_offload.FWD_MODULE_STACK.append(module)
    offload.post_sub_module_forward_function = lambda module: None
    try:
        yield
    finally:
        for name in ("pre_sub_module_forward_function", "post_sub_module_forward_function"):
            if name in before:  # a block around this one
                setattr(offload, name, before[name])
            else:
                delattr(offload, name)
