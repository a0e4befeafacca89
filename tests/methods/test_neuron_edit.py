"""Editing runs, as a user starts them: what should move and what should not, resume, undo, what a run leaves."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lit_llm.editing.deltas import EditSet
from lit_llm.methods.edited_model import EDITS_FILE, EditedModel
from lit_llm.models.language_model import ModelSpec
from tests.tiny_edits import edit_config
from tests.tiny_runs import fit


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
