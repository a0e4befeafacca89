"""Golden vectors of the neuron editor: whatever the index lists is compared, by kind.

The closed-form and fine-tuning baselines come from the implementations in EasyEdit, run in float64; the neuron editor's own
values from the rules of its design. GPT-2 keeps its down projection transposed, Llama does not.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden import editing_metric_cases, neuron_edit_cases
from tests.golden.golden import family_folder
from tests.golden.neuron_edit_cases import INPUTS, Case
from tests.processes import Finished, run_python

FOLDER = family_folder("neuron_edit")
INDEX = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))
CASES = {f"{entry['model']}__{entry['case']}": entry for entry in INDEX["cases"]}
SHIPPED = Path(__file__).parent / "neuron_edit"
OURS = json.loads((SHIPPED / "index.json").read_text(encoding="utf-8"))
# subject_location is compared in test_subject_location.py
ELSEWHERE = {"title", "format", "conventions", "models", "cases", "subject_location"}


def check(entry: dict, index: dict, folder: Path, dtype: torch.dtype) -> None:
    """Compare everything that a case expects."""
    if entry["case"] not in neuron_edit_cases.HANDLERS:
        raise KeyError(f"The case of {entry['model']} is of the kind {entry['case']!r}, which nobody compares")
    case = Case(entry, index, folder, dtype)
    neuron_edit_cases.HANDLERS[entry["case"]](case, index)
    case.finish()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_everything_that_the_index_expects_comes_out(name, dtype):
    check(CASES[name], INDEX, FOLDER, dtype)


@pytest.mark.parametrize("kind", sorted(INDEX["metrics"]))
def test_every_metric_of_the_index_comes_out(kind):
    editing_metric_cases.HANDLERS[kind](INDEX["metrics"][kind], FOLDER)


def test_the_index_has_no_section_that_nobody_compares():
    assert set(INDEX) - ELSEWHERE == {"metrics"}
    assert set(INDEX["metrics"]) <= set(editing_metric_cases.HANDLERS)


def test_every_kind_has_a_case_of_its_own():
    assert {entry["case"] for entry in OURS["cases"]} == set(neuron_edit_cases.HANDLERS)
    assert set(OURS["metrics"]) == set(editing_metric_cases.HANDLERS)


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_changed_tensor_is_noticed(name, tmp_path):
    folder = Path(shutil.copytree(FOLDER, tmp_path / "neuron_edit"))
    changed = change_largest_value(folder, CASES[name])
    with pytest.raises(AssertionError, match=changed.replace(".", r"\.")):
        check(CASES[name], INDEX, folder, torch.float64)


def test_a_tensor_that_the_index_does_not_list_is_noticed():
    entry = OURS["cases"][0]
    listed = {name: field for name, field in entry["fields"].items() if name != "C.1"}
    with pytest.raises(AssertionError, match="different tensors"):
        check({**entry, "fields": listed}, OURS, SHIPPED, torch.float64)


def test_a_kind_that_nobody_knows_is_noticed():
    with pytest.raises(KeyError, match="unheard_of"):
        check({**OURS["cases"][0], "case": "unheard_of"}, OURS, SHIPPED, torch.float64)


def test_a_run_against_another_folder_fails_where_that_folder_disagrees(tmp_path):
    folder = tmp_path / "neuron_edit"
    (folder / "gpt2_s3").mkdir(parents=True)
    entry = next(entry for entry in OURS["cases"] if entry["case"] == "cov" and entry["model"] == "gpt2_s3")
    (folder / "index.json").write_text(json.dumps({**OURS, "cases": [entry]}), encoding="utf-8")
    for file in (entry["file"], OURS["models"]["gpt2_s3"]["file"], "metrics.safetensors"):
        shutil.copy(SHIPPED / file, folder / file)
    selected = f"{__file__}::test_everything_that_the_index_expects_comes_out"
    command = ["-m", "pytest", "-v", "-p", "no:cacheprovider", selected]

    def run() -> Finished:
        return run_python(*command, cwd=Path(__file__).parents[2], environment={"LIT_LLM_GOLDEN": str(tmp_path)})

    agrees = run()
    assert agrees.returncode == 0, agrees.stdout
    assert "2 passed" in agrees.stdout
    change_largest_value(folder, entry)
    disagrees = run()
    assert disagrees.returncode == 1, disagrees.stdout


def change_largest_value(folder: Path, entry: dict) -> str:
    """Make the largest number of the first expected tensor 1% larger; returns its name."""
    tensors = load_file(folder / entry["file"])
    name = next(name for name in sorted(tensors) if name not in INPUTS and tensors[name].is_floating_point())
    flat = tensors[name].flatten()
    flat[flat.abs().argmax()] *= 1.01
    tensors[name] = flat.view_as(tensors[name])
    save_file(tensors, folder / entry["file"])
    return name
