"""The shipped preference pairs and the script that makes them."""

import gzip
import hashlib
import importlib.resources
import json
import random
from argparse import Namespace
from pathlib import Path

import pytest

from lit_llm.evaluation.constraints import reward
from tests.data.test_preferences import TEMPLATE
from tests.tiny import sentencepiece_tokenizer, tiny_model_folder

PARTS = {"train": 300, "judge": 140, "validation": 56, "test": 56}
FOLDER = importlib.resources.files("lit_llm.data") / "demo"


@pytest.fixture
def tools(monkeypatch):
    """The modules of `tools/`, which is a folder of scripts and not a package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    import make_preference_data
    import preference_prompts

    return preference_prompts, make_preference_data


@pytest.fixture(scope="module")
def rows():
    return {part: [json.loads(line) for line in gzip.decompress(_packed(part)).splitlines()] for part in PARTS}


def _packed(part):
    return (FOLDER / f"preferences_{part}.jsonl.gz").read_bytes()


def test_the_shipped_files_are_small_and_their_page_names_their_sums():
    page = (FOLDER / "PREFERENCES.md").read_text()

    assert sum(len(_packed(part)) for part in PARTS) < 400_000
    for part in PARTS:
        assert hashlib.sha256(_packed(part)).hexdigest() in page
        assert _packed(part)[4:8] == bytes(4), "a time stamp in the gzip header makes every build differ"
    assert "Licence: Apache-2.0" in page and "PREFERENCES.md" in (FOLDER / "README.md").read_text()


def test_the_parts_have_their_sizes_and_share_no_prompt_topic_or_id(rows):
    assert {part: len(members) for part, members in rows.items()} == PARTS
    for field in ("id", "prompt"):
        values = [row[field] for members in rows.values() for row in members]
        assert len(set(values)) == len(values), field
    topics = [{row["topic"] for row in members} for members in rows.values()]
    assert sum(map(len, topics)) == len(set.union(*topics))


def test_scores_are_the_share_of_checks_that_hold_and_chosen_passes_more(rows):
    for row in (row for members in rows.values() for row in members):
        scores = [reward(row[side], row["checks"]) for side in ("chosen", "rejected")]
        assert scores == pytest.approx([row["score_chosen"], row["score_rejected"]], abs=1e-4)
        assert scores[0] > scores[1], row["id"]
        assert 1 <= len(row["checks"]) <= 3


def test_length_alone_does_not_explain_the_preference(rows):
    for part, members in rows.items():
        longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in members)
        assert 0.4 < longer / len(members) < 0.6, part


def test_every_shipped_prompt_comes_from_the_material_of_its_part(rows, tools):
    prompts, script = tools
    material = prompts.load_material()
    topics = prompts.deal_topics(material, script.PARTS, seed=0)
    for part, members in rows.items():
        number = len(topics[part]) * len(material["tasks"])
        made = {prompt.id: prompt for prompt in prompts.make_prompts(material, topics[part], number, seed=0)}
        for row in members:
            prompt = made[row["id"]]
            assert (row["topic"], row["prompt"], row["checks"]) == (prompt.topic, prompt.prompt, prompt.checks)


def test_the_kinds_of_the_held_out_parts_are_trained_on(rows):
    kinds = {part: {check["kind"] for row in members for check in row["checks"]} for part, members in rows.items()}
    assert len(kinds["train"]) >= 12
    assert kinds["validation"] | kinds["test"] | kinds["judge"] <= kinds["train"]


def test_no_prompt_asks_for_the_same_kind_twice_and_asking_again_gives_the_same(tools):
    prompts, script = tools
    material = prompts.load_material()
    topics = prompts.deal_topics(material, script.PARTS, seed=0)["train"]
    made = prompts.make_prompts(material, topics, 300, seed=0)

    assert len({prompt.prompt for prompt in made}) == 300
    for prompt in made:
        kinds = [check["kind"] for check in prompt.checks]
        assert len(set(kinds)) == len(kinds)
    assert prompts.make_prompts(material, topics, 200, seed=0) == made[:200]
    with pytest.raises(ValueError, match="prompts from 1 topics"):
        prompts.make_prompts(material, topics[:1], 99, seed=0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("cat | dog", "cat | | dog"), "empty part under `names`"),
        (("cat | dog", "cat | cat | dog"), "stand twice: cat"),
        (("allow: length | words | cheer", "allow: length | rhyme | cheer"), "unknown families of checks.*rhyme"),
    ],
)
def test_broken_material_is_refused_by_name(tools, tmp_path, change, complaint):
    prompts, _ = tools
    text = prompts.MATERIAL.read_text()
    assert change[0] in text
    (tmp_path / "material.yaml").write_text(text.replace(*change))

    with pytest.raises(ValueError, match=complaint):
        prompts.load_material(tmp_path / "material.yaml")


def _answers(tools, texts):
    """A prompt that wants at most three words and no comma, and finished samples."""
    prompts, script = tools
    checks = [{"kind": "max_words", "value": 3}, {"kind": "no_comma"}]
    prompt = prompts.PreferencePrompt("a-b", "a", "Say it.", checks)
    return prompt, [script.Sample(text, text, len(text.split()) + 1, True) for text in texts]


def test_pairs_are_finished_answers_with_different_scores_the_largest_difference_first(tools):
    _, script = tools
    prompt, samples = _answers(tools, ["one two", "one, two", "one, two, three, four", "...", "two one"])
    samples.append(script.Sample("cut", "cut", 48, False))

    pairs = script.possible_pairs(prompt, samples)
    assert [(pair.chosen.text, pair.rejected.text) for pair in pairs][:2] == [
        ("one two", "one, two, three, four"),
        ("two one", "one, two, three, four"),
    ]
    assert len(pairs) == 5 and [pair.gap for pair in pairs] == sorted((pair.gap for pair in pairs), reverse=True)


def test_chosen_answers_are_longer_and_shorter_equally_often(tools):
    prompts, script = tools
    checks, made, answers = [{"kind": "no_comma"}], [], {}
    for number in range(60):
        made.append(prompts.PreferencePrompt(f"p{number}", "t", f"Say {number}.", checks))
        texts = ["a b", "a, b c d"] if number % 3 else ["a b", "a, b c d", "a b c d e f"]
        answers[f"p{number}"] = [script.Sample(text, text, len(text), True) for text in texts]

    pairs = script.choose_pairs(made, answers, 36, seed=0, name="train")
    assert len({pair.prompt.id for pair in pairs}) == 36
    assert abs(sum(pair.longer for pair in pairs)) <= 1
    assert script.choose_pairs(made, answers, 36, seed=0, name="train") == pairs
    with pytest.raises(ValueError, match="60 prompts have answers that differ, of 60, but 61 pairs"):
        script.choose_pairs(made, answers, 61, seed=0, name="train")


def test_a_sampler_that_was_killed_goes_on_with_the_same_answers(tools, tmp_path, monkeypatch):
    prompts, script = tools
    tokenizer = sentencepiece_tokenizer()
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(script, "MODEL", str(tiny_model_folder(tmp_path / "model", tokenizer=tokenizer)))
    made = [prompts.PreferencePrompt(f"p{n}", "t", f"Say {n}.", [{"kind": "no_comma"}]) for n in range(5)]
    options = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "batch_size": 4, "seed": 0}

    def sampled(name):
        return script.Sampler(Namespace(**options, samples=tmp_path / name))(made, range(2))

    whole = sampled("whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 10 and len({sample.text for own in whole for sample in own}) > 3
    (tmp_path / "killed.jsonl").write_text("".join(lines[:6]) + lines[6][:9])
    assert sampled("killed.jsonl") == whole
    loaded = []
    monkeypatch.setattr(script.Sampler, "_sample", lambda self, batch: loaded.append(batch))
    assert sampled("whole.jsonl") == whole and not loaded


def test_a_file_that_holds_no_samples_is_refused(tools, tmp_path):
    _, script = tools
    (tmp_path / "samples.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(ValueError, match="not a file of samples"):
        script.read_samples(tmp_path / "samples.jsonl")


def test_the_pairs_are_read_by_the_data_module_without_loss(rows):
    from lit_llm.data.preference_rows import read_pair
    from lit_llm.data.rows import load_rows

    for part, size in PARTS.items():
        read = load_rows(f"demo-preferences:{part}", {}, ("chosen", "rejected"))
        assert len(read) == size
        place = random.Random(part).randrange(size)
        assert read_pair(read[place]).chosen == rows[part][place]["chosen"]
        assert reward(read[place]["chosen"], read[place]["checks"]) == pytest.approx(
            rows[part][place]["score_chosen"], abs=1e-4
        )
