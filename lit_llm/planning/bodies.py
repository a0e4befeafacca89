"""Models without weights: their parameters, the memory that their bodies take, and their FLOPs.

The real transformers model runs on fake tensors, which have shapes and no numbers, so the figures are those of the real
code for every architecture, with adapters and gradient checkpointing.

Shapes: L positions, D width, T supervised positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lit_llm.data.batch import TokenBatch
from lit_llm.models import sources
from lit_llm.models.adapters import with_adapters
from lit_llm.models.language_model import LanguageModel, ModelSpec
from lit_llm.planning.live_bytes import LiveBytes


@dataclass(frozen=True)
class Precision:
    """Lightning's precision in two parts.

    Attributes:
        weights: dtype that all weights are turned into; None: as the model spec says.
        autocast: dtype of the products; None: that of the weights.
    """

    weights: torch.dtype | None = None
    autocast: torch.dtype | None = None

    @classmethod
    def named(cls, name: str | int | None) -> Precision:
        """From `trainer.precision`."""
        bits, _, kind = str(name or "32-true").partition("-")
        dtype = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}.get(bits)
        return cls(autocast=dtype) if kind == "mixed" else cls(weights=dtype)

    def context(self):
        return nullcontext() if self.autocast is None else torch.autocast("cpu", dtype=self.autocast)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; a head that is tied to the embedding counts with the head."""

    body: int
    head: int
    trained: int

    @property
    def total(self) -> int:
        return self.body + self.head


@dataclass(frozen=True)
class BodyCost:
    """What the body takes over one micro-batch, beside the weights.

    Attributes:
        forward_peak: bytes at the highest point of the forward pass.
        kept: bytes that wait for the backward pass.
        backward_peak: bytes at its highest point, the gradients of the weights included.
        forward_flops: FLOPs of the forward pass.
        backward_flops: FLOPs of the backward pass.
    """

    forward_peak: int
    kept: int
    backward_peak: int
    forward_flops: int
    backward_flops: int


class FakeModel:
    """A causal language model as the spec describes it, in shapes only.

    Args:
        spec: which model.
        precision: of the run.

    Raises:
        ValueError: its config cannot be had, or does not fit.
    """

    def __init__(self, spec: ModelSpec, precision: Precision) -> None:
        self.precision = precision
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.folder_config = None if spec.source is None else _config(spec.source)
        with torch.device("meta"):
            self.model = _built(spec, self.folder_config, precision.weights or getattr(torch, spec.dtype)).train()
        self.transformer = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        with self.mode:
            self.model.to_empty(device="cpu")
            self.transformer.tie_weights()  # converting tensors has made copies of a shared one

    @property
    def head(self) -> nn.Linear:
        return self.transformer.get_output_embeddings()

    @property
    def trains_head(self) -> bool:
        return self.head.weight.requires_grad

    def parameters(self) -> Parameters:
        every = list(self.model.parameters())
        head = sum(parameter.numel() for parameter in self.head.parameters())
        total = sum(parameter.numel() for parameter in every)
        return Parameters(total - head, head, sum(p.numel() for p in every if p.requires_grad))

    def weight_bytes(self, trained_only: bool = False) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad or not trained_only)

    def branches(self, tokens: TokenBatch) -> bool:
        """Whether two answers share the run of their prompt."""
        return _InShapes(self.model).branches(tokens)

    def cost(self, runs: Sequence[TokenBatch], *, train: bool) -> BodyCost:
        """Run the body over these tokens one after the other, and backward where `train`."""
        self.model.train(train)
        with _keeping_generators(), self.mode, torch.set_grad_enabled(train), self.precision.context():
            with FlopCounterMode(display=False) as counter, LiveBytes() as live:
                hidden = [self._hidden(tokens) for tokens in runs]
                hidden_TD = torch.cat(hidden) if len(hidden) > 1 else hidden[0]
                del hidden
                forward_peak, kept, forward_flops = live.peak, live.now, counter.get_total_flops()
                if not train:
                    return BodyCost(forward_peak, kept, 0, forward_flops, 0)
                live.begin()
                hidden_TD.backward(torch.ones_like(hidden_TD))
                backward_flops = counter.get_total_flops() - forward_flops
            self.model.zero_grad(set_to_none=True)
        return BodyCost(forward_peak, kept, live.peak, forward_flops, backward_flops)

    def _hidden(self, tokens: TokenBatch) -> torch.Tensor:
        """(T, D)"""
        if tokens.branch_RL is None:  # where packed sequences begin is found by looking at numbers
            tokens = replace(tokens, position_ids_RL=None)
        names = (field.name for field in fields(tokens) if isinstance(getattr(tokens, field.name), torch.Tensor))
        in_shapes = {name: torch.zeros_like(getattr(tokens, name)) for name in names}
        return _InShapes(self.model).hidden(replace(tokens, **in_shapes))


class _InShapes(LanguageModel):
    """The way from tokens to hidden states, without tokenizer and checks, which look at numbers."""

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.model, self._packing_unknown = model, False


def _config(source: str):
    from transformers import AutoConfig

    return sources._load(AutoConfig.from_pretrained, sources.locate(source), "model config")


def _built(spec: ModelSpec, config, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    if config is None:
        model = sources.random_start(spec.config, spec.attention, dtype, spec.load_tokenizer())
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=spec.attention)
        if spec.keep_layers is not None:
            model = sources.cut(model, spec.keep_layers, spec.source)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
        )
    return model if spec.lora is None else with_adapters(model, spec.lora)


@contextmanager
def _keeping_generators() -> Iterator[None]:
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
