"""`edit`, `ask` and `undo` as a user calls them, on a tiny model."""

import re
import subprocess
import sys

import pytest
import torch

from lit_llm.cli import main
from lit_llm.editing.closed_form import LowRank
from lit_llm.editing.deltas import EditSet, WeightEdit
from lit_llm.editing.fact_text import FactText
from lit_llm.methods.edited_model import EditedModel
from lit_llm.models.language_model import ModelSpec
from tests.tiny import tiny_model_folder

FACT = {
    "subject": {"en": "Oslo", "de": "Oslo"},
    "prompt": {"en": "Oslo is in", "de": "Oslo liegt in"},
    "target": {"en": "the", "de": "the"},
}
ROME = {"subject": {"en": "Rome", "de": "Rome"}, "prompt": {"en": "Rome is in", "de": "Rome liegt in"}}
QUICK = ["--layers", "[1,2]", "--optimising.steps", "30", "--target_end", "", "--optimising.learning_rate", "0.5"]
QUICK += ["--optimising.clamp", "50", "--optimising.kl_weight", "0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("model"), layers=4, seed=1, initializer_range=0.15)


def call(command: str, model, edits, *options: str) -> None:
    main([command, "--model", str(model), "--edits", str(edits), *options])


def fact(**changes) -> list[str]:
    given = {name: {**by_language, **changes.get(name, {})} for name, by_language in FACT.items()}
    return [
        part
        for name, by_language in given.items()
        for code, text in by_language.items()
        if text is not None
        for part in (f"--{name}.{code}", text)
    ]


@pytest.fixture
def edits(model, tmp_path):
    path = tmp_path / "edits.safetensors"
    call("edit", model, path, *fact(), "--relation", "land", *QUICK)
    return path


def logits(model, kept=()) -> torch.Tensor:
    loaded = ModelSpec(source=str(model)).load().eval()
    edited = EditedModel(loaded)
    ids = loaded.tokenizer("So Oslo is in", return_tensors="pt")["input_ids"]
    with torch.no_grad(), edited.under(kept):
        return loaded.transformer(input_ids=ids).logits


def asked(text: str) -> dict[str, str]:
    """What `ask` prints of one question, by name; a random model also writes characters that break lines."""
    found = re.search(r"  before: (.*)\n  after:  (.*)\n  edit:   (.*)\n", text, re.DOTALL)
    return dict(zip(("before", "after", "edit"), found.groups(), strict=True))


def test_a_fact_is_edited_in_both_languages_and_asked_side_by_side(model, edits, capsys):
    call("ask", model, edits, "--prompt", '["Oslo is in","Rome is in"]')
    about, unrelated = (asked(text) for text in capsys.readouterr().out.split("Rome is in\n"))
    assert about["after"].startswith("the") and not about["before"].startswith("the") and about["edit"] == "oslo-land"
    assert unrelated["before"] == unrelated["after"] and unrelated["edit"] == "none"


def test_after_undo_logits_are_those_of_before_bit_for_bit(model, edits, capsys):
    untouched, kept = logits(model), EditSet.load(edits)
    assert not torch.equal(logits(model, kept), untouched)
    call("undo", model, edits, "--id", "oslo-land")
    assert len(EditSet.load(edits)) == 0
    assert torch.equal(logits(model, EditSet.load(edits)), untouched)
    assert "Took back oslo-land" in capsys.readouterr().err


def test_undo_takes_back_one_and_leaves_the_other_or_takes_all_or_lists_them(model, edits, capsys):
    call("edit", model, edits, *fact(**ROME), *QUICK, "--id", "second")
    capsys.readouterr()
    call("undo", model, edits)
    assert "oslo-land" in (listed := capsys.readouterr().out) and "Rome liegt in -> the" in listed
    call("undo", model, edits, "--id", "oslo-land")
    assert [edit.fact.id for edit in EditSet.load(edits)] == ["second"]
    call("undo", model, edits, "--all", "true")
    assert len(EditSet.load(edits)) == 0


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"prompt": {"en": "Rome is in"}}, (), "(en).\n  Give --subject in that language as the prompt spells it."),
        (
            {"subject": {"en": "Osslo", "de": "Osslo"}},
            (),
            "'Oslo is in': the longest name there is that of the edit 'oslo",
        ),
        (
            {**ROME, "subject": {"en": "Romme", "de": "Romme"}},
            (),
            "would not act on its own prompt in en, 'Rome is in'",
        ),
        (
            {"subject": {"en": "Rome", "de": "USA"}, "prompt": {"en": "Rome is in", "de": "Die USA"}},
            (),
            "in de, 'Die USA': its trigger looks for 'Rome' and finds none",
        ),
        ({"target": {"de": ""}}, (), "no target in de"),
        ({"target": {"de": None}}, (), "no target in de"),
        ({"prompt": {"fr": "Oslo est en"}}, (), "no target in fr"),
        ({"subject": {"cz": "Oslo"}}, (), "'cz' is not a language code"),
        (
            {"target": {"en": "the dog or so"}},
            ("--max_target_tokens", "1"),
            "Shorten the target, or raise --max_target",
        ),
        ({}, ("--relation", "land"), "is edited already"),
        ({}, ("--relation", "land", "--id", "another"), "is edited already"),
        (
            ROME,
            ("--layers", "[2]"),
            "'rome' is in the layers [2], but those that are there, e.g. 'oslo-land', are in [1, 2]",
        ),
        ({}, ("--layers", "[1,9]", "--relation", "other", "--id", "other"), "must ascend within 0 to 3"),
        ({}, ("--locating.statistic", "mean"), None),
    ],
)
def test_a_bad_request_gives_one_message_and_changes_nothing(model, edits, capsys, changes, options, message):
    before = edits.read_bytes()
    with pytest.raises(SystemExit) as stop:
        call("edit", model, edits, *fact(**changes), *QUICK, *options)
    error = capsys.readouterr().err
    assert stop.value.code in (1, 2)
    if message is not None:
        assert message in error and error.count("lit_llm edit:") == 1 and "Traceback" not in error
    assert edits.read_bytes() == before


