"""On-policy distillation: the student answers prompts itself, and is compared with the teacher on its own answers.

GKD (arXiv 2306.13649) and DSKD v2 (arXiv 2504.11426, section on-policy): a share of the micro-batches is compared on
sampled answers, the others on the data; cross-entropy stays on the data. Differences from the authors' code: answers are
sampled in eval mode, for whole optimizer steps at a time; the end of sequence is supervised; all distillation terms of
an optimizer step are divided by one count, so that splitting a batch changes nothing.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Optional

import torch

from lit_llm.data.batch import DistillationBatch
from lit_llm.data.rollouts import Rollout, RolloutBatches
from lit_llm.models.generation import check_sampling
from lit_llm.models.language_model import LanguageModel
from lit_llm.seeds import run_seed


@dataclass
class OnPolicy:
    """How the student's own answers are sampled and used.

    Args:
        student_fraction: share of the micro-batches that are compared on sampled answers, by a coin for each (0.5 in
            arXiv 2504.11426). 0 only measures.
        start_epoch: first epoch with sampled answers (3 in arXiv 2504.11426).
        updates: optimizer steps served by one round of sampling. More fill the device better, but the last answers
            come from a student that is so many steps old.
        max_new_tokens: length limit of an answer. None: data.max_length - data.max_prompt_length.
        temperature: of the sampling; 0 is greedy.
        top_p: nucleus sampling; 1 is off.
        top_k: sampling among the k best; 0 is off.
        batch_size: prompts sampled at a time.
        validation_prompts: validation prompts that are answered at each validation to measure the divergence on the
            student's own answers (`val/sampled_...`); 0 turns it off.
        seed: of coins and sampling; `seed_everything` where it is left out.
    """

    student_fraction: float = 0.5
    start_epoch: int = 0
    updates: int = 1
    max_new_tokens: Optional[int] = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 64
    validation_prompts: int = 32
    seed: Optional[int] = None

    def __post_init__(self) -> None:
        if not 0 <= self.student_fraction <= 1:
            raise ValueError(
                f"on_policy.student_fraction is {self.student_fraction}; it is a share of micro-batches, 0 to 1."
            )
        for name, least in {"updates": 1, "batch_size": 1, "start_epoch": 0, "validation_prompts": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"on_policy.{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.temperature == 0 and (self.top_p != 1 or self.top_k):
            raise ValueError(
                f"on_policy.temperature is 0, which is greedy, so on_policy.top_p ({self.top_p}) and on_policy.top_k "
                f"({self.top_k}) have nothing to choose from. Set a temperature above 0, or leave them out."
            )
        check_sampling(
            "on_policy",
            1 if self.max_new_tokens is None else self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )


class Compared(NamedTuple):
    """Where student and teacher are compared for one micro-batch.

    Attributes:
        batch: the data, or answers that the student sampled to its prompts.
        sampled: which of the two.
        tokens: student tokens that are compared in the whole optimizer step, all ranks.
        pairs: aligned pairs of the whole optimizer step.
    """

    batch: DistillationBatch
    sampled: bool
    tokens: int
    pairs: int


class Rollouts:
    """Samples answers for the coming optimizer steps and hands them out, micro-batch by micro-batch.

    Args:
        settings: how to sample.
        method: the LightningModule: its `sampler` answers the prompts of its trainer's data.
    """

    def __init__(self, settings: OnPolicy, method) -> None:
        self.settings, self.method = settings, method
        self.window: dict[tuple[int, ...], dict[str, Any]] = {}
        self._batches: RolloutBatches | None = None

    @property
    def batches(self) -> RolloutBatches:
        if self._batches is None:
            self._batches = RolloutBatches(self.method.student_tokenizer, self.method.teacher_tokenizer)
        return self._batches

    def compared(self, batch: DistillationBatch) -> Compared:
        """Where this micro-batch of the data is compared. Called once for each, in order, on every rank."""
        if self.method.trainer.current_epoch < self.settings.start_epoch or self.settings.student_fraction == 0:
            return Compared(batch, False, batch.step_tokens, batch.step_pairs)
        if batch.examples not in self.window:
            self._sample_ahead(batch)
        entry = self.window.pop(batch.examples)
        if entry["rollouts"] is None:
            return Compared(batch, False, entry["tokens"], entry["pairs"])
        sampled = self._batch(batch.examples, entry["rollouts"]).to(self.method.device)
        return Compared(sampled, True, entry["tokens"], entry["pairs"])

    def check_divided(self) -> None:
        """Asked before weights of a model are divided among processes, which must all run it equally often then.

        Raises:
            ValueError: they would not.
        """
        fraction = self.settings.student_fraction
        if 0 < fraction < 1:
            raise ValueError(
                f"model.on_policy.student_fraction is {fraction}, so by the coins of a step some processes sample answers and run "
                f"models more often than others, but trainer.strategy divides their weights, for which all must do the "
                f"same. Set student_fraction: 1, or train with configs/trainer/deepspeed_z2.yaml, without divide_frozen."
            )

    def of_validation(self) -> DistillationBatch | None:
        """The student's answers to the first validation prompts, as one batch."""
        prompts = self.method.trainer.datamodule.prompts("validation", self.settings.validation_prompts)
        if not prompts:
            return None
        rollouts = self._sample(
            [prompt.student_ids for prompt in prompts], run_seed(self.settings.seed), self.method.student
        )
        theirs = [prompt.teacher_ids or [] for prompt in prompts]
        return self.batches([prompt.student_ids for prompt in prompts], theirs, rollouts).to(self.method.device)

    def state(self) -> dict[int, list]:
        """The answers of every rank that are still to be used, for the checkpoint."""
        entries = [
            {**entry, "rollouts": None if entry["rollouts"] is None else [asdict(r) for r in entry["rollouts"]]}
            | {"examples": examples}
            for examples, entry in self.window.items()
        ]
        if not _distributed():
            return {0: entries}
        gathered: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, entries)
        return dict(enumerate(gathered))

    def load_state(self, state: dict[int, list]) -> None:
        rank = torch.distributed.get_rank() if _distributed() else 0
        self.window = {
            tuple(entry["examples"]): {
                "rollouts": None if entry["rollouts"] is None else [_rollout(r) for r in entry["rollouts"]],
                "tokens": entry["tokens"],
                "pairs": entry["pairs"],
            }
            for entry in state.get(rank, [])
        }

    def _sample_ahead(self, batch: DistillationBatch) -> None:
        """Fill the window from this micro-batch to the end of the `updates`-th optimizer step."""
        method, data = self.method, self.method.trainer.datamodule
        steps = data.upcoming(batch.examples, self.settings.updates)
        chosen = [micro.examples for step in steps for micro in step if self._coin(micro.examples)]
        prompts = [data.sets["train"][example]["student_prompt_ids"] for examples in chosen for example in examples]
        answers = iter(self._sample(prompts, seed=self._seed(method.global_step, method.global_rank)))
        sampled = {examples: [next(answers) for _ in examples] for examples in chosen}
        totals = torch.zeros(self.settings.updates, 2, dtype=torch.int64, device=method.device)
        for number, step in enumerate(steps):
            for micro in step:
                totals[number] += torch.tensor(self._count(micro.examples, sampled.get(micro.examples)))
        totals = method.trainer.strategy.reduce(totals, reduce_op="sum").tolist()
        self.window = {
            micro.examples: {"rollouts": sampled.get(micro.examples), "tokens": tokens, "pairs": pairs}
            for (tokens, pairs), step in zip(totals, steps, strict=False)
            for micro in step
        }

    def _sample(self, prompts: list[list[int]], seed: int, model: LanguageModel | None = None) -> list[Rollout]:
        """Answers of the method's sampler, or of another model."""
        settings, encoding = self.settings, self.method.trainer.datamodule.encoding
        limit = settings.max_new_tokens or encoding.max_length - encoding.max_prompt_length
        if not prompts:
            return []
        answers = (model or self.method.sampler).generate(
            prompts,
            max_new_tokens=limit,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            seed=seed,
            batch_size=settings.batch_size,
        )
        return [Rollout(tuple(answer), finished=len(answer) < limit) for answer in answers]

    def _batch(self, examples: tuple[int, ...], rollouts: list[Rollout]) -> DistillationBatch:
        rows = [self.method.trainer.datamodule.sets["train"][example] for example in examples]
        ours, theirs = ([row[f"{side}_prompt_ids"] for row in rows] for side in ("student", "teacher"))
        return self.batches(ours, theirs, rollouts)

    def _count(self, examples: tuple[int, ...], rollouts: list[Rollout] | None) -> tuple[int, int]:
        """(tokens, pairs) that a micro-batch adds to its optimizer step."""
        train = self.method.trainer.datamodule.sets["train"]
        if rollouts is None:
            return sum(train.supervised[i] for i in examples), sum(train.pairs[i] for i in examples)
        batch = self._batch(examples, rollouts)
        return batch.step_tokens, batch.step_pairs

    def _coin(self, examples: tuple[int, ...]) -> bool:
        generator = random.Random(self._seed(self.method.trainer.current_epoch, *examples))
        return generator.random() < self.settings.student_fraction

    def _seed(self, *numbers: int) -> int:
        return random.Random(f"{run_seed(self.settings.seed)} {numbers}").getrandbits(31)


def _rollout(fields: dict) -> Rollout:
    return Rollout(tuple(fields["tokens"]), fields["finished"])


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
