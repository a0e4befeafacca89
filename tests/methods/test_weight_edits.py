"""The baselines that change weights: they run like every method, leave a model, and are undone bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_llm.editing.deltas import EditSet
from lit_llm.editing.edit_cache import CachedEdit
from lit_llm.methods.edited_facts import edited_facts
from lit_llm.methods.edited_model import EDITS_FILE
from lit_llm.training_cli import TrainingCLI
from tests.methods.test_neuron_edit import assert_same_edits, edits_of
from tests.tiny_edits import edit_config
from tests.tiny_languages import write_corpora
from tests.tiny_runs import fit

VALUES = {"evaluations": 6}
SETTINGS = {
    "FineTunedEdit": {"layer": 1, "fine_tuning": {"epochs": 4, "learning_rate": 0.01}},
    "ROME": {"layer": 1, "values": VALUES, "contexts": 2},
    "MEMIT": {"layers": [0, 1], "values": VALUES, "contexts": 2, "covariance_weight": 1.0},
    "AlphaEdit": {"layers": [0, 1], "values": VALUES, "contexts": 2, "threshold": None, "fraction": 0.5, "ridge": 0.1},
}


def config_of(folder, method: str, **more):
    settings = dict(SETTINGS.get(method, {}))
    if method in ("MEMIT", "AlphaEdit"):
        sources = {code: path for code, path in write_corpora(folder / "text").items() if code != "tr"}
        settings["text"] = {"sources": sources, "tokens": 1000}
    return edit_config(folder, method, **settings, **more)


@pytest.mark.parametrize("method", SETTINGS)
def test_weights_are_edited_where_it_is_said_and_nowhere_else(tmp_path, method):
    cli = fit(config_of(tmp_path, method, data={"limit": 4}))
    base = load_file(tmp_path / "model" / "model.safetensors")
    live = cli.model.student.model.state_dict()
    assert all(torch.equal(live[name], value) for name, value in base.items())  # edits act in blocks of `under` alone
    exported = AutoModelForCausalLM.from_pretrained(cli.model.run_folder / "model").state_dict()
    layers = {"FineTunedEdit": [1], "ROME": [1]}.get(method, [0, 1])
    moved = {name for name, value in base.items() if not torch.equal(exported[name], value)}
    assert moved == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in layers}

    edits = edits_of(cli)
    assert len(edits) == 4 and all(edit.method == method for edit in edits.of_weights)
    with cli.model.model.under(edits):
        now = cli.model.student.model.state_dict()
        assert all(torch.equal(now[name], exported[name]) for name in moved)
    edits.remove()
    with cli.model.model.under(edits):
        assert all(torch.equal(live[name], value) for name, value in base.items())


@pytest.mark.parametrize("method", SETTINGS)
def test_new_answers_become_likelier_and_the_matrix_is_filled(tmp_path, method):
    cli = fit(config_of(tmp_path, method, crossed=["reliability"], data={"limit": 4}), "--trainer.val_check_interval=2")
    lines = [json.loads(line) for line in (cli.model.run_folder / "edits.jsonl").read_text().splitlines()]
    values = lines[-1]["matrices"]["reliability"]["exact"]["values"]
    assert len(values) == 3 and all(value is not None for row in values for value in row)
    page = (cli.model.run_folder / "report.html").read_text()
    assert ("second moments of neurons over 1,000 tokens" in page) == (method in ("MEMIT", "AlphaEdit"))
    losses = validation_losses(cli.model)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", SETTINGS)
def test_a_run_that_was_stopped_goes_on_to_the_same_edits(tmp_path, method):
    unbroken = fit(config_of(tmp_path / "unbroken", method, data={"limit": 6}))
    config = config_of(tmp_path / "broken", method, data={"limit": 6})
    with pytest.raises(RuntimeError, match="died on purpose"):
        fit(config, "--trainer.callbacks+=tests.tiny_runs.DieAt", "--trainer.callbacks.step=2")
    resumed = fit(config, "--ckpt_path", "last")
    assert_same_edits(edits_of(resumed), edits_of(unbroken))


def test_a_run_that_is_resumed_and_stopped_at_once_still_knows_what_it_has_protected(tmp_path):
    method = fit(config_of(tmp_path, "AlphaEdit", data={"limit": 4})).model
    saved, again = {"lit_llm": {}}, {"lit_llm": {}}
    method.on_save_checkpoint(saved)
    keys = saved["lit_llm"]["earlier_keys"]["all"]
    method._sequels = {}  # a new process has made none yet
    method.on_load_checkpoint(saved)
    method.on_save_checkpoint(again)
    assert keys and all(torch.equal(again["lit_llm"]["earlier_keys"]["all"][layer], keys[layer]) for layer in keys)


def test_an_edit_that_takes_the_place_of_another_is_computed_without_it(tmp_path):
    """Over the first change there would be nothing left to do, and that change goes."""
    config = config_of(tmp_path, "MEMIT", replace=True, data={"limit": 1})
    method = fit(config).model
    (first,) = method.edits
    batch = next(iter(method.trainer.datamodule.train_dataloader()))
    method._write(method.edits, edited_facts(batch), "all")
    (second,) = method.edits
    assert second is not first
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(tensors(second), tensors(first), strict=True))


@pytest.mark.parametrize("method", [*SETTINGS, "NeuronEdit"])
def test_a_single_edit_is_the_one_of_a_run_of_that_fact_and_is_scored_like_it(tmp_path, method):
    """Facts that were each edited alone say what runs of one fact say; together they say something else."""
    one = config_of(tmp_path / "one", method, data={"limit": 1})
    alone = fit(one).model
    config = config_of(tmp_path / "many", method, single=True, crossed=["reliability"], data={"limit": 4})
    many = fit(config).model
    (edit,) = alone.edits
    (same,) = [other for other in many.edits if other.fact.id == edit.fact.id]
    assert all(
        torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(tensors(same), tensors(edit), strict=True)
    )
    answers = {(a["kind"], a["language"]): a["after"] for a in last_line(alone)["answers"]}
    ours = {(a["kind"], a["language"]): a["after"] for a in last_line(many)["answers"] if a["fact"] == edit.fact.id}
    assert answers == ours
    assert last_line(many)["single"] and not last_line(alone)["single"]
    assert (many.run_folder / EDITS_FILE).exists() == (method == "NeuronEdit")
    assert not (many.run_folder / "model").exists()


def test_answers_of_single_edits_are_no_answers_of_a_model(tmp_path, capfd):
    config = config_of(tmp_path, "ROME", single=True, data={"limit": 2})
    fit(config)
    with pytest.raises(ValueError, match="model.single is true"):
        TrainingCLI.run(["predict", "--config", str(config), "--ckpt_path", "last"])


@pytest.mark.parametrize("method", [*SETTINGS, "NeuronEdit"])
def test_a_model_in_half_precision_is_edited_too(tmp_path, method):
    options = ("--trainer.precision=bf16-true", "--trainer.val_check_interval=2")
    model = fit(config_of(tmp_path, method, data={"limit": 4}), *options).model
    for edit in model.edits:
        assert all(
            tensor.dtype == torch.float32 and tensor.isfinite().all() and tensor.any() for tensor in tensors(edit)
        )
    before, after = validation_losses(model)
    assert after < before


def test_mixed_precision_is_refused_where_no_weight_is_trained(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.precision is bf16-mixed.*bf16-true"):
        fit(config_of(tmp_path, "ROME"), "--trainer.precision=bf16-mixed")


def test_several_layers_are_refused_where_a_norm_follows_the_mlp(tmp_path):
    config = config_of(tmp_path, "MEMIT")
    with pytest.raises(ValueError, match="has a norm after its MLP"):
        fit(edit_config(tmp_path, "MEMIT", family="gemma3_text", layers=[0, 1], **_text_of(config)))


def test_the_file_of_edits_names_its_base(tmp_path):
    cli = fit(config_of(tmp_path, "ROME", data={"limit": 2}))
    file = cli.model.run_folder / EDITS_FILE
    assert EditSet.load(file, base=cli.model.model.digest).of_weights
    with pytest.raises(ValueError, match="Load the model that was edited"):
        EditSet.load(file, base="another")


def tensors(edit) -> list[torch.Tensor]:
    if isinstance(edit, CachedEdit):
        return list(edit.values.values())
    return [tensor for change in edit.changes.values() for tensor in change if tensor is not None]


def validation_losses(method) -> list[float]:
    header, *rows = (method.run_folder / "metrics.csv").read_text().splitlines()
    return [float(x) for row in rows if (x := row.split(",")[header.split(",").index("val/loss")])]


def last_line(method) -> dict:
    return json.loads((method.run_folder / "edits.jsonl").read_text().splitlines()[-1])


def _text_of(config) -> dict:
    import yaml

    return {"text": yaml.safe_load(config.read_text())["model"]["init_args"]["text"]}
