"""From a batch of facts to what editors work on: rows of token ids, by fact and language."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_llm.data.batch import TokenBatch
from lit_llm.data.edit_batch import EditBatch
from lit_llm.data.edit_requests import Edit
from lit_llm.editing.fact_text import FactText
from lit_llm.editing.optimise import FactRows
from lit_llm.editing.rows import Row


@dataclass(frozen=True)
class EditedFact:
    """One fact in some of its languages.

    Attributes:
        edit: its texts.
        rows: language -> prompts with the new answer, the bare prompt first.
        essence: language -> "SUBJECT is a".
    """

    edit: Edit
    rows: dict[str, tuple[Row, ...]]
    essence: dict[str, Row]

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.rows)

    @property
    def text(self) -> FactText:
        """What it says, for the trigger and the file; its names in all languages, also where it is edited in one."""
        return text_of(self.edit)

    def within(self, languages: Sequence[str]) -> EditedFact:
        """The fact in these of its languages alone."""
        kept = tuple(code for code in languages if code in self.rows)
        edit = self.edit.in_languages(kept)
        return EditedFact(edit, {code: self.rows[code] for code in kept}, {code: self.essence[code] for code in kept})

    def fact_rows(self, *, paraphrases: bool) -> FactRows:
        """What shared values are optimised on: bare prompts, or all rows."""
        used = {code: rows if paraphrases else rows[:1] for code, rows in self.rows.items()}
        return FactRows(
            rows=tuple(row for rows in used.values() for row in rows),
            language_of_row=tuple(number for number, rows in enumerate(used.values()) for _ in rows),
            essence=tuple(self.essence[code] for code in used),
        )


def text_of(edit: Edit) -> FactText:
    """What an edit says."""
    subjects = {code: edit.by_language[code].subject or edit.aliases(code)[0] for code in edit.languages}
    names = [name for code in edit.languages for name in edit.aliases(code)]
    return FactText(
        id=edit.id,
        subjects=subjects,
        prompts={code: edit.by_language[code].prompt for code in edit.languages},
        targets={code: edit.by_language[code].target_new for code in edit.languages},
        relation=edit.relation,
        aliases=tuple(dict.fromkeys(name for name in names if name not in subjects.values())),
    )


def edited_facts(batch: EditBatch) -> list[EditedFact]:
    """The facts of a batch, in their order."""
    rows = _rows(batch.rows, batch.lookup_R.tolist(), batch.prompt_length_R.tolist())
    essence = _rows(batch.essence, batch.essence_lookup_S.tolist(), batch.essence.length_B.tolist())
    by_fact: list[tuple[dict[str, list[Row]], dict[str, Row]]] = [({}, {}) for _ in batch.edits]
    for row, fact, language in zip(rows, batch.fact_R.tolist(), batch.language_R.tolist(), strict=True):
        by_fact[fact][0].setdefault(batch.languages[language], []).append(row)
    of_essence = zip(batch.essence_fact_S.tolist(), batch.essence_language_S.tolist(), essence, strict=True)
    for fact, language, row in of_essence:
        by_fact[fact][1][batch.languages[language]] = row
    return [
        EditedFact(edit, {code: tuple(found) for code, found in prompts.items()}, about)
        for edit, (prompts, about) in zip(batch.edits, by_fact, strict=True)
    ]


def _rows(tokens: TokenBatch, lookups: list[int], prompt_lengths: list[int]) -> list[Row]:
    lengths = tokens.length_B.tolist()
    return [
        Row(tuple(ids[:prompt]), lookup, tuple(ids[prompt:length]))
        for ids, prompt, length, lookup in zip(tokens.ids_BL.tolist(), prompt_lengths, lengths, lookups, strict=True)
    ]
