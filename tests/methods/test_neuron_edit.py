"""Editing runs, as a user starts them: what should move and what should not, resume, undo, what a run leaves."""

from __future__ import annotations

import csv
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from lit_llm.data.fact_tokens import FactText, encode_facts
from lit_llm.editing.deltas import EditSet
from lit_llm.methods.edited_model import EDITS_FILE, EditedModel
from lit_llm.models.language_model import ModelSpec
from lit_llm.models.weights import model_hash
from tests.tiny_edits import edit_config
from tests.tiny_runs import fit, write_rows


def edits_of(run) -> EditSet:
    return EditSet.load(run.model.run_folder / EDITS_FILE)


def assert_same_edits(ours: EditSet, theirs: EditSet) -> None:
    (told, tensors), (their_told, their_tensors) = ours.state(), theirs.state()
    assert json.loads(told)["base"] == json.loads(their_told)["base"]
    assert tensors.keys() == their_tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(value, their_tensors[name]), name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, fit(edit_config(folder, crossed=["reliability"]))


def test_every_fact_is_edited_and_the_model_is_not(run):
    folder, cli = run
    assert [edit.fact.id for edit in edits_of(cli)] and len(edits_of(cli)) == 8
    before = load_file(folder / "model" / "model.safetensors")
    after = cli.model.student.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(not p.requires_grad and p.grad is None for p in cli.model.student.parameters())
    for edit in edits_of(cli).cached:
        assert edit.layers == [1, 2]
        assert all(values.abs().sum() > 0 for values in edit.values.values())


def test_editing_makes_new_answers_likelier(run):
    _, cli = run
    folder = cli.model.run_folder
    header, *rows = (folder / "metrics.csv").read_text().splitlines()
    place = header.split(",").index("val/loss")
    losses = [float(row.split(",")[place]) for row in rows if row.split(",")[place]]
    assert len(losses) == 2 and losses[-1] < losses[0] - 0.5


def test_a_run_leaves_its_edits_its_matrix_and_its_answers_but_no_model(run):
    _, cli = run
    folder = cli.model.run_folder
    assert not (folder / "model").exists()
    *_, line = [json.loads(text) for text in (folder / "edits.jsonl").read_text().splitlines()]
    assert line["facts"] == 8 and line["seconds_per_fact"] > 0
    assert set(line["matrices"]["reliability"]) == {"generated", "exact"}
    for protocol, matrix in line["matrices"]["reliability"].items():
        assert matrix["rows"] == ["en", "de", "all"] and all(None not in row for row in matrix["values"])
        scores = [line["scores"]["reliability"][language][protocol] for language in ("en", "de")]
        assert matrix["values"][-1] == pytest.approx(scores)
    assert set(line["scores"]) == {"reliability", "generality", "locality", "portability"}
    assert {answer["kind"] for answer in line["answers"]} == set(line["scores"])
    assert set(line["overlap"]["layers"]) == {"1", "2"}
    page = (folder / "report.html").read_text()
    for words in (
        "Reliability by language, written freely",
        "Reliability by language, teacher-forced",
        "Neurons that two languages select, layer 1",
        "answers before and after",
    ):
        assert words in page
    assert "seconds per fact" in page


