"""Golden vectors of the AlignDistil family: whatever the index lists is compared, by kind.

The expected values are those of arXiv 2503.02832 and of its released code, with that code's masks beside the right ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.golden import adaptive_policy_cases, preference_cases
from tests.golden.golden import Case, change_largest_value, family_folder, read_index
from tests.processes import Finished, run_python

HANDLERS = {**preference_cases.HANDLERS, **adaptive_policy_cases.HANDLERS}

FOLDER = family_folder("align_distil")
INDEX = read_index(FOLDER)

SHIPPED = Path(__file__).parent / "align_distil"
OURS = read_index(SHIPPED)
SOME = "dpo_loss__a"


def check(entry: dict, folder: Path, dtype: torch.dtype) -> None:
    """Compare everything that a case expects."""
    if entry["kind"] not in HANDLERS:
        raise KeyError(f"{entry['name']} is of the kind {entry['kind']!r}, which nobody compares")
    case = Case(entry, folder, dtype)
    HANDLERS[entry["kind"]](case)
    case.finish()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", sorted(INDEX))
def test_everything_that_the_index_expects_comes_out(name, dtype):
    check(INDEX[name], FOLDER, dtype)


@pytest.mark.parametrize("name", sorted(INDEX))
def test_a_changed_tensor_is_noticed(name, tmp_path):
    entry = INDEX[name]
    shutil.copy(FOLDER / entry["file"], tmp_path)
    changed = change_largest_value(tmp_path, entry)
    with pytest.raises(AssertionError, match=changed.replace(".", r"\.")):
        check(entry, tmp_path, torch.float64)


def test_a_field_that_nobody_compares_is_noticed():
    entry = OURS[SOME]
    with pytest.raises(AssertionError, match="not compared.*something_new"):
        check({**entry, "expected_scalars": {"something_new": 1.0}}, SHIPPED, torch.float64)


def test_a_tensor_that_the_index_does_not_list_is_noticed():
    entry = OURS[SOME]
    listed = {name: field for name, field in entry["fields"].items() if name != "out.margin"}
    with pytest.raises(AssertionError, match="different tensors"):
        check({**entry, "fields": listed}, SHIPPED, torch.float64)


def test_a_kind_that_nobody_knows_is_noticed():
    with pytest.raises(KeyError, match="unheard_of"):
        check({**OURS[SOME], "kind": "unheard_of"}, SHIPPED, torch.float64)


def test_every_kind_has_a_case_of_its_own():
    assert {entry["kind"] for entry in OURS.values()} == set(HANDLERS)


def test_a_run_against_another_folder_fails_where_that_folder_disagrees(tmp_path):
    folder = tmp_path / "align_distil"
    folder.mkdir()
    index = json.loads((SHIPPED / "index.json").read_text(encoding="utf-8"))
    cases = [case for case in index["cases"] if case["name"] == SOME]
    (folder / "index.json").write_text(json.dumps({**index, "cases": cases}), encoding="utf-8")
    shutil.copy(SHIPPED / OURS[SOME]["file"], folder)
    selected = f"{__file__}::test_everything_that_the_index_expects_comes_out"
    command = ["-m", "pytest", "-v", "-p", "no:cacheprovider", selected]

    def run() -> Finished:
        return run_python(*command, cwd=Path(__file__).parents[2], environment={"LIT_LLM_GOLDEN": str(tmp_path)})

    agrees = run()
    assert agrees.returncode == 0, agrees.stdout
    assert "2 passed" in agrees.stdout
    change_largest_value(folder, OURS[SOME])
    disagrees = run()
    assert disagrees.returncode == 1, disagrees.stdout
