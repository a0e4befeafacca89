"""Golden vectors of the LayerMoE family: losses, routing metrics, similarity and allocation, by kind.

The expected values are those of arXiv 2505.22582 and 2408.11396 and of their released code, with our choices beside them.
Routed layers and classifiers are compared in tests/models/test_experts.py, whole steps in tests/methods/test_layer_moe.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.golden import experts_cases, routing_cases
from tests.golden.golden import Case, change_largest_value, family_folder, read_index

HANDLERS = routing_cases.HANDLERS
ELSEWHERE = {kind: ("tests/models/test_experts.py", "experts_cases") for kind in experts_cases.HANDLERS}
ELSEWHERE["model_step"] = ("tests/methods/test_layer_moe.py", '"model_step"')
ONLY_FLOAT64 = {"allocation"}

FOLDER = family_folder("layer_moe")
INDEX = read_index(FOLDER)
HERE = sorted(name for name, entry in INDEX.items() if entry["kind"] not in ELSEWHERE)
RUNS = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name in HERE
    for dtype in ((torch.float64,) if INDEX[name]["kind"] in ONLY_FLOAT64 else (torch.float64, torch.float32))
]

SHIPPED = Path(__file__).parent / "layer_moe"
OURS = read_index(SHIPPED)


def check(entry: dict, folder: Path, dtype: torch.dtype) -> None:
    """Compare everything that a case expects."""
    if entry["kind"] not in HANDLERS:
        raise KeyError(f"{entry['name']} is of the kind {entry['kind']!r}, which nobody compares")
    case = Case(entry, folder, dtype)
    HANDLERS[entry["kind"]](case)
    case.finish()


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_everything_that_the_index_expects_comes_out(name, dtype):
    check(INDEX[name], FOLDER, dtype)


@pytest.mark.parametrize("name", HERE)
def test_a_changed_tensor_is_noticed(name, tmp_path):
    entry = INDEX[name]
    shutil.copy(FOLDER / entry["file"], tmp_path)
    changed = change_largest_value(tmp_path, entry)
    with pytest.raises(AssertionError, match=changed.replace(".", r"\.")):
        check(entry, tmp_path, torch.float64)


def test_a_kind_that_nobody_knows_is_noticed():
    entry = {**OURS["routing_metrics"], "kind": "unheard_of"}
    with pytest.raises(KeyError, match="unheard_of"):
        check(entry, SHIPPED, torch.float64)


def test_the_index_lists_no_kind_that_nobody_handles():
    assert {entry["kind"] for entry in INDEX.values()} <= {*HANDLERS, *ELSEWHERE}
    root = Path(__file__).parents[2]
    for kind, (file, name) in ELSEWHERE.items():
        assert name in (root / file).read_text(encoding="utf-8"), kind


def test_every_kind_has_a_case_of_its_own():
    assert {entry["kind"] for entry in OURS.values()} == {*HANDLERS, *ELSEWHERE}
