"""Edit requests as sets of tokenised examples, and what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, Optional

from lit_llm.data.edit_batch import KINDS, EditRow, EncodedEdit, Kind, QuestionRow
from lit_llm.data.edit_requests import Edit, EditRequest, Questions
from lit_llm.data.fact_tokens import FactText, Separator, encode_facts, located
from lit_llm.data.subjects import HOW, SubjectMatch
from lit_llm.data.tokenized import EvaluationPrompt

_ESSENCE = {  # "SUBJECT is a"; the bare subject in other languages
    "ar": "{} هو", "cs": "{} je", "de": "{} ist ein", "el": "{} είναι", "en": "{} is a", "es": "{} es un",
    "fr": "{} est un", "hi": "{} एक", "hu": "{} egy", "id": "{} adalah", "it": "{} è un", "ja": "{}は", "ko": "{}은",
    "nl": "{} is een", "pl": "{} to", "pt": "{} é um", "ru": "{} — это", "sw": "{} ni", "th": "{}เป็น", "tr": "{} bir",
    "vi": "{} là một", "zh": "{}是一个",
}  # fmt: skip
_NAMED = 5


@dataclass(frozen=True)
class FactEncoding:
    """How requests become tokens; the fields are those of `Facts`, where they are documented."""

    target_separator: Separator = "auto"
    prompt_format: str = "{}"
    locality_prefix: str = ""
    missing_subjects: Literal["prompt_end", "drop", "refuse"] = "prompt_end"
    max_target_tokens: Optional[int] = None
    target_end: str = ""
    counterfact: bool = False

    def __post_init__(self) -> None:
        if self.prompt_format.count("{}") != 1:
            raise ValueError(
                f"data.prompt_format is {self.prompt_format!r}; it needs one {{}}, where the prompt is put, as in "
                f"'Question: {{}} Answer:'."
            )


@dataclass(frozen=True)
class EditSummary:
    """What became of the requests.

    Attributes:
        requests: kept.
        languages: code -> requests that have it.
        prompts: prompts and paraphrases.
        prompt_tokens: tokens of them.
        target_tokens: tokens of the prompts' targets.
        longest_target: in tokens.
        found: language -> how the subjects of its prompts were found, counted.
        crossed: prompts whose end is merged with the beginning of their target.
        dropped: reason -> requests.
    """

    requests: int
    languages: dict[str, int]
    prompts: int
    prompt_tokens: int
    target_tokens: int
    longest_target: int
    found: dict[str, Counter[str]]
    crossed: int
    dropped: dict[str, int]

    def text(self, name: str) -> str:
        pairs = sum(self.languages.values())
        parts = [
            f"{name}: {self.requests:,} requests in {', '.join(self.languages)}",
            f"{self.prompts:,} prompts of {self.prompt_tokens / self.prompts:.1f} tokens on average, new targets of "
            f"{self.target_tokens / pairs:.1f} (the longest of {self.longest_target})",
            f"subjects found: {found_text(self.found)}",
        ]
        if self.crossed:
            parts.append(f"in {self.crossed:,} prompts the end is merged with the beginning of the target")
        if self.dropped:
            parts.append("dropped: " + ", ".join(f"{count:,} with {reason}" for reason, count in self.dropped.items()))
        return "; ".join(parts)


def found_text(found: Mapping[str, Counter[str]]) -> str:
    """The rules that found the subjects, in percent; languages where one in twenty is missing are named."""
    total = sum(found.values(), Counter())
    shares = [f"{how} {total[how] / total.total():.1%}" for how in HOW if total[how]]
    missing = {code: counts["none"] / counts.total() for code, counts in found.items()}
    often = [f"{code} {share:.0%}" for code, share in missing.items() if share >= 0.05]
    return ", ".join(shares) + (f" (none: {', '.join(often)}; the prompt's end stands in)" if often else "")


class EditSet:
    """Requests to edit, in tokens. Their tests are not here."""

    def __init__(self, facts: list[EncodedEdit], languages: tuple[str, ...], summary: EditSummary) -> None:
        self.facts, self.languages, self.summary = facts, languages, summary

    def __len__(self) -> int:
        return len(self.facts)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each fact's longest row."""
        return [max(len(row.tokens.ids) for row in fact.rows) for fact in self.facts]

    @cached_property
    def supervised(self) -> list[int]:
        return [sum(row.tokens.answer_length for row in fact.rows if row.paraphrase == 0) for fact in self.facts]

    @cached_property
    def pairs(self) -> list[int]:
        """Languages of each fact."""
        return [len(fact.edit.languages) for fact in self.facts]

    def prompt(self, row: int) -> EvaluationPrompt:
        """The prompt of the first language, with the new target."""
        first, fact = self.facts[row].rows[0], self.facts[row].edit
        target = fact.by_language[first.language]
        return EvaluationPrompt(target.prompt, list(first.tokens.prompt_ids), None, [target.target_new])


