"""What is to be changed in a model, and what it is asked afterwards: kept in two types, so that no answer sheet is edited.

An editor is given an `Edit`. The rephrased, unrelated and one-hop questions of the same fact live in `Questions`, which no
`Edit` can hold; only an `EditRequest` has both (arXiv 2406.16416, 2309.08952). What batches hold is meant as read-only, but not
declared `frozen`: see `lit_llm.data.batch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lit_llm.data.language_codes import check_language, primary_language
from lit_llm.folding import fold

UNSPACED = frozenset(["zh", "ja", "th", "km", "lo", "my"])  # languages that put no space between words


@dataclass
class LanguageEdit:
    """A fact in one language, as an editor gets it.

    Attributes:
        prompt: the question or unfinished sentence; what comes next is the answer.
        target_new: the answer to be edited in.
        subject: what the prompt is about; None where the source has none in this language: the others' are looked for.
        target_old: the true or former answer, where the source has one.
        paraphrases: other wordings of the prompt for locating; never those that the edit is tested with.

    Raises:
        ValueError: an empty prompt, target, subject or paraphrase; the subject is None or not, but never "".
    """

    prompt: str
    target_new: str
    subject: str | None = None
    target_old: str | None = None
    paraphrases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt", "target_new", "subject", "target_old"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ValueError(f"{name} is empty ({value!r}). Give it, or leave the language out.")
        if not all(text.strip() for text in self.paraphrases):
            raise ValueError("a paraphrase is empty. Give it, or leave it out.")


@dataclass
class Edit:
    """One fact in all of its languages: everything that locating and optimisation may see.

    Attributes:
        id: names the request.
        by_language: language code -> the fact in that language; the order is kept.
        relation: what is said of the subject, the same string for all facts of that relation; None where unknown.
        names: of the subject, beside those of the languages.

    Raises:
        ValueError: no language, an unknown one, no subject in any of them, or one whose names are single characters.
    """

    id: str
    by_language: Mapping[str, LanguageEdit]
    relation: str | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.by_language:
            raise ValueError(f"Request {self.id}: no language. Give a prompt and a new target in at least one.")
        for language in self.by_language:
            check_language(language)
        subjects = [fact.subject for fact in self.by_language.values() if fact.subject]
        if not self.names and not subjects:
            raise ValueError(f"Request {self.id}: no language has a subject. Give one that its prompt contains.")
        if all(len(fold(name).text) < 2 for name in (*subjects, *self.names)):
            raise ValueError(
                f"Request {self.id}: {(*subjects, *self.names)[0]!r} is a single character, which any text may hold, so an edit of "
                f"it would act anywhere. Give the subject a longer name."
            )

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.by_language)

    def aliases(self, language: str) -> tuple[str, ...]:
        """The subject in the other languages, English first, then its other names; each once."""
        order = sorted(self.by_language, key=lambda code: code != "en")
        names = [*(self.by_language[code].subject for code in order if code != language), *self.names]
        own = self.by_language[language].subject
        return tuple(dict.fromkeys(name for name in names if name is not None and name != own))

    def in_languages(self, languages: tuple[str, ...]) -> Edit:
        """The same edit in these of its languages, in this order; the subjects of the others stay as names."""
        others = [code for code in sorted(self.languages, key=lambda code: code != "en") if code not in languages]
        names = [self.by_language[code].subject for code in others]
        kept = {code: self.by_language[code] for code in languages}
        return Edit(self.id, kept, self.relation, (*(name for name in names if name is not None), *self.names))


@dataclass(frozen=True)
class Question:
    """A question with its answer."""

    prompt: str
    answer: str

    def __post_init__(self) -> None:
        for name in ("prompt", "answer"):
            if not getattr(self, name).strip():
                raise ValueError(f"the {name} of a question is empty. Give it, or leave the question out.")


@dataclass(frozen=True)
class Questions:
    """What tests an edit in one language; see the top of this file.

    Attributes:
        rephrases: other wordings of the prompt (generality).
        locality: unrelated questions; their answers should stay as they were before the edit.
        portability: questions that need the edited fact for one step.
    """

    rephrases: tuple[str, ...] = ()
    locality: tuple[Question, ...] = ()
    portability: tuple[Question, ...] = ()

    def __post_init__(self) -> None:
        if not all(text.strip() for text in self.rephrases):
            raise ValueError("a rephrased question is empty. Give it, or leave it out.")


def taught(edit: LanguageEdit, questions: Questions) -> list[str]:
    """Rephrased questions that are paraphrases of the edit, except the prompt itself; case and white space do not count."""
    paraphrases = {alike(text) for text in edit.paraphrases} - {alike(edit.prompt)}
    return [text for text in questions.rephrases if alike(text) in paraphrases]


def alike(text: str) -> str:
    """A text as it is compared with others: case and white space do not count."""
    return " ".join(text.casefold().split())


@dataclass(frozen=True)
class EditRequest:
    """An edit with the questions about it.

    Attributes:
        edit: what the editor is given.
        questions: language code -> the questions in that language.

    Raises:
        ValueError: questions in a language that the edit lacks, or a paraphrase that is a rephrased question, except
            where it is the prompt itself.
    """

    edit: Edit
    questions: Mapping[str, Questions] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if foreign := [language for language in self.questions if language not in self.edit.by_language]:
            raise ValueError(
                f"Request {self.id} has questions in {', '.join(foreign)}, but is edited in "
                f"{', '.join(self.languages)}. Leave them out, or give a prompt and a target there."
            )
        for language, questions in self.questions.items():
            given = self.edit.by_language[language]
            if shared := taught(given, questions):
                raise ValueError(
                    f"Request {self.id}, {language}: {shared[0]!r} is a paraphrase for locating and a rephrased "
                    f"question as well; tested on it, the edit would only repeat itself. Remove it from one of them."
                )

    @property
    def id(self) -> str:
        return self.edit.id

    @property
    def relation(self) -> str | None:
        return self.edit.relation

    @property
    def languages(self) -> tuple[str, ...]:
        return self.edit.languages

    def in_languages(self, languages: tuple[str, ...]) -> EditRequest:
        """The same request in these of its languages, in this order."""
        questions = {code: self.questions[code] for code in languages if code in self.questions}
        return EditRequest(self.edit.in_languages(languages), questions)


def separator(prompt: str, language: str, rule: str = "auto") -> str:
    """What stands between a prompt and its answer.

    Args:
        prompt: the text before; nothing is added behind white space.
        language: of the prompt.
        rule: `auto`: a space, but nothing in languages that put none between words (zh, ja, th, km, lo, my); `space` in
            all languages, as published code has it; `none`.
    """
    if rule == "none" or prompt[-1:].isspace():
        return ""
    return "" if rule == "auto" and primary_language(language) in UNSPACED else " "