def test_checkpoints_hold_edits_and_nothing_of_the_model(run):
    _, cli = run
    checkpoint = torch.load(cli.model.run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {"written"}
    assert set(checkpoint["lit_llm"]["edits"]) == {"all", "en", "de"}


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_edits(tmp_path, run, step):
    config = edit_config(tmp_path, crossed=["reliability"])
    with pytest.raises(RuntimeError, match="died on purpose"):
        fit(config, "--trainer.callbacks+=tests.tiny_runs.DieAt", f"--trainer.callbacks.step={step}")
    resumed = fit(config, "--ckpt_path", "last")
    assert_same_edits(edits_of(resumed), edits_of(run[1]))
    for language in ("en", "de"):
        assert_same_edits(resumed.model.alone[language], run[1].model.alone[language])


def test_validate_and_test_of_a_checkpoint_give_what_the_run_gave(run):
    folder, cli = run
    config = str(folder / "neuronedit.yaml")
    for command, stage in (("validate", "val"), ("test", "test")):
        from lit_llm.training_cli import TrainingCLI

        again = TrainingCLI.run([command, "--config", config, "--ckpt_path", "last"])
        metrics = again.trainer.callback_metrics
        assert metrics[f"{stage}/loss"].item() == pytest.approx(
            cli.trainer.callback_metrics["val/loss"].item(), abs=1e-4
        )
        for kind in ("reliability", "locality"):
            assert metrics[f"{stage}/{kind}_tokens"] == pytest.approx(
                cli.trainer.callback_metrics[f"val/{kind}_tokens"]
            )


def test_undoing_one_or_all_edits_brings_back_logits_bit_for_bit(run):
    folder, cli = run
    model = ModelSpec(source=str(folder / "model")).load().eval()
    ids = model.tokenizer("So Oslo is in", return_tensors="pt")["input_ids"]

    def logits(edited, edits) -> torch.Tensor:
        with torch.no_grad(), edited.under(edits):
            return edited.model.transformer(input_ids=ids).logits

    untouched = model.transformer(input_ids=ids).logits.detach()
    edited, edits = EditedModel(model), edits_of(cli)
    assert not torch.equal(logits(edited, edits), untouched)
    edits.remove("town-0")
    assert torch.equal(logits(edited, edits), untouched)
    edits.remove()
    assert len(edits) == 0 and torch.equal(logits(edited, edits), untouched)


def test_random_neurons_and_a_single_language_are_controls(tmp_path, run):
    drawn = fit(edit_config(tmp_path / "random", neurons="random"))
    ours = {edit.fact.id: edit for edit in edits_of(run[1]).cached}
    for edit in edits_of(drawn).cached:
        other = ours[edit.fact.id]
        assert [len(edit.neurons[layer]) for layer in (1, 2)] == [len(other.neurons[layer]) for layer in (1, 2)]
    assert drawn.model.words == "random neurons"
    single = fit(edit_config(tmp_path / "single", edited_in=["de"], trigger={"scope": "subject"}, data={"limit": 4}))
    assert all(list(edit.fact.targets) == ["de"] for edit in edits_of(single))
    assert {"val/reliability_en", "val/reliability_de"} <= single.trainer.callback_metrics.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"edited_in": ["fr"]}, "edited_in names fr"),
        ({"edited_in": ["de"], "crossed": ["reliability"]}, "Keep one"),
        ({"layers": [2, 1]}, "must ascend"),
        ({"generation": {"temperatures": [1.0]}}, "compared greedily"),
        ({"locating": {"contrast": True, "votes": 2}}, "locating.votes"),
        ({"student": {"source": "model", "lora": {"rank": 2}}}, "student.lora is set"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, message, capsys):
    data = {"languages": ["en", "de"]}
    with pytest.raises((ValueError, SystemExit)) as stop:
        fit(edit_config(tmp_path, **{"data": data, **settings}))
    assert message in str(stop.value) + capsys.readouterr().err


def test_a_fact_that_the_model_says_already_is_skipped_and_counted(tmp_path):
    config = edit_config(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "facts.jsonl").read_text().splitlines()]
    model = ModelSpec(source=str(tmp_path / "model")).load().eval()
    said = {
        (row["id"], code): said_after(model, entry["prompt"]) for row in rows for code, entry in row["by_lang"].items()
    }
    for row in rows:
        for code, entry in row["by_lang"].items():
            entry["target_new"] = said[row["id"], code] or entry["target_new"]
    everywhere = [row["id"] for row in rows if said[row["id"], "en"] and said[row["id"], "de"]]
    anywhere = [name for (name, _), text in said.items() if text]
    assert everywhere and set(anywhere) > set(everywhere), "the model should know some facts in one language alone"
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.write_text(config.read_text().replace("batch_size: 2", "batch_size: 2\n    target_separator: none"))
    cli = fit(config, "--data.seed=0")
    assert {edit.fact.id for edit in edits_of(cli)} == {row["id"] for row in rows} - set(everywhere)
    assert cli.trainer.callback_metrics["train/already_known"] == len(everywhere)
    *_, line = [json.loads(text) for text in (cli.model.run_folder / "edits.jsonl").read_text().splitlines()]
    assert set(line["already_known"]) == set(everywhere) and line["facts"] == 8 - len(everywhere)
    assert "since the model says so already" in (cli.model.run_folder / "report.html").read_text()
    checkpoint = torch.load(cli.model.run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["lit_llm"]["already_known"] == line["already_known"]


def said_after(model, prompt: str) -> str | None:
    """A text that the model writes, tokenised as it was written; None where there is none."""
    ids = encode_facts(model.tokenizer, [FactText("en", prompt)])[0].prompt_ids
    (new,) = model.generate([list(ids)], max_new_tokens=8)
    texts = [model.tokenizer.decode(new[:length]) for length in range(1, len(new) + 1)]
    for length, text in enumerate(texts, 1):
        (row,) = encode_facts(model.tokenizer, [FactText("en", prompt, text)], "none")
        if list(row.ids) == [*ids, *new[:length]] and text.strip():
            return text
    return None


def test_other_data_and_more_epochs_are_refused(tmp_path):
    config = edit_config(tmp_path)
    with pytest.raises(ValueError, match="a fact is edited once"):
        fit(config, "--trainer.max_epochs=2")
    with pytest.raises(ValueError, match="learns from facts to edit"):
        rows = write_rows(tmp_path / "rows.jsonl", 4)
        fit(config, "--data=Instructions", f"--data.train={rows}", "--data.template=plain")


def test_a_fact_that_is_edited_already_is_refused_or_replaced_and_edited_twice_where_each_is_alone(tmp_path):
    config = edit_config(tmp_path, data={"batch_size": 1})
    rows = [json.loads(line) for line in (tmp_path / "facts.jsonl").read_text().splitlines()[:2]]
    rows[1] |= {"by_lang": {code: {**entry, "target_new": "the"} for code, entry in rows[0]["by_lang"].items()}}
    for entry in rows[1]["by_lang"].values():
        entry["prompt"] = f"Well, {entry['prompt']}"
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="is edited already"):
        fit(config)
    single = fit(config, "--model.single=true", f"--run.root={tmp_path / 'single'}").model
    assert len(single.edits) == 2 and not (single.run_folder / EDITS_FILE).exists()  # two that contradict each other
    with pytest.raises(ValueError, match="model.replace is true, but with model.single"):
        fit(config, "--model.single=true", "--model.replace=true")
    replaced = edits_of(fit(config, "--model.replace=true"))
    assert len(replaced) == 1 and len(replaced.history) == 1


