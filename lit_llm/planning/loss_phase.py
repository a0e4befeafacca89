"""Memory and FLOPs of everything after the bodies: heads, losses, projectors.

The method's own `training_step` runs on real tensors with the real vocabularies and the real number of rows, but with
hidden states a few numbers wide, at two widths. Memory and head products are linear in the width, so two points give
the line; the chunks that the loss cuts are the real ones.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lit_llm.data.batch import PreferenceBatch, TokenBatch
from lit_llm.losses.head import Head
from lit_llm.losses.scratch import release_scratch, scratch_bytes
from lit_llm.methods.align_distil import AlignDistil
from lit_llm.methods.base import Method
from lit_llm.methods.frozen_pair import FrozenPair
from lit_llm.methods.step_sums import StepSums
from lit_llm.models.language_model import Frozen
from lit_llm.planning.bodies import FakeModel, Precision
from lit_llm.planning.cast import Batch, Cast
from lit_llm.planning.live_bytes import LiveBytes

_NARROW = 16  # of the wider of the two models, at the first of the two widths


@dataclass(frozen=True)
class LossCost:
    """Of one micro-batch. What is kept from one step to the next is counted apart.

    Attributes:
        forward_peak: bytes at the highest point of the forward pass.
        kept: bytes that wait for the backward pass: gradients of heads and hidden states.
        backward_peak: bytes at the highest point until the gradient has reached the hidden states.
        left: bytes afterwards: the head's gradient.
        scratch: bytes kept for the logits of the next step.
        large: bytes of an evaluation that large blocks take at their highest point.
        flops: of the products with the heads, forward and backward.
    """

    forward_peak: int
    kept: int
    backward_peak: int
    left: int
    scratch: int
    large: int
    flops: int


class NarrowModel(nn.Module):
    """Stands for a language model: its head and embedding, `width` wide, and hidden states from nowhere."""

    def __init__(self, fake: FakeModel, width: int, eos_id: int, trained: bool) -> None:
        super().__init__()
        self.branches = fake.branches
        dtype = fake.head.weight.dtype
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(fake.head.out_features, width, generator=generator, dtype=torch.float32)
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=trained)
        # every prediction is the end of the text, which each vocabulary can map: no row drops out
        bias = torch.zeros(fake.head.out_features, dtype=dtype)
        bias[eos_id] = 1e3
        self.register_buffer("bias", bias)
        self.softcap = getattr(fake.transformer.config.get_text_config(), "final_logit_softcapping", None)
        self.hidden_size, self.vocab_size = width, fake.head.out_features

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias, None if self.softcap is None else 1e4)

    @property
    def trains_head(self) -> bool:
        return self.weight.requires_grad

    @property
    def input_embedding(self) -> Tensor:
        return self.weight

    def hidden(self, tokens: TokenBatch) -> Tensor:
        """(T, width)"""
        return torch.zeros(
            tokens.num_supervised, self.hidden_size, dtype=self.weight.dtype, requires_grad=torch.is_grad_enabled()
        )


def loss_cost(method: Method, cast: Cast, batch: Batch, precision: Precision, evaluate: bool = False) -> LossCost:
    """Measure the loss of one micro-batch at two small widths and extend the line to the real ones.

    Args:
        method: of the run; it is not changed.
        cast: its models, in shapes.
        batch: with the rows to be measured.
        precision: of the run.
        evaluate: measure the evaluation of the batch, without gradients, instead of the training step.
    """
    models = [cast.student, *(role.model for role in cast.frozen.values())]
    widths = [model.head.in_features for model in models]
    if isinstance(batch, PreferenceBatch):
        batch = replace(batch, reference_B2=torch.zeros(len(batch.examples), 2))
    divisor = max(max(widths) / _NARROW, 1.0)
    found, reached = [], []
    for factor in (divisor, divisor / 2):
        narrow = [max(round(width / factor), 1) for width in widths]
        found.append(_measured(method, cast, narrow, batch, precision, evaluate))
        reached.append(narrow[0])
    slope_to = (widths[0] - reached[0]) / max(reached[1] - reached[0], 1)
    return LossCost(*(round(a + (b - a) * slope_to) for a, b in zip(*found, strict=True)))


def _measured(
    method: Method, cast: Cast, widths: list[int], batch: Batch, precision: Precision, evaluate: bool
) -> tuple[int, ...]:
    """The fields of `LossCost`."""
    release_scratch()  # what a loss keeps for its next chunk is part of what it takes
    with _silence():
        twin = _twin(method, cast, widths)
        with precision.context(), FlopCounterMode(display=False) as counter, LiveBytes() as live:
            if evaluate:
                with torch.no_grad():
                    twin.evaluate(batch, "val")
                kept = scratch_bytes()
                return live.peak - kept, 0, 0, 0, kept, max(live.large_peak - kept, 0), counter.get_total_flops()
            loss = twin.training_step(batch, 0)
            forward = live.peak, live.now
            live.begin()
            loss.backward()
            del loss
            kept = scratch_bytes()
            return *(size - kept for size in (*forward, live.peak, live.now)), kept, 0, counter.get_total_flops()


def _twin(method: Method, cast: Cast, widths: list[int]) -> Method:
    """The same method around narrow models, without a trainer."""
    twin = copy.copy(method)
    twin.rollouts = None  # as many answers are compared, of other lengths; the data stand for them
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        twin.__dict__[name] = copy.copy(method.__dict__[name])
    for name in ("_evaluated_hidden", "_evaluated_terms"):
        twin.__dict__[name] = {}
    for name in ("settings", "dual_space"):
        twin.__dict__.pop(name, None)
    twin._trainer = None
    twin.student = NarrowModel(cast.student, widths[0], twin.student_tokenizer.eos_token_id, cast.student.trains_head)
    tokenizer = twin.teacher_tokenizer or twin.student_tokenizer
    for role, width in zip(cast.frozen.values(), widths[1:], strict=True):
        narrow = NarrowModel(role.model, width, tokenizer.eos_token_id, trained=False)
        setattr(twin, role.attribute, Frozen(narrow))
    if isinstance(method, AlignDistil):
        twin.frozen_pair = FrozenPair(twin)
    if hasattr(twin, "projectors"):  # a mask may let every row through
        twin.projectors = replace(twin.projectors, student_mask="none", agreement_threshold=1.0)
    twin.on_validation_epoch_start()  # what an evaluation gathers does not go to the method itself
    twin.log = twin.log_loss = twin.log_means = lambda *arguments, **settings: None
    twin.step_sums = StepSums()
    twin.step_weight = lambda batch, count: 1 / max(count, 1)
    twin.configure_model()
    return twin.train()


@contextmanager
def _silence() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        logging.disable(before)