class Advice(NamedTuple):
    """What messages tell to do.

    Attributes:
        long_target: about a target of too many tokens.
        lost_subject: about a subject that no prompt names.
    """

    long_target: str = "Raise data.max_target_tokens or set data.bad_rows: drop."
    lost_subject: str = "Correct the subjects, or set data.missing_subjects: drop or prompt_end."


def encode_edits(
    edits: Sequence[Edit],
    encoding: FactEncoding,
    tokenizer,
    *,
    bad_rows: Literal["refuse", "drop"] = "refuse",
    dropped: Mapping[str, int] = {},  # noqa: B006  read only
    name: str = "the facts",
    advice: Advice = Advice(),
) -> EditSet:
    """Tokenise edits.

    Args:
        edits: to encode.
        encoding: of the data.
        tokenizer: a fast one, of the edited model.
        bad_rows: what happens to edits with a target of more than `max_target_tokens`.
        dropped: what was dropped before, for the summary.
        name: of the data, for messages.
        advice: for messages.

    Raises:
        ValueError: a missing subject with `missing_subjects: refuse`, or a target that is too long with
            `bad_rows: refuse` (each with its request, language and number); or nothing is left.
    """
    encoded = _encoded(edits, encoding, tokenizer)
    long_, lost = f"a target of more than {encoding.max_target_tokens} tokens", "a subject that no prompt names"
    kept, counts = [], Counter(dropped)
    found: dict[str, list[tuple[str, str]]] = {long_: [], lost: []}
    for fact in encoded:
        too_long = [row for row in fact.rows if row.tokens.answer_length > (encoding.max_target_tokens or 10**9)]
        missing = [row for row in fact.rows if row.how == "none"]
        if too_long:
            found[long_].append((fact.edit.id, too_long[0].language))
        elif missing and encoding.missing_subjects != "prompt_end":
            found[lost].append((fact.edit.id, missing[0].language))
        else:
            kept.append(fact)
    if found[long_] and bad_rows == "refuse":
        raise ValueError(_refusal(name, long_, found[long_], advice.long_target))
    if found[lost] and encoding.missing_subjects == "refuse":
        raise ValueError(_refusal(name, lost, found[lost], advice.lost_subject))
    counts.update({reason: len(members) for reason, members in found.items() if members})
    if not kept:
        raise ValueError(
            f"No request of {name} is left: "
            + ", ".join(f"{count} dropped with {reason}" for reason, count in counts.items())
        )
    languages = tuple(dict.fromkeys(code for fact in kept for code in fact.edit.languages))
    return EditSet(kept, languages, _summary(kept, languages, dict(counts)))


