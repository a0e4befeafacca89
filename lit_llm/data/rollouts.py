"""Batches of answers that the student sampled itself, read again by the teacher's tokenizer where that is another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_llm.data.batch import DistillationBatch, collate_pairs, collate_tokens
from lit_llm.data.token_alignment import align_answers, token_spellings


@dataclass(frozen=True)
class Rollout:
    """One sampled answer.

    Attributes:
        tokens: the student's tokens, without the one that ended it.
        finished: whether the student ended it itself, before the length limit.
    """

    tokens: tuple[int, ...]
    finished: bool


class RolloutBatches:
    """Turns sampled answers into batches like those of the data.

    Everything up to and including the first end of sequence is supervised; an answer that met the length limit has none.
    The teacher reads the decoded text in its own tokens, and tokens are paired by bytes, as in the data.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer where it differs, else None.
    """

    def __init__(self, student, teacher) -> None:
        self.student, self.teacher = student, teacher
        self._spellings = None if teacher is None else (token_spellings(student), token_spellings(teacher))

    def __call__(
        self, prompts: Sequence[Sequence[int]], teacher_prompts: Sequence[Sequence[int]], rollouts: Sequence[Rollout]
    ) -> DistillationBatch:
        """The batch of some prompts and their sampled answers; its step totals are its own.

        Args:
            prompts: the student's tokens of each prompt.
            teacher_prompts: the teacher's; not looked at with one tokenizer.
            rollouts: the answers.
        """
        answers = [[*r.tokens, *([self.student.eos_token_id] if r.finished else [])] for r in rollouts]
        ids = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        student = collate_tokens(ids, [len(prompt) for prompt in prompts], self.student.pad_token_id)
        teacher = pair_student_A = pair_teacher_A = None
        if self.teacher is not None:
            read = [self._as_teacher(rollout) for rollout in rollouts]
            theirs = [[*prompt, *answer] for prompt, answer in zip(teacher_prompts, read, strict=True)]
            teacher = collate_tokens(theirs, [len(prompt) for prompt in teacher_prompts], self.teacher.pad_token_id)
            pairs = [align_answers(a, b, *self._spellings) for a, b in zip(answers, read, strict=True)]
            pair_student_A, pair_teacher_A = collate_pairs(
                student, teacher, [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            )
        return DistillationBatch(
            student=student,
            teacher=teacher,
            pair_student_A=pair_student_A,
            pair_teacher_A=pair_teacher_A,
            step_tokens=student.num_supervised,
            step_pairs=student.num_supervised if pair_student_A is None else len(pair_student_A),
            num_tokens=sum(map(len, ids)),
            examples=(),
        )

    def _as_teacher(self, rollout: Rollout) -> list[int]:
        text = self.student.decode(rollout.tokens, skip_special_tokens=True)
        ids = self.teacher(text, add_special_tokens=False)["input_ids"]
        return [*ids, *([self.teacher.eos_token_id] if rollout.finished else [])]
