"""Answers that a method generates while it is evaluated: scored, shown side by side, or written by `predict`."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_llm.data.tokenized import EvaluationPrompt
from lit_llm.evaluation.constraints import reward
from lit_llm.evaluation.rouge import RougeL
from lit_llm.evaluation.samples import Sample
from lit_llm.evaluation.token_scores import TokenScores
from lit_llm.models.generation import check_sampling
from lit_llm.models.language_model import Frozen, LanguageModel
from lit_llm.models.sharding import whole_on
from lit_llm.storage import write_atomically


@dataclass
class Generation:
    """Answers generated during evaluation, scored with ROUGE-L and shown side by side.

    Args:
        prompts: validation prompts that are answered each time; 0 turns it off.
        test_prompts: test prompts that are answered; None: all.
        max_new_tokens: length limit of an answer.
        temperatures: 0 is greedy. The first one is reported as `rouge_l`, the others with their temperature.
        seeds: one pass each for temperatures above 0; the mean is reported (the DSKD papers use 10, 20, 30, 40, 50).
        top_p: nucleus sampling; 1 is off.
        top_k: sampling among the k best; 0 is off.
        no_repeat_ngram_size: forbids repeated n-grams; 0 is off (the papers' final evaluation uses 6).
        batch_size: prompts at a time.
        shown: samples written to TensorBoard and the report, and answers shown token by token, where a method does so.
    """

    prompts: int = 64
    test_prompts: Optional[int] = None
    max_new_tokens: int = 64
    temperatures: list[float] = field(default_factory=lambda: [0.0])
    seeds: list[int] = field(default_factory=lambda: [10])
    top_p: float = 1.0
    top_k: int = 0
    no_repeat_ngram_size: int = 0
    batch_size: int = 32
    shown: int = 8

    def __post_init__(self) -> None:
        for name in ("temperatures", "seeds"):
            if not getattr(self, name):
                raise ValueError(
                    f"generation.{name} is empty. Name at least one; generation.prompts: 0 turns answers off."
                )
        for name, least in {"prompts": 0, "test_prompts": 0, "batch_size": 1, "shown": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"generation.{name} is {value}; it must be at least {least}.")
        for temperature in self.temperatures:
            check_sampling(
                "generation",
                self.max_new_tokens,
                temperature=temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                no_repeat_ngram_size=self.no_repeat_ngram_size,
            )
        if not any(self.temperatures):
            for name, idle in {"top_p": 1.0, "top_k": 0, "seeds": [10]}.items():
                if getattr(self, name) != idle:
                    raise ValueError(
                        f"generation.{name} is {getattr(self, name)}, but generation.temperatures is {self.temperatures}, so "
                        f"all answers are greedy and nothing is sampled. Add a temperature above 0, or leave it out."
                    )


class Answering(L.LightningModule):
    """The part of a method that answers prompts of its data.

    Attributes:
        student: the model that is trained, once it is built.
        frozen_teacher: the one that it is shown beside, if any.
        teacher_words: what people call it.
        samples: of the last evaluation.
        token_scores: answers of the last evaluation, token by token; empty where a method has nothing to show of them.
        language_report: of the last evaluation, by language (see `callbacks.language_lines`); None for other data.
        histograms: name -> values of tokens of the last evaluation, on the CPU; likewise.
    """

    teacher_words = "teacher"

    def __init__(self, generation: Generation) -> None:
        super().__init__()
        self.generation = generation
        self.student: LanguageModel | None = None
        self.frozen_teacher: Frozen | None = None
        self.samples: list[Sample] = []
        self.token_scores: list[TokenScores] = []
        self.histograms: dict[str, Tensor] = {}
        self.language_report: dict[str, Any] | None = None
        self._start_answers: dict[str, list[str]] = {}
        self._teacher_results: dict[str, dict[str, Any]] = {}

    @property
    def teacher(self) -> LanguageModel | None:
        return None if self.frozen_teacher is None else self.frozen_teacher.model

    @property
    def sampler(self) -> LanguageModel:
        """Whose answers on-policy training learns on."""
        return self.student

    @property
    def exports(self) -> dict[str, Callable[[Path], None]]:
        """What a run leaves: name in the run folder -> what writes it."""
        return self.student.exports

    def whole_on(self, here: bool) -> AbstractContextManager[None]:
        """Within the block the processes that ask for it hold all weights; all processes enter."""
        return whole_on(self, here)

    def export(self, folder: Path) -> None:
        """Write the trained model as a plain Hugging Face folder."""
        self.student.save(folder)

    @property
    def run_folder(self) -> Path:
        return Path(self.trainer.log_dir or self.trainer.default_root_dir)

    def predict_step(self, batch: list, batch_idx: int) -> list[dict[str, Any]]:
        answers = self.answer(self.student, [prompt.student_ids for prompt in batch], self.generation.temperatures[0])
        return [
            {"prompt": prompt.text, "references": prompt.references, "answer": answer}
            for prompt, answer in zip(batch, answers, strict=True)
        ]

    def on_predict_epoch_end(self) -> None:
        """Write every answer as one line of predictions.jsonl."""
        rows = [row for batch in self.trainer.predict_loop.predictions for row in batch]
        file = self.run_folder / "predictions.jsonl"  # which all processes ask for
        if self.trainer.is_global_zero:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomically(file, lines)
            rank_zero_info(f"{len(rows)} answers in {file}")

    def on_validation_epoch_end(self) -> None:
        self._generate("val", "validation", self.generation.prompts)

    def on_test_epoch_end(self) -> None:
        self._generate("test", "test", self.generation.test_prompts)

    def _generate(self, stage: str, split: str, limit: int | None) -> None:
        """Answer prompts with the student (and once with the teacher), score them, keep samples for the callbacks."""
        if limit == 0 or self.trainer.sanity_checking or self.trainer.datamodule is None:
            return
        prompts = self.trainer.datamodule.prompts(split, limit)
        if not prompts:
            return
        answers = self._scored(stage, "", self.student, [prompt.student_ids for prompt in prompts], prompts)
        if self.global_step == 0 and self.trainer.state.fn == "fit":
            self._start_answers[stage] = answers
        shown = {"start": self._start_answers.get(stage), "student": answers}
        teacher = self.teacher_result(stage, prompts)
        if teacher is not None:
            shown["teacher"] = teacher["answers"]
            self.log_dict(teacher["scores"], rank_zero_only=False)
        self.samples = [
            Sample(
                prompts[row].text,
                prompts[row].references[0],
                {who: texts[row] for who, texts in shown.items() if texts},
            )
            for row in range(min(self.generation.shown, len(prompts)))
        ]

    def teacher_result(self, stage: str, prompts: list[EvaluationPrompt]) -> dict[str, Any] | None:
        """The teacher's answers and their scores, made once; None without a teacher."""
        if self.teacher is not None and stage not in self._teacher_results:
            ids = [prompt.teacher_ids or prompt.student_ids for prompt in prompts]
            self._teacher_results[stage] = {"answers": ids, "scores": {}}
            answers = self._scored(stage, "teacher_", self.teacher, ids, prompts)
            self._teacher_results[stage]["answers"] = answers
        return self._teacher_results.get(stage)

    def answer_scores(self, answers: list[str], prompts: list[EvaluationPrompt]) -> dict[str, Tensor]:
        """Means over answers: `rouge_l` with the references, and `reward`, the share of a prompt's checks that hold."""
        metric = RougeL(sync_on_compute=False)
        metric.update(answers, [prompt.references for prompt in prompts])
        scores = {"rouge_l": metric.compute().float()}
        rewards = [reward(answer, p.checks) for answer, p in zip(answers, prompts, strict=True) if p.checks]
        return scores | ({"reward": torch.tensor(rewards).mean()} if rewards else {})

    def _scored(self, stage: str, who: str, model: LanguageModel, ids, prompts: list[EvaluationPrompt]) -> list[str]:
        """Answers at the first temperature; logs the mean of every score, for every temperature, over its seeds."""
        first: list[str] = []
        for number, temperature in enumerate(self.generation.temperatures):
            found: list[dict[str, Tensor]] = []
            for seed in self.generation.seeds if temperature > 0 else self.generation.seeds[:1]:
                answers = self.answer(model, ids, temperature, seed)
                first = first or answers
                found.append(self.answer_scores(answers, prompts))
            for score in found[0]:
                name = f"{stage}/{who}{score}" + (f"_t{temperature:g}" if number else "")
                values = torch.stack([scores[score] for scores in found])
                if who:
                    self._teacher_results[stage]["scores"][name] = values.mean()
                    continue
                self.log(name, values.mean())
                if len(values) > 1:
                    self.log(f"{name}_std", values.std())
        return first

    def answer(self, model: LanguageModel, prompts: list[list[int]], temperature: float, seed: int = 0) -> list[str]:
        """Texts that a model generates for tokenised prompts."""
        settings = self.generation
        ids = model.generate(
            prompts,
            max_new_tokens=settings.max_new_tokens,
            temperature=temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            no_repeat_ngram_size=settings.no_repeat_ngram_size,
            seed=seed,
            batch_size=settings.batch_size,
        )
        return [text.strip() for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def check_greedy(generation: Generation) -> None:
    """See that answers before and after a change are comparable.

    Raises:
        ValueError: a setting of sampling.
    """
    usual = Generation()
    for name in ("temperatures", "seeds", "top_p", "top_k", "no_repeat_ngram_size"):
        if getattr(generation, name) != getattr(usual, name):
            raise ValueError(
                f"model.generation.{name} is {getattr(generation, name)}, but what a model says before and after an edit is "
                f"compared greedily. Leave {name} out."
            )