def _encoded(edits: Sequence[Edit], encoding: FactEncoding, tokenizer) -> list[EncodedEdit]:
    plan = [
        (edit, code, number, prompt, located(edit, code, prompt))
        for edit in edits
        for code, fact in edit.by_language.items()
        for number, prompt in enumerate((fact.prompt, *fact.paraphrases))
    ]
    texts = [
        _formatted(code, prompt, edit.by_language[code].target_new + encoding.target_end, match, encoding.prompt_format)
        for edit, code, _, prompt, match in plan
    ]
    essence = [(edit, code, _essence(edit, code)) for edit in edits for code in edit.languages]
    rows = iter(encode_facts(tokenizer, texts, encoding.target_separator))
    essence_rows = iter(encode_facts(tokenizer, [text for _, _, text in essence]))
    by_edit: dict[int, tuple[list[EditRow], dict]] = {id(edit): ([], {}) for edit in edits}
    for edit, code, number, _, match in plan:
        by_edit[id(edit)][0].append(EditRow(code, number, match.how, next(rows)))
    for edit, code, _ in essence:
        by_edit[id(edit)][1][code] = next(essence_rows)
    return [EncodedEdit(edit, tuple(by_edit[id(edit)][0]), by_edit[id(edit)][1]) for edit in edits]


def _formatted(language: str, prompt: str, answer: str, match: SubjectMatch | None, wrapper: str) -> FactText:
    """A prompt inside the words that are put around every prompt."""
    before, after = wrapper.split("{}")
    end = None if match is None or match.how == "none" else len(before) + match.end
    return FactText(language, before + prompt + after, answer, end)


def _essence(edit: Edit, language: str) -> FactText:
    subject = edit.by_language[language].subject or edit.aliases(language)[0]
    before, after = _ESSENCE.get(language.split("-")[0], "{}").split("{}")
    return FactText(language, before + subject + after, "", len(before) + len(subject))


def _summary(facts: list[EncodedEdit], languages: tuple[str, ...], dropped: dict[str, int]) -> EditSummary:
    rows = [row for fact in facts for row in fact.rows]
    prompts = [row for row in rows if row.paraphrase == 0]
    found = {code: Counter() for code in languages}
    for row in prompts:
        found[row.language][row.how] += 1
    return EditSummary(
        requests=len(facts),
        languages={code: sum(code in fact.edit.by_language for fact in facts) for code in languages},
        prompts=len(rows),
        prompt_tokens=sum(row.tokens.prompt_length for row in rows),
        target_tokens=sum(row.tokens.answer_length for row in prompts),
        longest_target=max(row.tokens.answer_length for row in prompts),
        found=found,
        crossed=sum(row.tokens.crossed for row in rows),
        dropped=dropped,
    )


def _refusal(name: str, reason: str, members: list[tuple[str, str]], step: str) -> str:
    places = ", ".join(f"{fact} ({code})" for fact, code in members[:_NAMED]) + (
        ", ..." if len(members) > _NAMED else ""
    )
    return f"{len(members)} requests of {name} with {reason}: {places}.\n  {step}"


@dataclass(frozen=True)
class QuestionSummary:
    """What is asked.

    Attributes:
        requests: that have questions.
        kinds: kind -> questions.
        repeated: rephrased questions that are the prompt itself.
        found: language -> how the subject was found in rephrased and one-hop questions, counted.
    """

    requests: int
    kinds: dict[Kind, int]
    repeated: int
    found: dict[str, Counter[str]] = field(default_factory=dict)

    def text(self, name: str) -> str:
        parts = [
            f"{name}: questions about {self.requests:,} requests: "
            + ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items() if count)
        ]
        if self.repeated:
            parts.append(f"{self.repeated / self.kinds['generality']:.0%} of generality repeats the prompt itself")
        if any(self.found.values()):
            parts.append(f"subjects found in what is worded anew: {found_text(self.found)}")
        return "; ".join(parts)


