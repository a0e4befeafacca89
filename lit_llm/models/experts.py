"""The routed layer that replaces a decoder layer's MLP (MoE-LPR, arXiv 2408.11396; LayerMoE, arXiv 2505.22582).

Expert 0 is the original MLP, untouched and under its own parameter names. Every expansion adds one bank of experts,
copies of it in stacked tensors. A router weighs the k best experts of a token; a classifier in front of it may send a
token to expert 0 alone.

Where all experts still equal the original MLP, the mixture of equal outputs *is* that output, so the layer gives exactly
the dense layer's numbers: an expanded model starts with the logits of the dense one, to the last bit, whatever shapes
the products have. Until the first update this costs a comparison of weights, and in training one dense MLP.

Shapes: B rows, T positions, M = B T, H hidden size, F inner size, N experts of a layer, k per token, n rows of a segment.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lit_llm.models import dispatch
from lit_llm.models.dispatch import Dispatch, Segment
from lit_llm.models.expert_loop import loop_experts
from lit_llm.models.mlp_kinds import MlpKind, as_stack, is_plain, mlp_kind, stacked_layout, weight_of
from lit_llm.models.routing_records import Collector, Routing, collect_routing

__all__ = ["Classifier", "ExpertBank", "RoutedMLP", "Router", "Routing", "collect_routing"]

Scope = Literal["token", "sequence_sum"]
Gate = Literal["predicted", "label"]


class Router(nn.Module):
    """A linear map to a few scores, kept and computed in float32 whatever the type of the model.

    In bfloat16 it would not learn: weights near 0.03 are 1.2e-4 apart, and a step of 5e-5 rounds to nothing.

    Args:
        rows: scores.
        hidden_size: H.
        device: of the weight.
    """

    def __init__(self, rows: int, hidden_size: int, device: torch.device | None = None) -> None:
        super().__init__()
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.weight = nn.Parameter(torch.empty(rows, hidden_size, dtype=wide, device=device))

    @torch.no_grad()
    def reset(self, generator: torch.Generator, start: int = 0) -> None:
        """Xavier normal for the rows from `start` on; drawn on the CPU, so the same on every device."""
        rows, hidden_size = self.weight.shape
        drawn = torch.empty(rows - start, hidden_size, device="cpu")
        drawn.normal_(0.0, math.sqrt(2.0 / (hidden_size + rows)), generator=generator)
        if not self.weight.is_meta:
            self.weight[start:] = drawn.to(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            return functional.linear(x.to(wide), self.weight.to(wide))

    def _apply(self, fn, recurse: bool = True):
        """Follow devices, but no type narrower than float32."""

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(device=moved.device, dtype=torch.float32) if narrow else moved

        return super()._apply(keep_wide, recurse)


class Classifier(Router):
    """Tells original languages (class 0) from new ones (class 1), in front of a router.

    Args:
        hidden_size: H.
        scope: decide per `token`, or once per row from the plain sum of its positions (`sequence_sum`, as released: not
            causal, so not for generation).
        threshold: a token with a larger probability of class 0 uses expert 0 alone.
        gate: decide by prediction, or in training by the labels given to `collect_routing`.
        device: of the weight.
        reach: for the released code's unused branch with a class per group of languages: among how many experts, in
            order of addition, each class is routed. None: two classes, expert 0 alone or all experts.
    """

    def __init__(
        self,
        hidden_size: int,
        scope: Scope = "token",
        threshold: float = 0.5,
        gate: Gate = "predicted",
        device: torch.device | None = None,
        reach: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(2 if reach is None else len(reach), hidden_size, device)
        self.reach = reach
        if reach is not None and reach[0] != 1:
            raise ValueError(f"The classifier's reach is {reach}; its first class uses expert 0 alone, so 1.")
        if not 0 < threshold < 1:
            raise ValueError(f"The classifier's threshold is {threshold}; it is a probability between 0 and 1.")
        self.scope, self.threshold, self.gate = scope, threshold, gate

    def decide(self, x_BTH: Tensor, collector: Collector | None) -> tuple[Tensor, Tensor]:
        """Logits (M or B, 2), and the class (M,) of every position. No gradient flows through the decision.

        Raises:
            ValueError: the gate follows labels, and there are none.
        """
        batch, length, _ = x_BTH.shape
        by_row = self.scope == "sequence_sum"
        wide = torch.promote_types(x_BTH.dtype, torch.float32)
        logits = self(x_BTH.sum(1, dtype=wide) if by_row else x_BTH.flatten(0, 1))
        if self.gate == "label" and self.training:
            labels_M = None if collector is None else collector.labels_M
            if labels_M is None:
                raise ValueError(
                    "classifier_gate is 'label', but no labels were given. Run the model inside "
                    "`collect_routing(model, token_labels=...)`, or use 'predicted'."
                )
            labels = labels_M.view(batch, length)[:, 0] if by_row else labels_M
            decided = torch.where(labels < 0, 1, labels).clamp(max=len(self.weight) - 1)
        elif len(self.weight) == 2:
            decided = (logits.detach().softmax(-1)[:, 0] <= self.threshold).long()
        else:
            decided = logits.argmax(-1)
        return logits, decided.repeat_interleave(length, output_size=batch * length) if by_row else decided

    def extra_repr(self) -> str:
        return f"scope={self.scope}, threshold={self.threshold}, gate={self.gate}"


class ExpertBank(nn.Module):
    """The experts of one expansion in stacked tensors, so that they are trained or frozen as one.

    Args:
        base: the MLP that they are copies of.
        kind: of the MLP.
        count: how many.
    """

    def __init__(self, base: nn.Module, kind: MlpKind, count: int) -> None:
        super().__init__()
        self.kind, self.count = kind, count
        self._maybe_copies = True
        for name, parts in stacked_layout(base, self.kind).items():
            shape = (count, sum(len(part) for part in parts), *parts[0].shape[1:])
            self.register_parameter(name, nn.Parameter(parts[0].new_empty(shape)))

    @torch.no_grad()
    def copy(self, base: nn.Module) -> None:
        """Make every expert a copy of `base`."""
        for name, parts in stacked_layout(base, self.kind).items():
            self.get_parameter(name).copy_(torch.cat(parts))

    @torch.no_grad()
    def copies(self, base: nn.Module) -> bool:
        """Whether every expert has exactly the weights of `base`. Once they differ, they are taken to differ for good."""
        self._maybe_copies = self._maybe_copies and all(
            _equal(ours, theirs)
            for name, parts in stacked_layout(base, self.kind).items()
            for expert in self.get_parameter(name)
            for ours, theirs in zip(expert.split([len(part) for part in parts]), parts)
        )
        return self._maybe_copies

    def forward(self, x_nH: Tensor, segment: Segment, backend: str, base: nn.Module) -> Tensor:
        """(n, H) outputs of the segment's rows, each by its expert; activation and dropout are those of `base`."""
        kind, activation = self.kind, self.kind.activation(base)
        first, second = ((self.get_parameter(name), getattr(self, f"{name}_bias", None)) for name in kind.stacked_names)
        if backend == "loop":
            out_nH = loop_experts(x_nH, *first, *second, segment.counts, activation)
        else:
            projected = dispatch.grouped_product(x_nH, *first, segment.ends_E)
            out_nH = dispatch.grouped_product(kind.hidden([projected], activation), *second, segment.ends_E)
        return functional.dropout(out_nH, kind.dropout(base), self.training)

    def extra_repr(self) -> str:
        return f"count={self.count}, kind={self.kind.name}"


