"""Reads golden vectors and keeps account of what has been compared.

A family is a folder with an `index.json` that lists cases: tensors in a safetensors file, scalars, hyper-parameters and
tolerances. Indices come in three formats; the second ("inputs", "expected") keeps every number in the tensors, named
`in.NAME` and `out.NAME`; so does the third ("hyper_parameters", "fields"), without prefixes. `LIT_LLM_GOLDEN=<folder>`
replaces the vectors of this checkout by others of the same format, with one sub-folder per family.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_HERE = Path(__file__).parent


def family_folder(family: str) -> Path:
    """Where the vectors of a family lie."""
    replaced = os.environ.get("LIT_LLM_GOLDEN")
    folder = Path(replaced) / family if replaced else _HERE / family
    if not (folder / "index.json").is_file():
        raise FileNotFoundError(
            f"{folder / 'index.json'} does not exist. LIT_LLM_GOLDEN is {replaced!r}; it names a folder with one "
            f"sub-folder per family, here {family!r}. Unset it to use the vectors of the checkout."
        )
    return folder


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """The cases of a family by name."""
    cases = json.loads((folder / "index.json").read_text(encoding="utf-8"))["cases"]
    return {case["name"]: _as_first_format(case) for case in cases}


def _as_first_format(case: dict[str, Any]) -> dict[str, Any]:
    if "hyper_parameters" not in case:
        return case
    if "fields" in case:
        return {**case, "hparams": case["hyper_parameters"], "expected_scalars": {}}
    fields = {f"in.{name}": {"role": "input"} for name in case["inputs"]}
    fields |= {f"out.{name}": {"role": "expected"} for name in case["expected"]}
    copied = {key: case[key] for key in ("name", "kind", "file", "tolerance")}
    return {**copied, "hparams": case["hyper_parameters"], "fields": fields, "expected_scalars": {}}


def change_largest_value(folder: Path, entry: dict[str, Any]) -> str:
    """Make the largest number of one expected tensor 1% larger; returns its name."""
    tensors = load_file(folder / entry["file"])
    expected = [name for name, field in entry["fields"].items() if field["role"] == "expected"]
    changeable = [name for name in expected if tensors[name].is_floating_point() and tensors[name].any()]
    name = next((name for name in changeable if "grad" in name), (changeable or expected)[-1])
    flat = tensors[name].flatten()
    flat[flat.abs().argmax()] *= 1.01
    tensors[name] = flat.view_as(tensors[name])
    save_file(tensors, folder / entry["file"])
    return name


class Case:
    """One golden case in one precision.

    Attributes:
        hparams: as listed in the index.
        dtype: floating inputs are cast to it, and it selects the tolerance.
        folder: where the files lie.
        json_file: path of the JSON file beside the tensors, where the case has one.
    """

    def __init__(self, entry: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
        self.hparams, self.dtype, self.folder = entry["hparams"], dtype, folder
        self.json_file = entry["json_files"][0] if entry.get("json_files") else None
        self._tolerance = entry["tolerance"]
        self._stored = load_file(folder / entry["file"])
        self._roles = {name: field["role"] for name, field in entry["fields"].items()}
        self._scalars = entry["expected_scalars"]
        self._compared: set[str] = set()
        self._tolerated = dtype
        assert set(self._stored) == set(self._roles), "the index and the file list different tensors"

    def __contains__(self, name: str) -> bool:
        return name in self._roles

    def __getitem__(self, name: str) -> Tensor:
        """An input, in the precision of the case."""
        assert self._roles[name] == "input", f"{name} is {self._roles[name]}, not an input"
        return self._cast(name)

    def leaf(self, name: str) -> Tensor:
        """An input that collects a gradient."""
        return self[name].clone().requires_grad_()

    def inputs(self, prefix: str = "") -> list[str]:
        """Names of the inputs."""
        return [name for name, role in self._roles.items() if role == "input" and name.startswith(prefix)]

    def loosen(self, dtype: torch.dtype) -> None:
        """Compare with the tolerance of another precision from here on: that in which a part of the program computes."""
        self._tolerated = dtype

    def stored(self, name: str) -> Tensor:
        """A stored tensor as it is, for cases about the vectors themselves."""
        return self._stored[name]

    def expected(self, prefix: str = "") -> list[str]:
        """Names of tensors to compare with."""
        return [name for name, role in self._roles.items() if role == "expected" and name.startswith(prefix)]

    def scalars(self, prefix: str = "") -> list[str]:
        return [name for name in self._scalars if name.startswith(prefix)]

    def check(self, name: str, value: Tensor, where: Tensor | None = None, **tolerance: float) -> None:
        """Compare a tensor with the stored one, at the rows of `where` if it is given."""
        assert self._roles[name] == "expected", f"{name} is {self._roles[name]}, there is nothing to compare with"
        stored, value = self._stored[name], value.detach()
        assert stored.shape == value.shape, f"{name}: {tuple(value.shape)} instead of {tuple(stored.shape)}"
        if where is not None:
            assert where.any(), f"{name}: no row to compare"
            stored, value = stored[where], value[where]
        self._close(name, value, stored, tolerance)
        self._compared.add(name)

    def check_scalar(self, name: str, value: Tensor | float, **tolerance: float) -> None:
        stored = torch.tensor(self._scalars[name], dtype=torch.float64)
        self._close(name, torch.as_tensor(value).detach(), stored, tolerance)
        self._compared.add(f"scalar {name}")

    def finish(self) -> None:
        """Fail if something that the index expects was compared by nobody."""
        wanted = {*self.expected(), *(f"scalar {name}" for name in self._scalars)}
        assert wanted, "the case expects nothing"
        assert not (forgotten := sorted(wanted - self._compared)), f"expected, but not compared: {forgotten}"

    def gradient_tolerance(self, name: str) -> dict[str, float]:
        """For gradients: in single precision errors are those of the largest entry."""
        tolerance = dict(self.tolerance())
        if self._tolerated == torch.float32:
            tolerance["atol"] += 2e-4 * float(self._stored[name].abs().max())
        return tolerance

    def tolerance(self, dtype: torch.dtype | None = None) -> dict[str, float]:
        return self._tolerance[str(dtype or self._tolerated).removeprefix("torch.")]

    def _close(self, name: str, value: Tensor, stored: Tensor, tolerance: dict[str, float]) -> None:
        if not stored.is_floating_point():
            value, stored = value.long(), stored.long()
        else:
            value, stored = value.double(), stored.double()
        torch.testing.assert_close(value, stored, **(tolerance or self.tolerance()), msg=lambda text: f"{name}: {text}")

    def _cast(self, name: str) -> Tensor:
        tensor = self._stored[name]
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor
