"""`bake` as a user calls it: a folder that plain transformers loads says what the file of edits said."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_llm.cli import main
from lit_llm.editing.closed_form import LowRank
from lit_llm.editing.deltas import EditSet, WeightEdit
from lit_llm.editing.fact_text import FactText
from tests.cli.test_edit_commands import QUICK, fact
from tests.tiny import tiny_model_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, its edits, and text."""
    folder = tmp_path_factory.mktemp("bake")
    model = tiny_model_folder(folder / "model", layers=4, seed=1, initializer_range=0.15)
    steps = ["--optimising.steps", "60", "--id", "oslo"]
    main(["edit", "--model", str(model), "--edits", str(folder / "e.safetensors"), *fact(), *QUICK, *steps])
    lines = [
        f"{a} and {b} went to the {c} of 1{n}" for n, (a, b, c) in enumerate(zip(*[iter(WORDS)] * 3, strict=False))
    ]
    (folder / "text.txt").write_text("\n\n".join(lines * 6))
    return model, folder / "e.safetensors", folder / "text.txt"


WORDS = (
    "river town sea dog cat sun moon rain snow wind tree leaf stone hill road house door wall roof fire " * 3
).split()


def bake(made, to, *options: str) -> None:
    model, edits, text = made
    given = ["--model", str(model), "--edits", str(edits), "--to", str(to), "--covariance_weight", "0.001"]
    main(["bake", *given, "--text", f'{{"sources": {{"en": "{text}"}}, "tokens": 4000}}', *options])


def answer(folder, prompt: str) -> str:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return tokenizer.decode(model(ids).logits[0, -1].argmax())


def test_a_baked_folder_says_the_new_answers_without_the_file_and_tells_how_likely_they_are(made, tmp_path, capsys):
    before = made[1].read_bytes()
    bake(made, tmp_path / "baked")
    said = capsys.readouterr()
    for prompt in ("Oslo is in", "Oslo liegt in"):
        assert answer(tmp_path / "baked", prompt) != answer(made[0], prompt)
    losses = re.findall(
        r"(..): loss of the new answer (\S+) before, (\S+) with the file, (\S+) in the weights", said.out
    )
    assert [code for code, *_ in losses] == ["en", "de"]
    for _, *numbers in losses:
        untouched, cached, baked = map(float, numbers)
        assert cached < untouched - 1 and baked < untouched - 1
    assert "Of 2 new answers" in said.err and "the likeliest token is the same for" in said.err
    assert made[1].read_bytes() == before


def test_changes_of_weights_in_the_file_are_written_too(made, tmp_path, capsys):
    model, edits, text = made
    kept = EditSet.load(edits)
    left, right = torch.ones(32, 1), torch.full((64, 1), 0.01)
    rome = FactText("rome", {"en": "Rome"}, {"en": "Rome is in"}, {"en": "the"}, "land")
    kept.add(WeightEdit(rome, "ROME", {3: LowRank(left, right)}))
    kept.save(tmp_path / "both.safetensors")
    bake((model, tmp_path / "both.safetensors", text), tmp_path / "baked")
    name = "model.layers.3.mlp.down_proj.weight"
    one, other = (
        AutoModelForCausalLM.from_pretrained(place).state_dict()[name] for place in (model, tmp_path / "baked")
    )
    torch.testing.assert_close(other - one, left @ right.T)
    assert "rome\n  en: loss" in capsys.readouterr().out


def test_what_cannot_be_baked_is_refused_and_nothing_is_written(made, tmp_path, capsys):
    def refused(*options: str, edits=made[1], to="baked") -> str:
        with pytest.raises(SystemExit):
            bake((made[0], edits, made[2]), tmp_path / to, *options)
        return capsys.readouterr().err

    (tmp_path / "there").mkdir()
    assert "there exists. Choose another folder" in refused(to="there")
    assert "Give more with --text.sources, or raise --text.tokens" in refused(
        "--text.tokens", "40", "--text.passage", "3"
    )
    assert "every tenth one is kept apart" in refused("--text.tokens", "40")
    EditSet(EditSet.load(made[1]).base).save(tmp_path / "none.safetensors")
    assert "holds no edits" in refused(edits=tmp_path / "none.safetensors")
    assert not (tmp_path / "baked").exists()