class RoutedMLP(nn.Module):
    """Replaces the MLP of a decoder layer by that MLP and added experts.

    Args:
        base: the original MLP, expert 0.
        layer_index: of the decoder layer; names its records.
        experts_per_token: k; all experts where there are fewer.
        renormalise: divide the weights of the chosen experts by their sum. The released code does not for k = 1, which
            scales the output by a probability: such a layer does not start as the dense one.
        backend: how rows are multiplied, see `dispatch.backend`.

    Attributes:
        experts: banks by the number of their expansion, "1" onwards; expansions without experts here have none.
        router: scores all experts; None until `set_router`.
        classifier: in front of the router, or None.
    """

    def __init__(
        self,
        base: nn.Module,
        layer_index: int = 0,
        experts_per_token: int = 2,
        renormalise: bool = True,
        backend: Dispatch = "auto",
    ) -> None:
        super().__init__()
        if experts_per_token < 1:
            raise ValueError(f"experts_per_token is {experts_per_token}; it must be at least 1.")
        self.base, self.kind = base, mlp_kind(base)
        weight = weight_of(getattr(base, self.kind.inputs[0]))
        if not weight.is_floating_point():
            raise ValueError(
                f"The weights of {type(base).__name__} are quantised ({weight.dtype}), and experts cannot be copied from "
                f"them. Expand the model without quantization."
            )
        self.layer_index, self.experts_per_token, self.renormalise = layer_index, experts_per_token, renormalise
        self.backend: Dispatch = backend
        self.inner_size, self.hidden_size = (
            getattr(base, self.kind.output).weight.numel() // weight.shape[1],
            weight.shape[1],
        )
        self.experts = nn.ModuleDict()
        self.router: Router | None = None
        self.classifier: Classifier | None = None
        self.collector: Collector | None = None

    @property
    def num_experts(self) -> int:
        """N, expert 0 included."""
        return 1 + sum(bank.count for bank in self.experts.values())

    @property
    def device(self) -> torch.device:
        return getattr(self.base, self.kind.output).weight.device

    def add_experts(self, group: int, count: int) -> ExpertBank:
        """Append a bank of copies of the original MLP; the router must follow."""
        bank = ExpertBank(self.base, self.kind, count)
        bank.copy(self.base)
        self.experts[str(group)] = bank.train(self.training)
        return bank

    def set_router(self, generator: torch.Generator, keep: bool = False) -> None:
        """A router over all experts: fresh, or with the rows that it had and fresh ones for the rest."""
        old = self.router
        self.router = Router(self.num_experts, self.hidden_size, self.device).train(self.training)
        kept = len(old.weight) if keep and old is not None else 0
        self.router.reset(generator, start=kept)
        if kept:
            with torch.no_grad():
                self.router.weight[:kept] = old.weight

    def forward(self, x_BTH: Tensor) -> Tensor:
        collector = self.collector
        records = collector is not None and collector.takes_records
        learns = torch.is_grad_enabled() and self._trains()
        copies = self._gives_dense_output()
        if copies and not learns and not records:
            return self.base(x_BTH)
        routing = self._route(x_BTH, collector)
        if records:
            collector.take(self.layer_index, self.training, routing)
        if copies and not learns:
            return self.base(x_BTH)
        y_BTH = self._mix(x_BTH.flatten(0, -2), routing).view_as(x_BTH)
        if copies:
            with torch.no_grad():
                dense_BTH = self.base(x_BTH)
            return _Anchored.apply(dense_BTH, y_BTH, routing.classifier_logits)
        if learns and routing.classifier_logits is not None:
            return _Anchored.apply(y_BTH.detach(), y_BTH, routing.classifier_logits)
        return y_BTH

    def _trains(self) -> bool:
        return any(
            parameter.requires_grad
            for part in (self.experts, self.router, self.classifier)
            if part is not None
            for parameter in part.parameters()
        )

    def _gives_dense_output(self) -> bool:
        """Whether the mixture is one of equal outputs with weights that add up to one."""
        if not self.renormalise or (self.training and self.kind.dropout(self.base) > 0):
            return False
        return all(bank.copies(self.base) for bank in self.experts.values())

    def _route(self, x_BTH: Tensor, collector: Collector | None) -> Routing:
        logits_MN = scores_MN = self.router(x_BTH.flatten(0, -2))
        classifier_logits = bypass_M = None
        if self.classifier is not None:
            classifier_logits, class_M = self.classifier.decide(x_BTH, collector)
            bypass_M = class_M == 0
            if self.classifier.reach is not None:
                reach_M = torch.tensor(self.classifier.reach, device=class_M.device)[class_M]
                beyond_MN = torch.arange(self.num_experts, device=class_M.device) >= reach_M[:, None]
                scores_MN = logits_MN.masked_fill(beyond_MN, -torch.inf)
        top = scores_MN.softmax(-1).topk(min(self.experts_per_token, self.num_experts))
        gates_Mk = top.values / top.values.sum(-1, keepdim=True) if self.renormalise else top.values
        return Routing(logits_MN, top.indices, gates_Mk, classifier_logits, bypass_M)

    def _mix(self, x_MH: Tensor, routing: Routing) -> Tensor:
        """(M, H) weighted sum of the routed experts."""
        dtype = dispatch.product_dtype(x_MH)
        backend = dispatch.backend(self.backend, dtype, x_MH.device, (self.hidden_size, self.inner_size))
        on_host = self.reads_counts(x_MH, backend)
        stacks = [1, *(bank.count for bank in self.experts.values())]
        parts = dispatch.segments(routing.experts_Mk, stacks, on_host)
        base_rows_nH, *bank_rows = dispatch.gather(x_MH, parts)
        if on_host:
            y_nH = self.base(base_rows_nH)
        else:
            y_nH = as_stack(
                self.base, self.kind, base_rows_nH, lambda *given: dispatch.grouped_product(*given, parts[0].ends_E)
            )
            y_nH = functional.dropout(y_nH, self.kind.dropout(self.base), self.training)
        banks = zip(self.experts.values(), bank_rows, parts[1:], strict=True)
        ys_nH = [y_nH, *(bank(rows_nH, part, backend, self.base) for bank, rows_nH, part in banks)]
        return dispatch.combine(ys_nH, routing.weights_Mk, parts).to(y_nH.dtype)

    def reads_counts(self, x_MH: Tensor, backend: str) -> bool:
        """Whether the host learns how many rows each expert has: for free on a CPU, else only where nothing else works."""
        # what is not plain only its own forward can compute, and that needs exact rows
        return x_MH.device.type == "cpu" or backend == "loop" or not is_plain(self.base, self.kind)

    def extra_repr(self) -> str:
        return f"layer={self.layer_index}, experts={self.num_experts}, experts_per_token={self.experts_per_token}"


class _Anchored(torch.autograd.Function):
    """`value`, whose gradient goes to `mixture`; `logits` that decide without gradient take part in the graph with zeros.

    A parameter that is in the graph on some ranks only would be reduced wrongly, or never.
    """

    @staticmethod
    def forward(ctx, value: Tensor, mixture: Tensor, logits: Tensor | None) -> Tensor:
        ctx.logits = None if logits is None else (logits.shape, logits.dtype)
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        zeros = None if ctx.logits is None else grad.new_zeros(ctx.logits[0], dtype=ctx.logits[1])
        return None, grad, zeros


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    known = ours.numel() > 0 and not ours.is_meta  # a sharded parameter has no values outside its own forward
    return known and ours.shape == theirs.shape and torch.equal(ours, theirs)
