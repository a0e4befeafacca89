"""What ZeRO and FSDP do with a method's parameters while it trains, and which experts get no token."""

from __future__ import annotations

import lightning as L
import torch

from lit_llm.models import dispatch, experts, fully_sharded
from lit_llm.models.language_model import Frozen
from lit_llm.models.sharding import divided_parameters
from lit_llm.models.surgery import layer_stack


class DividedWatch(L.Callback):
    """Counts for `tools/check_scale.py`.

    Attributes:
        counted: `head`: largest number of times that the student's head was gathered in a micro-batch after the first;
            `divided`: share of the method's parameters of which each process holds a part; `frozen`: of which parts of the
            frozen models it holds a part, `nothing`, `layers` (all of the decoder layers) or `something else`;
            `frozen_trains`: whether any of their parameters does; `experts_without_tokens`: whether there were any, on one
            rank or another.
    """

    def __init__(self) -> None:
        self.counted: dict[str, object] = {}
        self._gathers, self._most, self._empty = 0, 0, False

    def on_train_start(self, trainer, pl_module) -> None:
        parameters, divided = list(pl_module.parameters()), divided_parameters(pl_module)
        self._step = fully_sharded.divided_by(pl_module)
        frozen = [module.model for module in pl_module.modules() if isinstance(module, Frozen)]
        inside = {id(parameter) for parameter in parameters}
        own = [p for model in frozen for p in getattr(model, "parameters", list)() if id(p) not in inside]
        layers = {id(p) for model in frozen if own for p in layer_stack(model.transformer).parameters()} - inside
        parts = [p for p in parameters if hasattr(p, "full_tensor")] if self._step else divided
        self.counted["divided"] = len([p for p in parts if self._step or not p.numel()]) / len(parameters)
        partial = frozenset(id(p) for p in own if not p.numel() or _is_part(p))
        self.counted["frozen"] = {frozenset(layers): "layers", frozenset(): "nothing"}.get(partial, "something else")
        self.counted["frozen_trains"] = any(p.requires_grad for p in own)
        if self._step is not None:
            self._watch_step()
        elif divided:
            self._watch(divided, pl_module.student.transformer.get_output_embeddings().weight)
        self._watch_experts()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._gathers = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx > 0:  # in the first one it is found out who needs what
            self._most = max(self._most, self._gathers)

    def on_train_end(self, trainer, pl_module) -> None:
        if self._step is not None or divided_parameters(pl_module):
            self.counted["head"] = self._most
        empty = torch.tensor(float(self._empty))
        self.counted["experts_without_tokens"] = bool(trainer.strategy.reduce(empty, reduce_op="sum") > 0)
        experts.dispatch.segments = self._segments

    def _watch(self, divided: list, head) -> None:
        for parameter in divided:
            parameter.all_gather = self._counting(parameter.all_gather, parameter, head)
            parameter.all_gather_coalesced = self._counting(parameter.all_gather_coalesced, parameter, head)

    def _counting(self, gather, parameter, head):
        def counting(params=None, *arguments, **settings):
            wanted = settings.get("param_list", params)
            self._gathers += any(p is head for p in ([parameter] if wanted is None else wanted))
            return gather(*([] if params is None else [params]), *arguments, **settings)

        return counting

    def _watch_step(self) -> None:
        """What the step gathers, it gathers at once: embeddings, head, norm, projectors."""
        for part in self._step.modules():
            if part is self._step:
                (group,) = part._get_fsdp_state()._fsdp_param_groups
                group.unshard = self._counting_gathers(group, group.unshard)

    def _counting_gathers(self, group, unshard):
        def counting(*arguments, **settings):
            self._gathers += not group.is_unsharded
            return unshard(*arguments, **settings)

        return counting

    def _watch_experts(self) -> None:
        self._segments = dispatch.segments

        def segments(*arguments):
            found = self._segments(*arguments)
            self._empty |= any(0 in segment.counts for segment in found[1:] if segment.counts)
            return found

        experts.dispatch.segments = segments


def _is_part(parameter) -> bool:
    return hasattr(parameter, "full_tensor") and parameter.to_local().numel() < parameter.numel()
