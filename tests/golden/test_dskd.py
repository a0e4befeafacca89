"""Golden vectors of the DSKD family: whatever the index lists is compared, by kind.

The expected values come from the authors' released code (arXiv 2406.17328, 2504.11426, 2603.01875).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.golden import (
    alignment_cases,
    attention_cases,
    cross_vocabulary_cases,
    divergence_cases,
    dual_space_cases,
    projector_cases,
    rouge_cases,
)
from tests.golden.golden import Case, change_largest_value, family_folder, read_index
from tests.processes import run_python

IN_BOTH_PRECISIONS = {
    **divergence_cases.HANDLERS,
    **projector_cases.HANDLERS,
    **dual_space_cases.HANDLERS,
    **attention_cases.HANDLERS,
    **cross_vocabulary_cases.HANDLERS,
}
EXACT = {**alignment_cases.HANDLERS, **rouge_cases.HANDLERS}

FOLDER = family_folder("dskd")
INDEX = read_index(FOLDER)
WITH_TENSORS = sorted(name for name, entry in INDEX.items() if entry["kind"] in IN_BOTH_PRECISIONS)
OTHERS = sorted(set(INDEX) - set(WITH_TENSORS))

SHIPPED = Path(__file__).parent / "dskd"
OURS = read_index(SHIPPED)


def check(entry: dict, folder: Path, dtype: torch.dtype) -> None:
    """Compare everything that a case expects."""
    if entry["kind"] in EXACT:
        EXACT[entry["kind"]](entry, folder)
        return
    if entry["kind"] not in IN_BOTH_PRECISIONS:
        raise KeyError(f"{entry['name']} is of the kind {entry['kind']!r}, which nobody compares")
    case = Case(entry, folder, dtype)
    IN_BOTH_PRECISIONS[entry["kind"]](case)
    case.finish()


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "dskd"))


@pytest.fixture
def copied_shipped(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "dskd"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", WITH_TENSORS)
def test_everything_that_the_index_expects_comes_out(name, dtype):
    check(INDEX[name], FOLDER, dtype)


@pytest.mark.parametrize("name", OTHERS)
def test_everything_that_the_index_expects_comes_out_exactly(name):
    check(INDEX[name], FOLDER, torch.float64)


EXPECT_TENSORS = [n for n in WITH_TENSORS if any(f["role"] == "expected" for f in INDEX[n]["fields"].values())]


@pytest.mark.parametrize("name", EXPECT_TENSORS)
def test_a_changed_tensor_is_noticed(name, copied):
    entry = INDEX[name]
    changed = change_largest_value(copied, entry)
    with pytest.raises(AssertionError, match=changed.replace(".", r"\.")):
        check(entry, copied, torch.float64)


@pytest.mark.parametrize("name", [name for name in WITH_TENSORS if INDEX[name]["expected_scalars"]])
def test_a_changed_scalar_is_noticed(name):
    for scalar, value in INDEX[name]["expected_scalars"].items():
        changed = {**INDEX[name]["expected_scalars"], scalar: 2 * value + 1}
        with pytest.raises(AssertionError, match=scalar):
            check({**INDEX[name], "expected_scalars": changed}, FOLDER, torch.float64)


def test_a_field_that_nobody_compares_is_noticed():
    entry = OURS["vanilla_kd__forward_kl"]
    more = {**entry["expected_scalars"], "something_new": 1.0}
    with pytest.raises(AssertionError, match="not compared.*something_new"):
        check({**entry, "expected_scalars": more}, SHIPPED, torch.float64)


def test_a_kind_that_nobody_knows_is_noticed():
    with pytest.raises(KeyError, match="unheard_of"):
        check({**OURS["vanilla_kd__forward_kl"], "kind": "unheard_of"}, SHIPPED, torch.float64)


def test_another_folder_of_vectors_takes_the_place_of_ours(copied_shipped, monkeypatch):
    monkeypatch.setenv("LIT_LLM_GOLDEN", str(copied_shipped.parent))
    assert family_folder("dskd") == copied_shipped


def test_a_folder_without_the_family_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_LLM_GOLDEN", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="LIT_LLM_GOLDEN"):
        family_folder("dskd")


def test_a_run_against_another_folder_fails_where_that_folder_disagrees(copied_shipped):
    entry = OURS["vanilla_kd__forward_kl"]
    (copied_shipped / "index.json").write_text(json.dumps({"cases": [entry]}), encoding="utf-8")
    selected = f"{__file__}::test_everything_that_the_index_expects_comes_out"
    command = ["-m", "pytest", "-v", "-p", "no:cacheprovider", selected]
    environment = {"LIT_LLM_GOLDEN": str(copied_shipped.parent)}
    root = Path(__file__).parents[2]

    agrees = run_python(*command, cwd=root, environment=environment)
    assert agrees.returncode == 0, agrees.stdout
    assert "2 passed" in agrees.stdout

    change_largest_value(copied_shipped, entry)
    disagrees = run_python(*command, cwd=root, environment=environment)
    assert disagrees.returncode == 1, disagrees.stdout
