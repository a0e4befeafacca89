"""A distillation with a teacher store: what is checked, what is written, and what is left of the teacher afterwards."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_llm.data.batch import TokenBatch
from lit_llm.data.teacher_store import UNKNOWN, Encoded, StoredPart, TeacherStore, encode_hidden, encode_top_k
from lit_llm.losses.chunks import automatic_chunk
from lit_llm.models.language_model import Frozen, LanguageModel
from lit_llm.models.teacher_head import TeacherHead, head_key, keep_head, load_head, save_head
from lit_llm.models.weights import source_digests, state_digest
from lit_llm.storage import write_atomically

_TEACHER_FIELDS = ("weights", "config", "keep_layers", "dtype", "attention", "trim_head", "quantization")


class StoredTeacher:
    """The store of one run.

    Args:
        settings: of the store.
        method: a `Distillation`; read are `teacher`, `teacher_spec`, `teacher_tokenizer`, `student`,
            `student_tokenizer`, `needs_teacher_embedding`, `stored_temperature`, `generation` and the trainer.
    """

    def __init__(self, settings: TeacherStore, method) -> None:
        self.settings, self.method, self.folder = settings, method, Path(settings.folder)
        self.parts: dict[str, StoredPart] = {}
        self._told = False

    # ------------------------------------------------- what a subclass changes

    @property
    def spec(self):
        return self.method.teacher_spec

    @property
    def held(self) -> LanguageModel | TeacherHead:
        """The frozen model, as much of it as there is."""
        return self.method.teacher

    def hold(self, model: nn.Module) -> None:
        self.method.frozen_teacher = Frozen(model)

    def load(self) -> LanguageModel:
        return self.spec.load()

    def load_only_head(self) -> TeacherHead:
        return load_head(self._head_file, _dtype(self.spec), self.method.needs_teacher_embedding)

    def examples(self, data, part: str):
        """What is stored of a part of the data."""
        return data.sets[part]

    def hand_over(self) -> None:
        if self.parts:
            self.method.trainer.datamodule.stored = self.parts

    shows_answers = True  # whether samples show what it answers

    # --------------------------------------------------------------- opening

    def open(self) -> LanguageModel | TeacherHead:
        """The teacher, as much of it as this run needs: only its head where the store has all that is asked for.

        Raises:
            ValueError: the store was written for something else (each difference with both values).
        """
        spec, stage = self.spec, self._stage
        model = self.load() if spec.source is None else None  # a random start has no file that could be hashed
        teacher = self._teacher_binding(model)
        if stage == "test":
            rank_zero_info("The teacher store holds no test data: the teacher is run.")
            return model or self.load()
        self.parts = self._plan(teacher)
        if self._is_complete(teacher):
            self.hand_over()
            rank_zero_info(f"The teacher's hidden states come from {self.folder}; its body is not loaded.")
            return keep_head(model, self.method.needs_teacher_embedding) if model else self.load_only_head()
        model = model or self.load()
        if stage != "fit":
            self.parts = {}
            return model
        if UNKNOWN in teacher.values():
            teacher = self._teacher_binding(model)
            self.parts = self._plan(teacher)
        self.hand_over()
        if self.method.trainer.is_global_zero:
            save_head(model, self._head_file, _digest(teacher))  # before a strategy changes its precision
        return model

    @cached_property
    def hidden_dtype(self) -> torch.dtype:
        """The type that the live teacher's hidden states have in this run."""
        return getattr(torch, next(iter(self.parts.values())).written["hidden_dtype"])

    @property
    def _stage(self) -> str | None:
        trainer = self.method._trainer
        return None if trainer is None else trainer.state.fn.value

    @property
    def _head_file(self) -> Path:
        return self.folder / "teacher.safetensors"

    def _is_complete(self, teacher: dict[str, Any]) -> bool:
        if not all(part.is_complete for part in self.parts.values()):
            return False
        manifest = self.folder / next(iter(self.parts), "train") / "manifest.json"
        recorded = json.loads(manifest.read_text(encoding="utf-8"))["binding"] if manifest.is_file() else {}
        # where the weights are not here, the manifest knows their hash
        known = {name: recorded.get(name) if value == UNKNOWN else value for name, value in teacher.items()}
        return head_key(self._head_file) == _digest(known)

    def _plan(self, teacher: dict[str, Any]) -> dict[str, StoredPart]:
        if self._stage not in ("fit", "validate"):
            return {}
        data = self.method.trainer.datamodule
        if not hasattr(data, "stored"):
            raise ValueError(
                f"model.teacher_store.folder is {self.settings.folder!r}, but {type(data).__name__} cannot read a "
                "store. Leave teacher_store out, or take the data module Instructions or, for AlignDistil, Preferences."
            )
        parts = [part for part in ("train", "validation") if part in data.sets]
        if self._stage == "fit" and self.method.trainer.limit_val_batches == 0:
            parts = ["train"]
        return {
            part: StoredPart(
                self.folder / part,
                self.examples(data, part),
                {**teacher, **self._reading(data), **self._kept(part)},
                self.settings.shard_rows,
            )
            for part in parts
        }

    def _teacher_binding(self, model: LanguageModel | None) -> dict[str, Any]:
        spec = self.spec
        if spec.source is None:
            weights, config = state_digest(model.model), _digest(spec.config)
        else:
            weights, config = source_digests(spec.source)
        held = (spec.keep_layers, spec.dtype, spec.attention, spec.trim_head, spec.quantization)
        values = (weights or UNKNOWN, config or UNKNOWN, *held)
        return {f"teacher.{name}": value for name, value in zip(_TEACHER_FIELDS, values, strict=True)}

    def _reading(self, data) -> dict[str, Any]:
        tokenizer = self.method.teacher_tokenizer or self.method.student_tokenizer
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        encoding = asdict(data.encoding)
        encoding.pop("alignment", None)  # the teacher does not see it
        digest = _digest([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, special])
        return {"precision": str(self.method.trainer.precision), "tokenizer": digest, **encoding}

    def _kept(self, part: str) -> dict[str, Any]:
        if not self._is_sparse(part):
            return {"dtype": self.settings.dtype, "top_k": None}
        rows = self.method.student.vocab_size
        return {"top_k": self.settings.top_k, "temperature": self.method.stored_temperature, "student.rows": rows}

    def _is_sparse(self, part: str) -> bool:
        return self.settings.top_k is not None and part == "train"  # evaluation stays exact

    # --------------------------------------------------------------- filling

    def fill(self) -> None:
        """Write what is missing, with all processes of the run, and let the teacher's body go."""
        method, trainer = self.method, self.method.trainer
        if not self.parts or isinstance(self.held, TeacherHead):
            return
        for name, part in self.parts.items():
            if trainer.is_global_zero:
                part.begin()
            trainer.strategy.barrier("teacher store begun")
            part.fill(
                lambda examples, name=name: self._encode(name, examples),
                batch_size=self.settings.batch_size,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
            )
            trainer.strategy.barrier("teacher store filled")
            part.check_whole()
            if trainer.is_global_zero:
                facts = part.finish(hidden_dtype=str(self._hidden(name, [0]).dtype).removeprefix("torch."))
                rank_zero_info(_summary(part, facts))
            trainer.strategy.barrier("teacher store closed")
        self._keep_answers()
        self.hold(keep_head(self.held, method.needs_teacher_embedding))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _tokens(self, part: str, examples: list[int]) -> TokenBatch:
        tokenizer = self.method.teacher_tokenizer or self.method.student_tokenizer
        return self.parts[part].tokens(examples, tokenizer.pad_token_id).to(self.method.device)

    @torch.no_grad()
    def _hidden(self, part: str, examples: list[int]) -> Tensor:
        with self.method.trainer.precision_plugin.forward_context():
            return self.held.hidden(self._tokens(part, examples))

    @torch.no_grad()
    def _encode(self, part: str, examples: list[int]) -> Encoded:
        hidden_NE = self._hidden(part, examples)
        if not self._is_sparse(part):
            return encode_hidden(hidden_NE, self.settings.dtype)
        head, k = self.held.head, self.settings.top_k
        head = head.rows(min(head.num_rows, self.method.student.vocab_size))
        if k >= head.num_rows:
            raise ValueError(
                f"model.teacher_store.top_k is {k}, but the models share only {head.num_rows} tokens, so nothing would "
                "be left out. Lower it, or leave it out to store hidden states."
            )
        encoded = []
        with self.method.trainer.precision_plugin.forward_context():
            for hidden_CE in hidden_NE.split(automatic_chunk(head.num_rows)):
                logits_CV = head(hidden_CE).float() / self.method.stored_temperature
                encoded.append(encode_top_k(logits_CV.log_softmax(-1), k))
        return tuple({name: torch.cat([each[i][name] for each in encoded]) for name in encoded[0][i]} for i in (0, 1))

    # --------------------------------------------------------------- answers

    def answers(self, prompts) -> dict[str, Any] | None:
        """What the teacher answered to prompts while the store was filled, with its scores; None when it was not asked."""
        file = self._answers_file(prompts)
        if file.is_file():
            kept = json.loads(file.read_text(encoding="utf-8"))
            return {**kept, "scores": {name: torch.tensor(score) for name, score in kept["scores"].items()}}
        if not self._told:
            rank_zero_info(
                f"No {file.name} in the teacher store: these prompts or model.generation are not those of the run that "
                "filled it, so samples and ROUGE-L are shown without the teacher. A store in a new folder has them."
            )
            self._told = True
        return None

    def _keep_answers(self) -> None:
        """Let the teacher answer the validation prompts while it is still there."""
        method, limit = self.method, self.method.generation.prompts
        prompts = [] if limit == 0 or not self.shows_answers else method.trainer.datamodule.prompts("validation", limit)
        if "validation" in self.parts and prompts and method.trainer.is_global_zero:
            result = method.teacher_result("val", prompts)
            scores = {name: score.item() for name, score in result["scores"].items()}
            content = json.dumps({"answers": result["answers"], "scores": scores}, ensure_ascii=False, indent=1)
            write_atomically(self._answers_file(prompts), content)
        method.trainer.strategy.barrier("teacher answers kept")

    def _answers_file(self, prompts) -> Path:
        settings = asdict(self.method.generation)
        for name in ("prompts", "test_prompts", "batch_size", "shown"):
            del settings[name]
        key = _digest([settings, [[prompt.teacher_ids or prompt.student_ids, prompt.references] for prompt in prompts]])
        return self.folder / f"answers-{key[:12]}.json"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _dtype(spec) -> torch.dtype:
    return getattr(torch, spec.dtype)


def _summary(part: StoredPart, facts: dict[str, Any]) -> str:
    lines = [
        f"Teacher store {part.folder}: {part.binding['rows']:,} tokens of {part.binding['examples']:,} examples in "
        f"{facts['shards']} shards, {facts['bytes'] / 2**20:,.1f} MiB"
    ]
    for name, error in facts["errors"].items():
        lines.append(f"  {name.replace('_', ' ')}: mean {error['mean']:.3g}, largest {error['largest']:.3g}")
    if "rest_mass" in facts["errors"]:
        mass = facts["errors"]["rest_mass"]["mean"]
        lines.append(
            f"  The gradient on a token's logits is off by at most twice its rest mass (L1), {2 * mass:.3g} on average."
        )
    return "\n".join(lines)
