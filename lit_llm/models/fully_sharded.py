"""Modules whose weights FSDP2 (torch's `fully_shard`; arXiv 2304.11277) divides among processes.

A decoder layer is gathered when it runs, forward and backward. Everything else (embeddings, head, final norm, projectors)
is gathered once when a step begins and stays whole until its gradients are there, so losses may read it wherever they like.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

_STATE_HOOKS = ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
_ALL_HOOKS = ("_forward_pre_hooks", "_forward_hooks", *_STATE_HOOKS)

_root_of: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()


class Step(nn.Module):
    """Runs the training step of a method; for `fully_shard`, what the forward pass is.

    Attributes:
        beside: parts of the method that are gathered by themselves as the step begins, and stay whole as it does.
    """

    def __init__(self, method: nn.Module, beside: list[nn.Module]) -> None:
        super().__init__()
        self.method, self.beside = method, beside

    def forward(self, *args, **kwargs):
        for part in self.beside:
            part.unshard()
        return self.method.training_step(*args, **kwargs)


def divide(method: nn.Module, layers: Iterable[nn.Module], mesh) -> Step:
    """Keep a part of every parameter of a method in this process, on the device of the mesh.

    Args:
        method: has a `training_step`; all its parameters are divided.
        layers: inside, each gathered by itself.
        mesh: of one dimension.

    Returns:
        What runs the training step from now on, in every process equally often.

    Raises:
        ValueError: a parameter that is no floating-point number.
    """
    from torch.distributed.fsdp import fully_shard

    for name, parameter in method.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"{name} is {parameter.dtype}: quantised weights are not divided among processes. Set model.student.quantization: "
                f"null, or train with configs/trainer/ddp.yaml."
            )
    divided: set[nn.Parameter] = set()
    for layer in layers:
        for part in [*_of_rare_types(layer, set()), layer]:
            fully_shard(part, mesh=mesh)
        divided |= set(layer.parameters())
    beside = _of_rare_types(method, divided)
    for part in beside:
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
    step = fully_shard(Step(method, beside), mesh=mesh, reshard_after_forward=False)
    step._get_fsdp_state()._lazy_init()  # parts may run before the first step: evaluation, sampled answers
    belongs_to(method, step)
    return step


def belongs_to(module: nn.Module, root: nn.Module) -> None:
    """Remember of a module and all its parts what `fully_shard` knows as their root."""
    for part in module.modules():
        _root_of[part] = ref(root)


def divided_by(module: nn.Module) -> nn.Module | None:
    """What `fully_shard` knows as the root of the whole that this module is a part of; None where nothing is divided."""
    found = _root_of.get(module)
    return None if found is None else found()


@contextmanager
def unsharded(module: nn.Module, root: nn.Module) -> Iterator[None]:
    """Within the block every process holds all weights of a module, and running it exchanges nothing."""
    with torch.inference_mode(False):
        inside, closed = [part for part in module.modules() if _is_sharded(part)], []
        resharding = [part for part in inside if any(group._reshard_after_forward for group in _groups(part))]
        for part in [root, *inside]:
            if not all(group.is_unsharded for group in _groups(part)):
                part.unshard()
                closed.append(part)
        for part in resharding:
            part.set_reshard_after_forward(False, recurse=False)
    before = len(root._get_fsdp_state()._comm_ctx.post_forward_order)
    try:
        with _hooks_laid_aside(root, _STATE_HOOKS):  # which would divide again what is asked for its state
            yield
    finally:
        forget_order(root, before)
        with torch.inference_mode(False):
            for part in resharding:
                part.set_reshard_after_forward(True, recurse=False)
            for part in closed:
                part.reshard()


def forget_order(root: nn.Module, kept: int = 0) -> None:
    """Forget which parts ran after the first so many: the next backward pass would gather them ahead, once for each run."""
    ran = root._get_fsdp_state()._comm_ctx.post_forward_order
    for group in ran[kept:]:
        group._post_forward_indices = [index for index in group._post_forward_indices if index < kept]
    del ran[kept:]


@contextmanager
def whole_parameters_on(module: nn.Module, root: nn.Module, here: bool) -> Iterator[None]:
    """Within the block the processes that ask for it hold a plain module with all weights on the CPU, which can be copied.

    All processes enter together; weights are gathered one by one.
    """
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    for part in root.modules():
        if _is_sharded(part):
            part.reshard()
    copies: dict[nn.Parameter, nn.Parameter] = {}
    for parameter in module.parameters():  # each once, tied ones too
        if _is_part(parameter):
            gathered = whole(parameter.detach())
            if here:
                copies[parameter] = nn.Parameter(gathered.to("cpu", copy=True), parameter.requires_grad)
    places = [(part, name, own) for part in module.modules() for name, own in part._parameters.items() if own in copies]
    marks = [(part, key) for part in module.modules() for key in (STATE_KEY, REGISTRY_KEY) if key in vars(part)]
    marks = [(part, key, vars(part).pop(key)) for part, key in marks]
    kinds = [(part, type(part)) for part in module.modules() if _is_sharded(part)]
    try:
        for part, name, own in places:
            part._parameters[name] = copies[own]
        for part, kind in kinds:
            part.__class__ = kind.__mro__[2]  # after the kind that FSDP made and its mark: what it was
        with _hooks_laid_aside(root, _ALL_HOOKS):
            yield
    finally:
        for part, kind in kinds:
            part.__class__ = kind
        for part, key, mark in marks:
            vars(part)[key] = mark
        for part, name, own in places:
            part._parameters[name] = own


@contextmanager
def _hooks_laid_aside(module: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Within the block the hooks that FSDP registered are not called, and not copied."""
    before = [(part, name, getattr(part, name)) for part in module.modules() for name in names if getattr(part, name)]
    for part, name, hooks in before:
        setattr(part, name, OrderedDict((key, hook) for key, hook in hooks.items() if not _is_of_fsdp(hook)))
    try:
        yield
    finally:
        for part, name, hooks in before:
            setattr(part, name, hooks)


def _is_of_fsdp(hook) -> bool:
    return "fully_shard" in getattr(getattr(hook, "hook", hook), "__module__", "")


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which this process may hold a part; every process asks."""
    return tensor.full_tensor() if _is_part(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, divided as another one is."""
    if not _is_part(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    here = tensor.to(like.device)  # all processes have it, so nothing is sent
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


def _of_rare_types(module: nn.Module, divided: set[nn.Parameter]) -> list[nn.Module]:
    """Parts with trained parameters of a rarer type (routers and projectors stay float32): one type is gathered together."""
    types: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        if parameter.requires_grad and parameter not in divided:
            types[parameter.dtype] += parameter.numel()
    rare = set(types) - {most for most, _ in types.most_common(1)}
    return [
        part
        for part in module.modules()
        if any(p.dtype in rare and p not in divided for p in part.parameters(recurse=False))
    ]


def _is_part(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module is slow to import


def _groups(part: nn.Module) -> list:
    return list(part._get_fsdp_state()._fsdp_param_groups)


def _is_sharded(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)
