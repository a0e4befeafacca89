"""What every method shares: models that are built late, optimizer groups, evaluation with generated answers, resume."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Optional

import numpy
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_llm.data.batch import DistillationBatch, LanguageBatch
from lit_llm.data.facts import Facts
from lit_llm.data.instructions import Instructions
from lit_llm.data.labelled_answers import LabelledAnswers
from lit_llm.data.languages import Languages
from lit_llm.data.preferences import Preferences
from lit_llm.data.tokenized import Alignment
from lit_llm.losses.fused_head import cross_entropy
from lit_llm.methods.answers import Answering, Generation
from lit_llm.methods.language_evaluation import LanguageEvaluation
from lit_llm.methods.schedule import learning_rate_factor
from lit_llm.methods.step_sums import StepSums
from lit_llm.models.fully_sharded import whole
from lit_llm.models.language_model import ModelSpec
from lit_llm.models.sharding import whole_shape

_LEARNED_FROM = {
    Instructions: "prompts with answers",
    Preferences: "pairs of answers",
    LabelledAnswers: "answers labelled good or bad",
    Languages: "text in several languages",
    Facts: "facts to edit",
}


@dataclass
class Optimization:
    """AdamW with a schedule over optimizer steps.

    Args:
        lr: peak learning rate.
        weight_decay: on matrices; biases and norm weights get none.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        schedule: `cosine` or `linear` decay to `final_lr`, or `constant`.
        warmup_steps: optimizer steps of linear warm-up.
        warmup_ratio: warm-up as a share of all steps; not together with warmup_steps.
        final_lr: learning rate at the last step.
    """

    lr: float = 5e-4
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    final_lr: float = 1e-7

    def __post_init__(self) -> None:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"optimization.warmup_steps ({self.warmup_steps}) and optimization.warmup_ratio ({self.warmup_ratio}) "
                "both set the warm-up. Keep one."
            )
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"optimization.warmup_ratio is {self.warmup_ratio}; it is a share of all steps, 0 to 1.")
        ranges = {
            "lr": (0 < self.lr < math.inf, "above 0"),
            "final_lr": (0 <= self.final_lr < math.inf, "at least 0"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0 (0 is off)"),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "two shares below 1, such as [0.9, 0.999]"),
            "eps": (0 < self.eps < math.inf, "above 0, such as 1e-8"),
            "warmup_steps": (self.warmup_steps >= 0, "at least 0 (0 is off)"),
        }
        for name, (fits, range_) in ranges.items():
            if not fits:
                raise ValueError(f"optimization.{name} is {getattr(self, name)}; it must be {range_}.")
        if self.schedule == "constant" and self.final_lr != type(self).final_lr:
            raise ValueError(
                f"optimization.final_lr is {self.final_lr}, but optimization.schedule is 'constant', which does not move towards "
                f"it. Leave it out, or set schedule: linear or cosine."
            )
        if self.final_lr > self.lr:
            raise ValueError(
                f"optimization.final_lr ({self.final_lr}) is above optimization.lr ({self.lr}). Lower the first."
            )


class Method(Answering):
    """A training method: a student, perhaps frozen models beside it, and a loss.

    Subclasses write `training_step` and, where they compare with a teacher, `evaluate`.

    Args:
        student: the model that is trained.
        optimization: optimizer and schedule.
        generation: answers generated during evaluation.
        loss_chunk: supervised tokens whose logits exist at a time. None chooses by the vocabulary.

    Attributes:
        alignments: the ways to pair tokens of two tokenizers that the method understands, see `Instructions.alignment`;
            the first one is used where the data does not choose.
        data_classes: the data modules that it learns from.
        compiles_loss: whether `--compile_loss` has something to compile.
        step_sums: what is logged of the optimizer step that is being made.
    """

    alignments: tuple[Alignment, ...] = ("bytes", "released")
    data_classes: tuple[type, ...] = (Instructions,)
    compiles_loss = True

    def __init__(
        self,
        student: ModelSpec,
        optimization: Optimization = Optimization(),
        generation: Generation = Generation(),
        loss_chunk: Optional[int] = None,
    ) -> None:
        super().__init__(generation)
        if loss_chunk is not None and loss_chunk < 1:
            raise ValueError(f"model.loss_chunk is {loss_chunk}; it counts tokens. Leave it out for the default.")
        if student.quantization is not None and student.lora is None:
            raise ValueError(
                f"model.student.quantization is {student.quantization!r}, but model.student.lora is not set, and quantised "
                f"weights cannot be trained.\n  Set model.student.lora.rank (QLoRA), or leave the quantisation out."
            )
        self.student_spec, self.optimization = student, optimization
        self.loss_chunk = loss_chunk
        self.step_sums = StepSums()
        self.languages: LanguageEvaluation | None = None
        self._generators: dict[str, Any] | None = None

    # ---------------------------------------------------------------- models

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if data is not None:
            self._check_data(type(data))
        if isinstance(data, Languages):
            self.languages = LanguageEvaluation(self, self.evaluation_words, self.student_spec.source)

    def _check_data(self, given: type) -> None:
        known = next((kind for kind in given.__mro__ if kind in _LEARNED_FROM), None)  # None: a class of the user's own
        if known is not None and known not in self.data_classes:
            learned = " or ".join(_LEARNED_FROM[kind] for kind in self.data_classes)
            wanted = " or ".join(kind.__name__ for kind in self.data_classes)
            raise ValueError(
                f"{type(self).__name__} learns from {learned}, but data.class_path is {given.__name__}. Set "
                f"data.class_path: {wanted}."
            )

    @property
    def evaluation_words(self) -> str:
        """What a table over several runs calls this one."""
        return type(self).__name__

    def use_plan_of(self, checkpoint: dict[str, Any]) -> None:
        """Take from a checkpoint what `configure_model` must know to build the model that it belongs to."""

    @property
    def on_pairs(self) -> bool:
        """Whether batches hold two answers to a prompt."""
        return issubclass(self.data_classes[0], Preferences)

    def configure_model(self) -> None:
        if self.student is None:
            self.student = self.student_spec.load()

    @cached_property
    def student_tokenizer(self):
        return self.student_spec.load_tokenizer()

    @property
    def teacher_tokenizer(self):
        """The teacher's tokenizer where it differs from the student's, else None."""
        return None

    # ------------------------------------------------------------- optimizer

    def configure_optimizers(self):
        settings = self.optimization
        self._tell_narrow_weights()
        optimizer = torch.optim.AdamW(
            [group for group in self.parameter_groups() if group["params"]],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        # A fused step could unscale by itself, and Lightning then refuses to clip under mixed precision; nothing needs it to.
        optimizer._step_supports_amp_scaling = False
        total = self.trainer.estimated_stepping_batches
        factors = [
            learning_rate_factor(settings, peak=group["lr"], total_steps=total) for group in optimizer.param_groups
        ]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _tell_narrow_weights(self) -> None:
        """Say it where small steps will round to nothing: weights of 2 bytes, of which nobody keeps a float32 copy."""
        narrow = {p.dtype for p in self.parameters() if p.requires_grad and p.dtype.itemsize < 4}
        if narrow and not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            rank_zero_warn(
                f"The trained weights are {', '.join(sorted(map(str, narrow)))} and the learning rate is {self.optimization.lr:g}: "
                f"steps below about 1/256 of a weight round to nothing. Set model.student.dtype: float32 with "
                f"trainer.precision: bf16-mixed, or train with ZeroStrategy, which keeps a float32 copy."
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Matrices with weight decay, vectors (biases, norms) without."""
        trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        decay = self.optimization.weight_decay
        return [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": decay, "lr": self.optimization.lr},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "lr": self.optimization.lr},
        ]

    def log_step(self, sums: dict[str, Tensor | float], count: int | Tensor) -> None:
        """Log sums over one micro-batch, of `count` tokens, as means over those of the whole optimizer step."""
        for name, value in sums.items():
            self.step_sums.mean(name, value, count)

    def log_loss(self, loss: Tensor) -> None:
        """Log the loss that `training_step` returns; those of a step's micro-batches make up the one of the step."""
        share = self.trainer.accumulate_grad_batches * self.trainer.world_size
        self.step_sums.total("loss", loss.detach() / share)

    def on_before_optimizer_step(self, optimizer) -> None:
        if self.trainer.fit_loop._should_accumulate():  # DeepSpeed is asked for a step after every micro-batch
            return
        # processes exchange numbers only for a step that is written
        written = (self.global_step + 1) % max(self.trainer.log_every_n_steps, 1) == 0
        alone = self.trainer.world_size == 1
        for name, value in self.step_sums.take(self._of_all_ranks if alone or written else None).items():
            self.log(f"train/{name}", value, batch_size=1)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        # DeepSpeed clips by itself, and says the norm afterwards
        if not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            norm = self.gradient_norm(self.parameters())
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            self.log("train/grad_norm", norm)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])

    def step_weight(self, batch: DistillationBatch, count: int) -> float:
        """What a *sum* over this micro-batch is multiplied with so that the optimizer step sees a mean over `count`.

        Lightning divides by the number of accumulation steps and averages over ranks; `count` is of the whole step.
        """
        return self.trainer.accumulate_grad_batches * self.trainer.world_size / max(count, 1)

    def loss_terms(self, batch: DistillationBatch) -> dict[str, Callable[[], Tensor]]:
        """The terms whose sum `training_step` returns, one at a time: for measuring them, not for training.

        Each call runs the student anew and gives the weighted, differentiable term of this micro-batch. Terms whose
        weight is 0 are left out.
        """
        return {"ce": lambda: self.cross_entropy_term(batch, weight=1.0)}

    def cross_entropy_term(self, batch: DistillationBatch, weight: float) -> Tensor:
        """The cross-entropy of a micro-batch as `training_step` adds it, times `weight`."""
        hidden_TD = self.student.hidden(batch.student)
        terms = cross_entropy(hidden_TD, self.student.head, batch.student.target_T, chunk_size=self.loss_chunk)
        return terms.loss * (weight * self.step_weight(batch, batch.step_tokens))

    def check_divided(self, weights: bool, frozen: bool, norms: bool) -> None:
        """Asked before gradients and optimizer states are divided among processes.

        Args:
            weights: whether these are divided too, so that all processes must run the student equally often.
            frozen: whether frozen models are divided, so that all processes must run them equally often.
            norms: whether a method can know the norm of some parameters' gradients.

        Raises:
            ValueError: a setting that does not allow it.
        """

    @staticmethod
    def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
        """Of all processes' gradients, 0 without any; every process asks."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return whole(nn.utils.get_total_norm(gradients)) if gradients else torch.zeros(())

    # ------------------------------------------------------------ evaluation

    def evaluate(self, batch: DistillationBatch, stage: str) -> None:
        """Log loss and accuracy of the student on one batch. Subclasses add what their teacher allows."""
        hidden_TD = self.evaluation_hidden(batch)
        if isinstance(batch, LanguageBatch):
            terms = self.languages.add(batch, hidden_TD)
        else:
            terms = cross_entropy(hidden_TD, self.student.head, batch.student.target_T, chunk_size=self.loss_chunk)
        self.log_means(stage, {"loss": terms.loss, "accuracy": terms.correct}, terms.tokens)

    def evaluation_hidden(self, batch: DistillationBatch | LanguageBatch) -> Tensor:
        """(T, D) hidden states of the student for `evaluate`."""
        return self.student.hidden(batch.student)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.languages is not None:
            self.language_report = self.languages.finish("val")

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        if self.languages is not None:
            self.language_report = self.languages.finish("test")

    def validation_step(self, batch: DistillationBatch, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: DistillationBatch, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def log_means(self, stage: str, sums: dict[str, Tensor], count: int | Tensor) -> None:
        """Log sums as means over `count` tokens of a whole evaluation, exact over batches and ranks."""
        count = int(count)
        if count == 0 and self.trainer.world_size == 1:
            return  # with others, every rank logs every name, in one order: what is reduced is matched by its place
        means = {f"{stage}/{name}": value.detach() / max(count, 1) for name, value in sums.items()}
        self.log_dict(means, batch_size=count, on_step=False, on_epoch=True, sync_dist=True)

    # ---------------------------------------------------------------- resume

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lit_llm"] = {
            "identity": self.identity(),
            "start_answers": self._start_answers,
            "generators": self._of_all_ranks(_generator_states()),
            "languages": None if self.languages is None else self.languages.state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "lit_llm" not in checkpoint:
            raise ValueError(
                "The checkpoint was not written by lit_llm (it has no 'lit_llm' entry). Name one from a run's "
                "checkpoints folder, or load other weights with model.student.source."
            )
        theirs, ours = checkpoint["lit_llm"]["identity"], self.identity()
        if theirs != ours:
            differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
            raise ValueError(
                "The checkpoint belongs to another run:\n"
                + "\n".join(f"  {key}: checkpoint {theirs.get(key)!r}, config {ours.get(key)!r}" for key in differing)
                + "\n  Resume with the config of its run folder, or start anew without --ckpt_path."
            )
        self._start_answers = checkpoint["lit_llm"]["start_answers"]
        states = checkpoint["lit_llm"]["generators"]
        states = [states] if isinstance(states, dict) else states  # of one process, as checkpoints once had them
        self._generators = states[self.global_rank % len(states)]
        if self.languages is not None and (moments := checkpoint["lit_llm"].get("languages")):
            self.languages.load_state(moments)

    def _of_all_ranks(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """By rank: batches of other shapes draw other amounts of random numbers."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return [state]
        states: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, state)
        return states

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that continues it."""
        return {
            "method": type(self).__name__,
            "student": str(self.student_spec.source or self.student_spec.config),
            "student_shapes": {name: list(whole_shape(p)) for name, p in list(self.student.named_parameters())[:1]},
            "student_parameters": self.student.num_parameters,
        }

    def on_train_start(self) -> None:
        if self._generators is not None:
            _restore_generators(self._generators)
            self._generators = None


@contextmanager
def without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block no gradient reaches these parameters."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _generator_states() -> dict[str, Any]:
    name, keys, *rest = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype("int64")), *rest),
    }


def _restore_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, keys.cpu().numpy().astype("uint32"), *rest))
