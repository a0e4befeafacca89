"""The report on two vocabularies: counts that can be checked by hand, and advice that fits them."""

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.processes import Finished, run_python

ROOT = Path(__file__).parents[2]
ANSWERS = ["The cat sat on the mat.", "Café naïve déjà vu", "Name three colours."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.tiny_model_folder(folder / "bytes", tokenizer=tiny.byte_level_tokenizer(), vocab_size=384)
    tiny.tiny_model_folder(folder / "pieces", tokenizer=tiny.sentencepiece_tokenizer())
    (folder / "answers.txt").write_text("\n\n".join(ANSWERS), encoding="utf-8")
    return folder


def report(folder, *options: str) -> Finished:
    return run_python(ROOT / "tools" / "vocab_report.py", *options, cwd=ROOT)


def as_json(folder, student: str, teacher: str) -> dict:
    done = report(folder, str(folder / student), str(folder / teacher), "--json", "--text", str(folder / "answers.txt"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_one_tokenizer_is_recognised_and_kd_is_advised(folders):
    found = as_json(folders, "bytes", "bytes")
    assert found["same"] and found["lost"] == [] and found["lost_share"] == 0
    assert found["student"]["aligned"] == {"bytes": 1.0, "released": 1.0}
    assert "KD" in found["advice"][0] and "impossible" not in found["advice"][0]
    assert found["student"]["head_rows"] == 384
    assert found["student"]["padded_rows"] == 384 - len(tiny.byte_level_tokenizer())


def test_two_tokenizers_show_what_is_shared_lost_and_aligned(folders):
    from lit_llm.data.token_alignment import align_answers
    from lit_llm.data.vocabulary import shared_tokens, token_spellings

    found = as_json(folders, "bytes", "pieces")
    student, teacher = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
    assert not found["same"] and "KD is impossible" in found["advice"][0]
    assert found["shared_by_bytes"] == len(shared_tokens(student, teacher)[0])
    assert found["shared_by_string"] == len(shared_tokens(student, teacher, "string")[0])
    assert found["student"]["shared_by_bytes"] == found["shared_by_bytes"] / len(student)
    spellings = token_spellings(student), token_spellings(teacher)
    pairs, tokens = 0, 0
    for answer in ANSWERS:
        ids = [[*t(answer, add_special_tokens=False)["input_ids"], t.eos_token_id] for t in (student, teacher)]
        pairs, tokens = pairs + len(align_answers(*ids, *spellings)[0]), tokens + len(ids[0])
    assert found["student"]["aligned"]["bytes"] == pairs / tokens
    assert found["student"]["aligned"]["released"] < pairs / tokens  # it stops at the first accent
    assert found["special_map"]["</s> (eos)"] == "<|endoftext|>"
    student_bytes = set(token_spellings(student).bytes)
    assert found["lost"] and all(text.encode() not in student_bytes for text, _ in found["lost"])


def test_people_get_tables_and_sentences(folders):
    done = report(folders, str(folders / "bytes"), str(folders / "pieces"), "--text", str(folders / "answers.txt"))
    assert done.returncode == 0, done.stderr
    for text in ("rows of the head", "aligned, `bytes`", "Special tokens", "Advice:", "DSKD"):
        assert text in done.stdout


def test_equal_vocabularies_that_cut_texts_differently_are_told_apart(folders, tmp_path):
    settings = json.loads((folders / "bytes" / "tokenizer.json").read_text())
    settings["pre_tokenizer"]["add_prefix_space"] = True
    other = tiny.tiny_model_folder(tmp_path / "other", tokenizer=tiny.byte_level_tokenizer())
    (other / "tokenizer.json").write_text(json.dumps(settings))
    done = report(folders, str(folders / "bytes"), str(other), "--json", "--text", str(folders / "answers.txt"))
    found = json.loads(done.stdout)
    assert not found["same"] and "pre_tokenizer" in found["advice"][0]


def test_a_folder_that_does_not_exist_is_named_without_a_traceback(folders):
    done = report(folders, str(folders / "nothing"), str(folders / "bytes"))
    assert done.returncode == 1 and "nothing" in done.stderr and "Traceback" not in done.stderr