def test_an_unsupported_family_is_refused_in_words(tmp_path, capsys):
    model = tiny_model_folder(tmp_path / "model", family="mixtral", num_local_experts=2)
    with pytest.raises(SystemExit):
        call("edit", model, tmp_path / "edits.safetensors", *fact(), *QUICK)
    assert "mixture of experts" in capsys.readouterr().err
    assert not (tmp_path / "edits.safetensors").exists()


def test_edits_of_another_model_are_refused(edits, tmp_path, capsys):
    other = tiny_model_folder(tmp_path / "other", layers=4, seed=2, initializer_range=0.15)
    for command, options in {"ask": ["--prompt", '["Oslo is in"]'], "undo": ["--all", "true"], "edit": fact()}.items():
        with pytest.raises(SystemExit):
            call(command, other, edits, *options)
        assert "Load the model that was edited" in capsys.readouterr().err


def test_edits_of_the_same_model_in_another_precision_say_which(model, edits, capsys):
    for command, options in {"ask": ["--prompt", '["Oslo is in"]'], "edit": fact(**ROME)}.items():
        with pytest.raises(SystemExit):
            call(command, model, edits, *options, "--dtype", "bfloat16")
        error = capsys.readouterr().err
        assert (
            "were made in float32, but this model is loaded in bfloat16" in error and "Give --dtype float32." in error
        )


def test_the_commands_own_options_are_what_messages_name(model, tmp_path, capsys):
    long = {"target": {"en": "the dog or so"}}
    for changes, options in ((long, ["--max_target_tokens", "1"]), ({"prompt": {"en": "Rome is in"}}, [])):
        with pytest.raises(SystemExit):
            call("edit", model, tmp_path / "edits.safetensors", *fact(**changes), *options)
        assert "data." not in capsys.readouterr().err


