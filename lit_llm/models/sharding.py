"""Weights that a strategy divides among processes: their true size, and how they become whole for a while.

DeepSpeed's ZeRO stage 3 leaves an empty tensor in a parameter's place outside its module's own forward and backward pass.
Everything here does nothing to parameters that are whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import torch
from torch import nn

_claims = count(start=-1, step=-1)  # DeepSpeed numbers its own from 0 on


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, also where this process holds a part of it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def whole_numel(parameter: nn.Parameter) -> int:
    """How many numbers a parameter has, also where this process holds a part of it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def is_divided(module: nn.Module) -> bool:
    """Whether a module has parameters that are divided among processes."""
    return any(hasattr(parameter, "ds_status") for parameter in module.parameters())


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within the block every process holds all weights of a module, however often, and in whatever order, each runs it.

    All processes enter and leave together. Inside, gradients may be formed as well.
    """
    divided = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_status")]
    if not divided:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    missing = [parameter for parameter in divided if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    if missing:
        missing[0].all_gather(param_list=missing)
    claim = next(_claims)
    for parameter in divided:  # as a module in use claims its parameters, so that nothing lets go of them
        parameter.ds_active_sub_modules.add(claim)
    try:
        yield
    finally:
        for parameter in divided:
            parameter.ds_active_sub_modules.discard(claim)
        unused = [parameter for parameter in missing if not parameter.ds_active_sub_modules]
        if unused:
            unused[0].partition(param_list=unused, has_been_updated=False)


@contextmanager
def whole_on(module: nn.Module, here: bool) -> Iterator[None]:
    """Within the block the processes that ask for it hold all weights of a module on the CPU, to write them somewhere.

    All processes enter together; weights are gathered one by one, so a device need not hold all at once. Inside, the
    module is not run.

    Args:
        module: divided or not.
        here: whether this process asks.
    """
    divided = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_status")]
    copies = []
    if divided:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        for parameter in divided:
            with GatheredParameters([parameter]):
                if here:
                    copies.append(parameter.data.to("cpu", copy=True))
    parts = [parameter.data for parameter in divided]
    try:
        for parameter, copied in zip(divided, copies):
            parameter.data = copied
        yield
    finally:
        for parameter, part in zip(divided, parts, strict=True):
            parameter.data = part
