"""Files of edit requests: what is read, and what is refused with its line."""

import gzip
import json
from pathlib import Path

import pytest

from lit_llm.data.edit_requests import Question
from lit_llm.data.fact_files import read_requests, resolve_source

SHARED = Path(__file__).parents[3] / "shared" / "data" / "editing"
SETS = {  # requests of each shared file, and lines that are no request
    "bizsre_test": (817, 0),
    "bmike_counterfact_test": (838, 0),
    "bmike_zsre_test": (597, 0),
    "counterfact_en": (2022, 6),
    "mzsre_test": (597, 0),
    "zsre_en": (782, 16),
    "zsre_train_12lang": (7934, 27),
}


def row(**changes):
    english = {
        "subject": "Rome",
        "prompt": "Rome is in",
        "target_new": "France",
        "target_old": "Italy",
        "rephrase": ["Where is Rome? In"],
        "paraphrases": ["The city of Rome is in"],
        "locality": [{"prompt": "Oslo is in", "answer": "Norway"}],
        "portability": [{"prompt": "In Rome they speak", "answer": "French"}],
    }
    german = {"subject": "Rom", "prompt": "Rom liegt in", "target_new": "Frankreich"}
    return {"id": "rome", "relation": "in", "by_lang": {"en": english | changes, "de": german}}


def written(tmp_path, *rows, name="facts.jsonl"):
    lines = "".join((text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)) + "\n" for text in rows)
    path = tmp_path / name
    path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    return path


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.jsonl.gz"])
def test_every_field_of_a_line_arrives(tmp_path, name):
    (request,) = read_requests(written(tmp_path, row(), name=name)).requests
    english, german = request.edit.by_language["en"], request.edit.by_language["de"]
    assert (request.id, request.relation, request.languages) == ("rome", "in", ("en", "de"))
    assert (english.subject, english.prompt, english.target_new, english.target_old) == (
        "Rome",
        "Rome is in",
        "France",
        "Italy",
    )
    assert english.paraphrases == ("The city of Rome is in",) and german.target_old is None
    asked = request.questions["en"]
    assert asked.rephrases == ("Where is Rome? In",)
    assert asked.locality == (Question("Oslo is in", "Norway"),)
    assert asked.portability == (Question("In Rome they speak", "French"),)


def test_a_single_name_may_stand_without_a_list(tmp_path):
    (request,) = read_requests(written(tmp_path, {**row(), "names": "Roma"})).requests
    assert request.edit.names == ("Roma",)


def test_one_language_may_be_written_flat_and_an_id_is_made_of_the_line(tmp_path):
    flat = {"language": "zh", "subject": "罗马", "prompt": "罗马在", "target_new": "法国", "rephrase": "罗马位于"}
    (request,) = read_requests(written(tmp_path, "", flat)).requests
    assert (request.id, request.languages) == ("line-2", ("zh",))
    assert request.questions["zh"].rephrases == ("罗马位于",)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": 1', "line 2: not a line of JSON"),
        ("[]", "line 2: a request is a JSON object, not a list"),
        ({"id": "x"}, "line 2: a request has no by_lang; it has: id"),
        ({"by_lang": {}}, "line 2: by_lang is {}"),
        ({**row(), "names": 3}, "line 2: names is 3, not a text or a list of texts"),
        ({**row(), "names": ["Rome", 3]}, "line 2: names is 3, not a text"),
        ({**row(), "relation": ["capital"]}, "line 2: relation is .*, not a text"),
        (
            {"names": "R", "by_lang": {"en": {"prompt": "R is in", "target_new": "Peru"}}},
            "line 2: .*'R' is a single character",
        ),
        ({**row(), "targets": 1}, "line 2: a request has an unknown field targets; known are by_lang, dataset"),
        (row(target="France"), "line 2: by_lang.en has an unknown field target; known are locality, paraphrases"),
        ({"by_lang": {"en": {"prompt": "x"}}}, "line 2: by_lang.en has no target_new; it has: prompt"),
        ({"by_lang": {"cz": row()["by_lang"]["en"]}}, "line 2: 'cz' is not a language code.*Is it cs"),
        ({"by_lang": {"en": "Rome"}}, "line 2: by_lang.en is a str"),
        ('{"by_lang": {"en": {}, "en": {}}}', "line 2: 'en' is given twice"),
        (row(prompt=3), "line 2: en.prompt is 3, not a text"),
        (row(locality=[{"prompt": "x"}]), "line 2: en.locality holds .* objects with prompt and answer"),
    ],
)
def test_a_line_outside_the_schema_is_refused_whatever_the_setting(tmp_path, line, words):
    path = written(tmp_path, {**row(), "id": "first"}, line)
    with pytest.raises(ValueError, match=words):
        read_requests(path, bad_rows="drop")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (row(target_new=" "), "an empty text"),
        (row(subject=""), "an empty text"),
        (row(rephrase=[""]), "an empty text"),
        (row(locality=[{"prompt": "x", "answer": ""}]), "an empty text"),
        (row(target_new="Italy"), "a new target that is the old one"),
        (row(rephrase=["The city of Rome is in"]), "a paraphrase that is a question of the test"),
        (row(rephrase=["the city of  ROME is in"]), "a paraphrase that is a question of the test"),
        ({**row(), "id": "first"}, "an id that an earlier line has"),
    ],
)
def test_a_line_that_makes_no_request_is_refused_with_its_number_or_dropped_and_counted(tmp_path, line, reason):
    first = {"id": "first", "by_lang": {"en": {"subject": "Oslo", "prompt": "Oslo is in", "target_new": "Peru"}}}
    path = written(tmp_path, first, line)
    with pytest.raises(ValueError, match=f"1 of the 2 lines .* 1 with {reason} [(]line 2[)].*\n.*bad_rows: drop"):
        read_requests(path)
    assert read_requests(path, "drop").dropped == {reason: 1}


def test_a_prompt_that_is_there_twice_is_told_from_one_with_another_target(tmp_path):
    again, other = {**row(), "id": "again"}, {**row(target_new="Spain"), "id": "other"}
    file = read_requests(written(tmp_path, row(), again, other), "drop")
    assert [request.id for request in file.requests] == ["rome"]
    assert file.dropped == {
        "a prompt that an earlier line has": 1,
        "a prompt that an earlier line has, with another target": 1,
    }


def test_files_that_are_not_there_or_hold_nothing_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file of facts at nowhere.jsonl.*\n.*facts:countries"):
        resolve_source("nowhere.jsonl")
    with pytest.raises(ValueError, match="facts:cities does not exist. Packaged facts are facts:countries"):
        resolve_source("facts:cities")
    with pytest.raises(ValueError, match="no usable edit request: it is empty"):
        read_requests(written(tmp_path))
    (tmp_path / "broken.jsonl.gz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="could not be read as lines of UTF-8"):
        read_requests(tmp_path / "broken.jsonl.gz")


@pytest.mark.shared_data
@pytest.mark.parametrize("name", SETS)
def test_every_shared_set_is_read(name):
    file = SHARED / f"{name}.jsonl.gz"
    if not file.is_file():
        pytest.skip("the shared data is not beside the checkout")
    requests, unusable = SETS[name]
    if unusable:
        with pytest.raises(ValueError, match=f"{unusable} of the {requests + unusable} lines"):
            read_requests(file)
    read = read_requests(file, "drop")
    assert (len(read.requests), sum(read.dropped.values())) == (requests, unusable)