def test_an_edit_is_replaced_where_that_is_asked_for(model, edits, capsys):
    call("edit", model, edits, *fact(target={"en": "and"}), "--relation", "land", "--replace", "true", *QUICK)
    said = capsys.readouterr().out
    assert said.count("before:") == said.count("after:") == 2
    kept = EditSet.load(edits)
    assert len(kept) == 1 and next(iter(kept)).fact.targets["en"] == "and"
    assert [edit.fact.targets["en"] for edit in kept.history] == ["the"]


@pytest.mark.parametrize("command", ["edit", "ask", "undo"])
def test_wrong_ids_and_files_are_named(model, edits, tmp_path, capsys, command):
    options = {"ask": ["--prompt", '["Oslo"]'], "undo": ["--id", "nothing"], "edit": []}[command]
    with pytest.raises(SystemExit):
        call(command, model, edits if command != "ask" else tmp_path / "none", *options)
    assert {"ask": "no file of edits", "undo": "no edit 'nothing'", "edit": "Not given: --subject, --prompt, --target"}[
        command
    ] in capsys.readouterr().err


def test_help_names_the_commands_without_loading_anything_heavy():
    code = "import sys; sys.argv=['x','--help']\nfrom lit_llm.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'lightning'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {command} " in done.stdout for command in ("edit", "ask", "undo", "bake"))


def test_cached_values_are_tried_on_another_base_only_where_it_is_asked_for(model, edits, tmp_path, capsys):
    other = tiny_model_folder(tmp_path / "other", layers=4, seed=2, initializer_range=0.15)
    with pytest.raises(SystemExit):
        call("ask", other, edits, "--prompt", "Oslo is in")
    assert "ask --force true" in capsys.readouterr().err
    call("ask", other, edits, "--prompt", "Oslo is in", "--force", "true")
    said = capsys.readouterr()
    assert "Forced onto them" in said.err and asked(said.out)["edit"] == "oslo-land"


def test_a_fuzzy_edit_acts_on_inflected_names_also_when_it_is_read_again(model, tmp_path, capsys):
    path = tmp_path / "edits.safetensors"
    inflected = fact(
        subject={"en": "Moskva", "de": None}, prompt={"en": "Moskve is in", "de": None}, target={"de": None}
    )
    with pytest.raises(SystemExit):
        call("edit", model, path, *inflected, *QUICK)
    assert "its trigger looks for 'Moskva' and finds none" in capsys.readouterr().err
    call("edit", model, path, *inflected, *QUICK, "--trigger.fuzzy", "true")
    capsys.readouterr()
    for prompt, name in (("Moskvu is in", "moskva"), ("Moskau is in", "none")):
        call("ask", model, path, "--prompt", prompt)
        assert asked(capsys.readouterr().out)["edit"] == name


def test_an_edit_is_computed_over_the_changes_of_weights_that_are_there(model, edits, tmp_path):
    """`ask` applies both, so values found over the base alone would answer another model."""
    (alone,) = EditSet.load(edits).cached
    path = tmp_path / "both.safetensors"
    text = FactText("rome", {"en": "Rome"}, {"en": "Rome is in"}, {"en": "the"}, "land")
    body = EditedModel(ModelSpec(source=str(model)).load().eval()).body
    change = LowRank(torch.ones(body.hidden_size, 1), torch.full((body.width, 1), 0.1))
    EditSet(EditSet.load(edits).base, [WeightEdit(text, "ROME", {1: change})]).save(path)
    call("edit", model, path, *fact(), "--relation", "land", *QUICK)
    (over,) = EditSet.load(path).cached
    assert any(not torch.equal(over.values[layer], alone.values[layer]) for layer in alone.layers)
