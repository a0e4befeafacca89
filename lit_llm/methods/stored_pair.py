"""The two frozen models of AlignDistil on disk: one teacher store for each, under one folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from lit_llm.data.stored_answers import AnswerSet
from lit_llm.data.teacher_store import TeacherStore
from lit_llm.methods.stored_teacher import StoredTeacher
from lit_llm.models.language_model import Frozen, LanguageModel
from lit_llm.models.shared_base import AdaptedBase, frozen_beside, shares_base
from lit_llm.models.teacher_head import TeacherHead, keep_head

_SIDES = {"train": ("chosen",), "validation": ("chosen", "rejected")}  # what is read of each part


class StoredFrozen(StoredTeacher):
    """The store of one frozen model: `FOLDER/dpo` or `FOLDER/other`.

    Training reads the chosen answers, evaluation both.

    Args:
        settings: of the store.
        method: an `AlignDistil`; read are `student`, its specs, its holders of the frozen models, and what `StoredTeacher`
            reads of a trainer.
        name: `dpo` or `other`.
        holder: attribute of the method that holds the frozen model.
    """

    def __init__(self, settings: TeacherStore, method, name: str, holder: str) -> None:
        super().__init__(replace(settings, folder=str(Path(settings.folder) / name)), method)
        self.name, self.holder = name, holder

    @property
    def spec(self):
        return getattr(self.method, f"{self.name}_spec")

    @property
    def held(self) -> LanguageModel | TeacherHead:
        return getattr(self.method, self.holder).model

    def hold(self, model: nn.Module) -> None:
        shared = self.held if isinstance(self.held, AdaptedBase) else None
        setattr(self.method, self.holder, Frozen(model))
        if shared is not None:
            shared.let_go()

    def load(self) -> LanguageModel:
        method = self.method
        return frozen_beside(method.student, method.student_spec, self.spec, self.name, must_share=True).model

    def load_only_head(self) -> TeacherHead:
        method = self.method
        if shares_base(method.student, method.student_spec, self.spec, self.name):
            return keep_head(AdaptedBase(method.student), False)
        return super().load_only_head()

    def examples(self, data, part: str) -> AnswerSet:
        return AnswerSet(data.sets[part], _SIDES[part])

    def hand_over(self) -> None:
        for part, opened in self.parts.items():
            self.method.trainer.datamodule.stored.setdefault(part, {})[self.name] = opened

    @property
    def shows_answers(self) -> bool:
        return self.name == "dpo"