class QuestionSet:
    """The questions about each request, in tokens."""

    def __init__(
        self,
        ids: list[str],
        questions: list[tuple[QuestionRow, ...]],
        languages: tuple[str, ...],
        summary: QuestionSummary,
    ) -> None:
        self.ids, self.questions, self.languages, self.summary = ids, questions, languages, summary

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of the longest question about each request."""
        return [max(len(row.tokens.ids) for row in rows) for rows in self.questions]

    @cached_property
    def supervised(self) -> list[int]:
        return [sum(row.tokens.answer_length for row in rows) for rows in self.questions]

    @cached_property
    def pairs(self) -> list[int]:
        """Questions about each request."""
        return [len(rows) for rows in self.questions]

    def prompt(self, row: int) -> EvaluationPrompt:
        """The edit's own question in the first language."""
        first = self.questions[row][0]
        return EvaluationPrompt(first.prompt, list(first.tokens.prompt_ids), None, [first.answer])


def encode_questions(requests: Sequence[EditRequest], encoding: FactEncoding, tokenizer) -> QuestionSet:
    """Tokenise everything that is asked about requests: their prompts, and their questions in every language.

    Args:
        requests: at least one.
        encoding: of the data.
        tokenizer: a fast one, of the edited model.

    Raises:
        ValueError: `counterfact` without former answers.
    """
    plan = [(request, asked) for request in requests for asked in _asked(request, encoding.counterfact)]
    if encoding.counterfact and not any(asked.is_rival and asked.kind == "reliability" for _, asked in plan):
        raise ValueError(
            "data.counterfact is true, but no request has a target_old, with whose likelihood that of the new answer would be "
            "compared. Add it to the facts, or leave counterfact out."
        )
    matches = [
        None if asked.kind == "locality" else located(request.edit, asked.language, asked.prompt)
        for request, asked in plan
    ]
    texts = [
        _formatted(
            asked.language,
            (encoding.locality_prefix if asked.kind == "locality" else "") + asked.prompt,
            asked.answer,
            match,
            encoding.prompt_format,
        )
        for (_, asked), match in zip(plan, matches, strict=True)
    ]
    by_id: dict[str, list[QuestionRow]] = {request.id: [] for request in requests}
    found: dict[str, Counter[str]] = {}
    rows = encode_facts(tokenizer, texts, encoding.target_separator)
    for (request, asked), match, text, tokens in zip(plan, matches, texts, rows, strict=True):
        how = None if match is None else match.how
        row = QuestionRow(asked.kind, asked.language, text.prompt, asked.answer, how, tokens, asked.is_rival)
        by_id[request.id].append(row)
        if asked.kind in ("generality", "portability") and not asked.is_rival:
            found.setdefault(asked.language, Counter())[how] += 1
    own = [(request, asked) for request, asked in plan if not asked.is_rival]
    kinds = Counter(asked.kind for _, asked in own)
    repeated = sum(
        asked.kind == "generality" and asked.prompt == request.edit.by_language[asked.language].prompt
        for request, asked in own
    )
    languages = tuple(dict.fromkeys(code for request in requests for code in request.languages))
    summary = QuestionSummary(len(requests), {kind: kinds[kind] for kind in KINDS}, repeated, found)
    return QuestionSet(list(by_id), [tuple(rows) for rows in by_id.values()], languages, summary)


class _Asked(NamedTuple):
    kind: Kind
    language: str
    prompt: str
    answer: str
    is_rival: bool = False


def _asked(request: EditRequest, rivals: bool) -> list[_Asked]:
    """The questions; and, for CounterFact's scores, each again with the answer that should be less likely."""
    asked: list[_Asked] = []
    for code, fact in request.edit.by_language.items():
        tests = request.questions.get(code, Questions())
        about = [("reliability", fact.prompt), *(("generality", prompt) for prompt in tests.rephrases)]
        asked += [_Asked(kind, code, prompt, fact.target_new) for kind, prompt in about]
        for kind in ("locality", "portability"):
            asked += [_Asked(kind, code, question.prompt, question.answer) for question in getattr(tests, kind)]
        if rivals and fact.target_old is not None:
            asked += [_Asked(kind, code, prompt, fact.target_old, True) for kind, prompt in about]
            asked += [_Asked("locality", code, other.prompt, fact.target_new, True) for other in tests.locality]
    return asked
