"""The shipped demonstration data and the script that makes it."""

import gzip
import hashlib
import importlib.resources
import json
from pathlib import Path

import pytest

PARTS = {"train": 640, "validation": 64, "test": 64}
FOLDER = importlib.resources.files("lit_llm.data") / "demo"


@pytest.fixture
def tools(monkeypatch):
    """The modules of `tools/`, which is a folder of scripts and not a package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    import demo_prompts
    import make_demo_data

    return demo_prompts, make_demo_data


@pytest.fixture(scope="module")
def rows():
    return {part: [json.loads(line) for line in gzip.decompress(_packed(part)).splitlines()] for part in PARTS}


def _packed(part):
    return (FOLDER / f"{part}.jsonl.gz").read_bytes()


def test_the_shipped_files_are_small_and_the_readme_names_their_sums():
    readme = (FOLDER / "README.md").read_text()

    assert sum(len(_packed(part)) for part in PARTS) < 1_000_000
    for part in PARTS:
        assert hashlib.sha256(_packed(part)).hexdigest() in readme
        assert _packed(part)[4:8] == bytes(4), "a time stamp in the gzip header makes every build differ"


def test_the_parts_have_their_sizes_and_share_no_prompt_answer_or_id(rows):
    assert {part: len(members) for part, members in rows.items()} == PARTS
    for field in ("id", "prompt", "response"):
        values = [row[field] for members in rows.values() for row in members]
        assert len(set(values)) == len(values), field


def test_every_part_holds_at_least_thirty_kinds_of_task(rows):
    for part, members in rows.items():
        kinds = {row["kind"] for row in members}
        assert len(kinds) >= 30, part
        assert kinds <= {row["kind"] for row in rows["train"]}


def test_every_shipped_prompt_comes_from_the_material(rows, tools):
    demo_prompts, _ = tools
    material = {prompt.id: prompt for prompt in demo_prompts.load_prompts()}

    for row in (row for members in rows.values() for row in members):
        assert material[row["id"]] == demo_prompts.DemoPrompt(row["id"], row["kind"], row["prompt"])


def test_every_shipped_answer_passes_the_filter(rows, tools):
    demo_prompts, make_demo_data = tools
    for row in (row for members in rows.values() for row in members):
        prompt = demo_prompts.DemoPrompt(row["id"], row["kind"], row["prompt"])
        answer = make_demo_data.Answer("", row["response"], tokens=9, finished=True)
        assert make_demo_data.fault(prompt, answer) is None, row


def test_the_material_has_over_a_thousand_different_prompts(tools):
    demo_prompts, _ = tools
    prompts = demo_prompts.load_prompts()

    assert len({prompt.prompt for prompt in prompts}) == len(prompts) >= 1100
    assert demo_prompts.load_prompts() == prompts
    assert max(len(prompt.prompt) for prompt in prompts) < 140


@pytest.mark.parametrize(
    ("material", "complaint"),
    [
        ('k: {ask: ["Say {x}."], about: one | one}', "same prompt"),
        ('k: {ask: ["Say {x}."], about: one | }', "empty filler"),
        ('k: {ask: ["Say {x}."], about: one = two}', "does not fit"),
        ('k: {ask: ["Say {a} {b}."], about: one}', "does not fit"),
        ("k: {ask: [], about: one}", "0 templates"),
    ],
)
def test_broken_material_is_refused_by_name(tools, tmp_path, material, complaint):
    demo_prompts, _ = tools
    (tmp_path / "material.yaml").write_text(material)

    with pytest.raises(ValueError, match=complaint):
        demo_prompts.load_prompts(tmp_path / "material.yaml")


@pytest.mark.parametrize(
    ("text", "finished", "reason"),
    [
        ("Rain is water that falls", False, "unfinished"),
        (" ...", True, "empty"),
        ("As a chatbot I cannot say.", True, "speaks of itself"),
        ("Say what rain is.", True, "echo"),
        ("Rain is a kind of water and a kind of snow.", True, "repetitive"),
        ("Rain is water that falls.", True, None),
    ],
)
def test_answers_that_teach_nothing_are_named(tools, text, finished, reason):
    demo_prompts, make_demo_data = tools
    prompt = demo_prompts.DemoPrompt("k-00", "k", "Say what rain is.")

    assert make_demo_data.fault(prompt, make_demo_data.Answer("", text, 9, finished)) == reason


def test_the_split_deals_every_kind_to_every_part_and_depends_on_the_seed_only(tools):
    _, make_demo_data = tools
    rows = [{"id": f"{kind}-{i}", "kind": kind} for kind in "abcd" for i in range(10)]
    sizes = {"validation": 4, "test": 8, "train": 20}

    parts = make_demo_data.split_rows(rows, sizes, seed=3)

    assert {part: len(members) for part, members in parts.items()} == sizes
    assert all({row["kind"] for row in members} == set("abcd") for members in parts.values())
    assert make_demo_data.split_rows(rows, sizes, seed=3) == parts != make_demo_data.split_rows(rows, sizes, seed=4)
    with pytest.raises(ValueError, match="40 usable answers, but the parts ask for 41"):
        make_demo_data.split_rows(rows, {"train": 41}, seed=3)


def test_an_answer_that_was_being_written_when_the_script_died_is_asked_again(tools, tmp_path):
    _, make_demo_data = tools
    file = tmp_path / "answers.jsonl"
    whole = '{"key": "a", "text": "Yes.", "tokens": 3, "finished": true}\n'
    file.write_text(whole + '{"key": "b", "te')

    assert list(make_demo_data.read_answers(file)) == ["a"]
    assert file.read_text() == whole


def test_a_file_that_holds_no_answers_is_refused(tools, tmp_path):
    _, make_demo_data = tools
    file = tmp_path / "answers.jsonl"
    file.write_text('{"prompt": "x"}\n')

    with pytest.raises(ValueError, match="not a file of answers"):
        make_demo_data.read_answers(file)


def test_writing_the_same_rows_twice_gives_the_same_bytes(tools, tmp_path):
    _, make_demo_data = tools
    parts = {part: [{"id": "k-00", "kind": "k", "prompt": "Hi", "response": "Hello"}] for part in PARTS}

    for folder in ("first", "second"):
        make_demo_data.write_parts(parts, tmp_path / folder, limit=40)

    for name in ("train.jsonl.gz", "validation.jsonl.gz", "test.jsonl.gz", "README.md"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
