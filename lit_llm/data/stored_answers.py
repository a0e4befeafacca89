"""The answers of pairs as single sequences, for a store of what frozen models say about them."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np

from lit_llm.data.preference_pairs import PairSet

Side = Literal["chosen", "rejected"]


class AnswerSet:
    """Prompts with one answer each: all chosen ones in the order of the pairs, then, if they are wanted, all rejected ones.

    Args:
        pairs: tokenised pairs.
        sides: the answers that are wanted, in this order.
    """

    distinct_teacher = False

    def __init__(self, pairs: PairSet, sides: tuple[Side, ...]) -> None:
        self.pairs, self.sides = pairs, sides

    def __len__(self) -> int:
        return len(self.pairs) * len(self.sides)

    def __getitem__(self, number: int) -> dict[str, Any]:
        side, row = divmod(number, len(self.pairs))
        fields = self.pairs[row]
        prompt = fields["student_prompt_ids"]
        return {"student_ids": [*prompt, *fields[f"{self.sides[side]}_ids"]], "student_prompt": len(prompt)}

    def of(self, pairs: tuple[int, ...]) -> list[int]:
        """Numbers of the answers of some pairs: of one side after the other."""
        return [row + side * len(self.pairs) for side in range(len(self.sides)) for row in pairs]

    def reading(self) -> tuple[str, np.ndarray, np.ndarray]:
        """A hash of all tokens and prompt lengths, and tokens and supervised tokens of each sequence."""
        digest, all_lengths, all_rows = hashlib.sha256(), [], []
        for side in self.sides:
            columns = ["student_prompt_ids", f"{side}_ids"]
            for piece in self.pairs.table.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
                counts = []
                for name in columns:
                    lists = piece[name].combine_chunks()
                    counts.append(lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64))
                    digest.update(counts[-1].tobytes())
                    digest.update(lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
                prompts, answers = counts
                all_lengths.append(prompts + answers)
                all_rows.append(prompts + answers - np.maximum(prompts, 1))
        return digest.hexdigest(), np.concatenate(all_lengths), np.concatenate(all_rows)
