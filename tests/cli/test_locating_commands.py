"""`layers` and `covariance` as a user calls them, on a tiny model."""

import json
import re

import pytest

from lit_llm.cli import main
from lit_llm.storage import cache_folder
from tests.tiny import tiny_model_folder
from tests.tiny_edits import edit_config, write_facts
from tests.tiny_runs import fit

LANGUAGES = ["--languages", '["en", "de"]']


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("model"), layers=4, seed=1, initializer_range=0.15)


@pytest.fixture
def facts(tmp_path):
    return write_facts(tmp_path / "facts.jsonl")


def rows(text: str) -> list[list[float]]:
    return [[float(value) for value in line.split()] for line in text.splitlines()[1:]]


def test_layers_tells_how_many_neurons_languages_share_in_every_layer(model, facts, capsys):
    main(["layers", "--model", str(model), "--source", str(facts), *LANGUAGES])
    told = capsys.readouterr()
    table = rows(told.out)
    assert [row[0] for row in table] == [0, 1, 2, 3]
    for _, one, same, other, chance, excess in table:
        assert 0 < chance < one and same <= one and other <= one
        assert excess == pytest.approx(same - other, abs=0.11)
    best = max(table, key=lambda row: row[-1])[0]
    assert re.search(rf"largest in layers \[.*{best:.0f}.*\]", told.err)


def test_languages_that_select_all_neurons_share_all_of_them(model, facts, capsys):
    main(["layers", "--model", str(model), "--source", str(facts), *LANGUAGES, "--locating.top_ratio", "1"])
    for _, one, same, other, chance, excess in rows(capsys.readouterr().out):
        assert one == same == other == chance and excess == 0


def test_contrast_compares_all_facts_with_each_other(model, facts, capsys):
    main(["layers", "--model", str(model), "--source", str(facts), *LANGUAGES, "--locating.contrast", "true"])
    assert len(rows(capsys.readouterr().out)) == 4


def test_attributions_are_compared_too(model, facts, capsys):
    options = ["--locating.statistic", "integrated_gradients", "--limit", "2"]
    main(["layers", "--model", str(model), "--source", str(facts), *LANGUAGES, *options])
    assert len(rows(capsys.readouterr().out)) == 4


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("locating.max_neurons", "64"),
        ("locating.combination", "vote"),
        ("known_in", "1"),
        ("limit", "0"),
        ("limit", "-1"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(model, facts, capsys, option, value):
    with pytest.raises(SystemExit):
        main(["layers", "--model", str(model), "--source", str(facts), *LANGUAGES, f"--{option}", value])
    assert re.search(rf"{option.split('.')[-1]} is {value}", capsys.readouterr().err)


def test_one_language_shares_with_none(model, facts, capsys):
    with pytest.raises(SystemExit):
        main(["layers", "--model", str(model), "--source", str(facts), "--languages", '["en"]'])
    assert "takes at least two" in capsys.readouterr().err


def test_covariance_tells_its_error_and_is_kept_for_runs(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LIT_LLM_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The river number {i} flows to the sea, and {i + 1} boats go up." for i in range(200)))
    call = ["covariance", "--model", str(model), "--layers", "[1, 3]", "--text.sources", f'{{"en": "{text}"}}']
    said = []
    for _ in range(2):
        main([*call, "--text.tokens", "2000"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert re.findall(r"layer (\d): estimated relative error \d+\.\d%", said[0]) == ["1", "3"]
    (kept,) = (cache_folder() / "covariance").glob("*.safetensors")
    before = kept.stat().st_mtime_ns
    main([*call, "--text.tokens", "2000"])
    assert kept.stat().st_mtime_ns == before


def test_a_run_finds_what_covariance_has_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LIT_LLM_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The river number {i} flows to the sea, and {i + 1} boats go up." for i in range(200)))
    sources, kept = {"en": str(text)}, cache_folder() / "covariance"
    config = edit_config(tmp_path, "MEMIT", text={"sources": sources, "tokens": 2000}, layers=[1])
    call = ["covariance", "--model", str(tmp_path / "model"), "--layers", "[1]", "--text.sources", json.dumps(sources)]
    main([*call, "--text.tokens", "2000"])
    before = {file.name: file.stat().st_mtime_ns for file in kept.iterdir()}
    fit(config)
    assert {file.name: file.stat().st_mtime_ns for file in kept.iterdir()} == before and len(before) == 1


def test_covariance_says_when_there_are_fewer_tokens_than_neurons(model, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("A few words.")
    main(["covariance", "--model", str(model), "--layers", "[1]", "--text.sources", f'{{"en": "{tmp_path}/text.txt"}}'])
    assert "need more tokens than neurons" in capsys.readouterr().err


def test_layers_that_the_model_lacks_are_refused(model, capsys):
    with pytest.raises(SystemExit):
        main(["covariance", "--model", str(model), "--layers", "[9]"])
    assert "9" in capsys.readouterr().err