def test_a_run_warns_once_of_prompts_on_which_edits_will_not_act_and_logs_them(tmp_path):
    config = edit_config(tmp_path, data={"limit": 4})
    text = (tmp_path / "facts.jsonl").read_text()
    (tmp_path / "facts.jsonl").write_text(text.replace('"subject": "Oslo"', '"subject": "Osslo"'))
    with pytest.warns(UserWarning, match="On 2 of 8 prompts .* town-0 in en, 'Oslo is in': its trigger") as caught:
        cli = fit(config)
    assert sum("will not act" in str(warning.message) for warning in caught) == 1
    header, *rows = (cli.model.run_folder / "metrics.csv").read_text().splitlines()
    place = header.split(",").index("train/prompts_unheard")
    assert sum(float(row.split(",")[place] or 0) for row in rows) == 2


def test_a_list_of_facts_that_another_model_knows_is_told(tmp_path):
    config = edit_config(tmp_path, data={"known": str(tmp_path / "known.json"), "known_in": 1, "limit": 2})
    known = {"model_hash": "0", "known": {"town-0": ["en"], "town-1": ["de"]}}
    (tmp_path / "known.json").write_text(json.dumps({"model": "somebody/else", **known}))
    with pytest.warns(match=r"lists what somebody/else knows, but .*model is edited"):
        fit(config)
    loaded = ModelSpec(source=str(tmp_path / "model")).load()
    for own in ({"model": str(tmp_path / "model")}, {"model": "the same elsewhere", "model_hash": model_hash(loaded)}):
        (tmp_path / "known.json").write_text(json.dumps({**known, **own}))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="data.known")
            fit(config)


def test_what_became_of_each_language_and_why_facts_ended_is_logged(tmp_path):
    with (fit(edit_config(tmp_path, data={"limit": 4})).model.run_folder / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert all(any(line.get(f"train/nll_{code}") for line in lines) for code in ("en", "de"))
    stopped = [
        line for line in lines if any(name.startswith("train/stopped_") for name, value in line.items() if value)
    ]
    assert stopped and all(
        sum(float(value) for name, value in line.items() if name.startswith("train/stopped_") and value) == 1
        for line in stopped
    )


def test_an_oracle_edits_every_question_about_its_fact_and_none_beside(tmp_path):
    """Whether or not it names the subject: what values are worth is told from what the trigger finds."""
    answers = {}
    for scope in ("subject", "oracle"):
        strong = {"steps": 20, "learning_rate": 5.0, "clamp": 500.0, "kl_weight": 0.0}
        settings = {"single": True, "trigger": {"scope": scope}, "optimising": strong}
        config = edit_config(tmp_path / scope, data={"limit": 4}, layers=[1, 2], **settings)
        facts = tmp_path / scope / "facts.jsonl"
        lines = [json.loads(line) for line in facts.read_text().splitlines()]
        for line in lines:
            for entry in line["by_lang"].values():
                entry["rephrase"] = ["The town is in"]  # unnamed
        facts.write_text("\n".join(map(json.dumps, lines)))
        last = fit(config, "--trainer.val_check_interval=2").model.edit_report
        for answer in last["answers"]:
            answers[scope, answer["fact"], answer["language"], answer["kind"]] = answer["before"], answer["after"]
    moved = {
        (scope, kind): any(
            before != after for (s, _, _, k), (before, after) in answers.items() if (s, k) == (scope, kind)
        )
        for scope in ("subject", "oracle")
        for kind in ("reliability", "generality", "locality")
    }
    assert moved["subject", "reliability"] and moved["oracle", "reliability"]
    assert moved["oracle", "generality"] and not moved["subject", "generality"]
    assert not moved["oracle", "locality"]
    same = [
        answers[("subject", *rest)] == answers[("oracle", *rest)]
        for s, *rest in answers
        if s == "oracle" and rest[2] == "reliability"
    ]
    assert same and all(same)


def test_an_oracle_is_refused_where_it_would_have_to_choose(tmp_path):
    with pytest.raises(ValueError, match=r"scope is 'oracle'.*Set model\.single: true"):
        fit(edit_config(tmp_path, trigger={"scope": "oracle"}))
