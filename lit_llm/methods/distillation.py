"""What the methods with a student and a frozen teacher share."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lit_llm.data.batch import DistillationBatch
from lit_llm.data.teacher_store import TeacherStore
from lit_llm.data.tokenized import EvaluationPrompt
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.fused_head import HeadTerms, cross_entropy, distillation
from lit_llm.methods.answers import Generation
from lit_llm.methods.base import Method, Optimization
from lit_llm.methods.on_policy import Compared, OnPolicy, Rollouts
from lit_llm.methods.stored_teacher import StoredTeacher
from lit_llm.models.frozen import check_frozen
from lit_llm.models.language_model import Frozen, LanguageModel, ModelSpec
from lit_llm.models.sharding import gathered
from lit_llm.models.shared_base import AdaptedBase, is_base
from lit_llm.models.teacher_head import TeacherHead

_EVALUATION_CACHE_BYTES = 512 * 2**20


class Distillation(Method):
    """A student that learns from a frozen teacher.

    Args:
        student: the model that is trained.
        teacher: the frozen model; its weights never enter a checkpoint.
        optimization: optimizer and schedule.
        generation: answers generated during evaluation.
        loss_chunk: supervised tokens whose logits exist at a time. None chooses by the vocabularies.
        on_policy: compare on answers that the student samples. None: on the data alone.
        teacher_store: keep the teacher's hidden states on disk, so that it runs over the data once. None: it runs live.
    """

    needs_teacher_embedding = False  # whether a method reads the teacher's input embedding
    stored_temperature = 1.0  # of the probabilities that a store with `top_k` keeps

    def __init__(
        self,
        student: ModelSpec,
        teacher: ModelSpec,
        optimization: Optimization = Optimization(),
        generation: Generation = Generation(),
        loss_chunk: int | None = None,
        on_policy: OnPolicy | None = None,
        teacher_store: TeacherStore | None = None,
    ) -> None:
        super().__init__(student, optimization, generation, loss_chunk)
        if teacher_store is not None and teacher.lora is not None:
            raise ValueError(
                f"model.teacher_store.folder is {teacher_store.folder!r}, but model.teacher.lora is set, whose adapters "
                "start at random and are never trained. Leave model.teacher.lora out."
            )
        if teacher_store is not None and on_policy is not None:
            raise ValueError(
                f"model.teacher_store.folder is {teacher_store.folder!r} and model.on_policy is set, but a store knows "
                "nothing of answers that are still to be sampled. Leave one of the two out."
            )
        check_frozen("teacher", teacher)
        self.teacher_spec = teacher
        self.rollouts = None if on_policy is None else Rollouts(on_policy, self)
        self.store = None if teacher_store is None else StoredTeacher(teacher_store, self)
        self._evaluated_hidden: dict[tuple, Tensor] = {}
        self._evaluated_terms: dict[tuple, HeadTerms] = {}

    def configure_model(self) -> None:
        super().configure_model()
        if self.frozen_teacher is None:
            self.frozen_teacher = Frozen(self._load_teacher())

    def _load_teacher(self) -> LanguageModel | TeacherHead | AdaptedBase:
        if self.store is not None:
            return self.store.open()
        if is_base(self.student, self.student_spec, self.teacher_spec):
            return AdaptedBase(self.student)  # a policy with adapters that is held to where it started
        return self.teacher_spec.load()

    def on_fit_start(self) -> None:
        if self.store is not None:
            with gathered(self):  # a teacher may live in the student
                self.store.fill()

    def check_divided(self, weights: bool, frozen: bool, norms: bool) -> None:
        super().check_divided(weights, frozen, norms)
        if (weights or frozen) and self.rollouts is not None:
            self.rollouts.check_divided()
        if frozen and self.store is not None:
            self.store.settings.refuse_divided()

    @cached_property
    def teacher_tokenizer(self):
        """The teacher's tokenizer where it differs from the student's, else None."""
        tokenizer = self.teacher_spec.load_tokenizer()
        return None if same_tokenizer(self.student_tokenizer, tokenizer) else tokenizer

    @torch.no_grad()
    def teacher_hidden(self, batch: DistillationBatch) -> Tensor:
        """(T, E) the teacher's last hidden states at the student's supervised positions, or (U, E) at its own."""
        if batch.teacher_hidden is not None:
            return batch.teacher_hidden.to(self.store.hidden_dtype)
        return self.teacher.hidden(batch.student if batch.teacher is None else batch.teacher)

    def compared(self, batch: DistillationBatch) -> Compared:
        """Where student and teacher are compared for a micro-batch of training: on the data or on sampled answers."""
        if self.rollouts is None:
            return self.on_data(batch)
        compared = self.rollouts.compared(batch)
        self.log_step({"on_policy": float(compared.sampled)}, 1)
        if compared.sampled:
            sampled = compared.batch.student
            self.log_step({"sampled_tokens": sampled.num_supervised}, len(sampled.length_B))
        return compared

    @staticmethod
    def on_data(batch: DistillationBatch) -> Compared:
        """The comparison on the data itself."""
        return Compared(batch, False, batch.step_tokens, batch.step_pairs)

    def data_loss(self, batch: DistillationBatch, weight: float) -> Tensor:
        """Weighted cross-entropy on the data, for a micro-batch that is compared elsewhere; logs it."""
        target_T = batch.student.target_T
        terms = cross_entropy(
            self.student.hidden(batch.student), self.student.head, target_T, chunk_size=self.loss_chunk
        )
        self.log_step({"ce": terms.ce, "accuracy": terms.correct}, terms.tokens)
        return weight * terms.loss

    def on_validation_epoch_end(self) -> None:
        if self.rollouts is not None and not self.trainer.sanity_checking:
            batch = self.rollouts.of_validation()
            if batch is not None:
                self.evaluate_sampled(batch)
        super().on_validation_epoch_end()

    def evaluate_sampled(self, batch: DistillationBatch) -> None:
        """Log how far the student is from the teacher on its own answers to validation prompts."""
        tokens = batch.student
        self.log("val/sampled_tokens", tokens.num_supervised / len(tokens.length_B))
        if batch.teacher is None:
            terms = distillation(
                self.student.hidden(tokens),
                self.student.head,
                tokens.target_T,
                self.teacher_hidden(batch),
                self.teacher.head,
                Divergence(name="reverse_kl", temperature=1.0),
                ce_weight=0.0,
                kd_weight=1.0,
                chunk_size=self.loss_chunk,
            )
            self.log("val/sampled_reverse_kl", terms.kd / max(terms.tokens, 1))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.rollouts is not None:
            checkpoint["lit_llm"]["rollouts"] = self.rollouts.state()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.rollouts is not None:
            self.rollouts.load_state(checkpoint["lit_llm"].get("rollouts", {}))

    def evaluated_teacher_hidden(self, batch: DistillationBatch, stage: str) -> Tensor:
        """The same during evaluation, where the batches come again and the teacher need not."""
        if batch.teacher_hidden is not None:
            return self.teacher_hidden(batch)
        key = (stage, batch.examples)
        if key not in self._evaluated_hidden:
            hidden = self.teacher_hidden(batch)
            kept = sum(tensor.nbytes for tensor in self._evaluated_hidden.values())
            if kept + hidden.nbytes > _EVALUATION_CACHE_BYTES:
                return hidden
            self._evaluated_hidden[key] = hidden.cpu()
        return self._evaluated_hidden[key].to(self.device)

    def evaluate_teacher(self, hidden: Tensor, batch: DistillationBatch, stage: str) -> None:
        """Log the teacher's own loss and accuracy, per token of its tokenizer; formed once, for they never change."""
        tokens, key = batch.student if batch.teacher is None else batch.teacher, (stage, batch.examples)
        if key not in self._evaluated_terms:
            self._evaluated_terms[key] = cross_entropy(
                hidden, self.teacher.head, tokens.target_T, chunk_size=self.loss_chunk
            )
        terms = self._evaluated_terms[key]
        self.log_means(stage, {"teacher_loss": terms.ce, "teacher_accuracy": terms.correct}, terms.tokens)

    def teacher_result(self, stage: str, prompts: list[EvaluationPrompt]) -> dict[str, Any] | None:
        if isinstance(self.teacher, TeacherHead):
            return self.store.answers(prompts)
        return super().teacher_result(stage, prompts)

    def identity(self) -> dict:
        return {**super().identity(), "teacher": str(self.teacher_spec.source or self.teacher_spec.config)}


def same_tokenizer(student, teacher) -> bool:
    """Whether two tokenizers give every text the same ids (padded heads and chat templates aside)."""
    if student.get_vocab() != teacher.get_vocab():
        return False
    ours, theirs = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (student, teacher))
    return all(ours[part] == theirs[part] for part in ("model", "normalizer", "pre_tokenizer"))
