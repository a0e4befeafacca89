"""Imports a module from a checkout of the authors' code, with only what it touches beside it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import types
from pathlib import Path
from types import ModuleType

import torch


def load_module(folder: str | None, name: str) -> ModuleType:
    """A module of a checkout; its package's `__init__`, which imports the whole program, is passed by.

    Raises:
        FileNotFoundError: no such file under the folder.
    """
    root = _root(Path(folder), name)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    _stand_ins(root, name.split(".")[0])
    with _named_only("matplotlib.style", "context") if name.startswith("easyeditor.") else contextlib.nullcontext():
        return importlib.import_module(name)


def _root(folder: Path, name: str) -> Path:
    relative = Path(*name.split("."))
    for root in (folder, folder / "code"):
        if (root / relative).with_suffix(".py").is_file() or (root / relative / "__init__.py").is_file():
            return root
    raise FileNotFoundError(f"{folder} holds no {relative}.py (nor under code/). Give the folder of a whole checkout.")


def _stand_ins(root: Path, package: str) -> None:
    if package == "easyeditor":
        _easyedit(root / "easyeditor")
        return
    if not torch.distributed.is_initialized():
        # the authors' logging reduces over ranks; one process is a group of one
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if package == "criterions":
        _package("criterions", root / "criterions")
        sys.modules.setdefault("utils", types.SimpleNamespace(print_rank=print, log_rank=print))
    if package == "kdflow":
        _package("kdflow", root / "kdflow")
        algorithms = _package("kdflow.algorithms", root / "kdflow" / "algorithms")
        algorithms.register_algorithm = lambda name: lambda algorithm: algorithm
        utils = _package("kdflow.utils", root / "kdflow" / "utils")
        utils.logging_utils = types.SimpleNamespace(init_logger=logging.getLogger)
        sys.modules["kdflow.utils.logging_utils"] = utils.logging_utils


def _easyedit(folder: Path) -> None:
    for name in ("", ".models", ".models.rome", ".models.memit", ".util"):
        _package(f"easyeditor{name}", folder.joinpath(*name.split(".")))


@contextlib.contextmanager
def _named_only(name: str, attribute: str):
    """While open, a module that is imported for a name that nobody uses exists, also where its package is not installed."""
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is not None:
        yield
        return
    module = ModuleType(name)
    setattr(module, attribute, None)
    sys.modules.update({package: ModuleType(package), name: module})
    try:
        yield
    finally:
        del sys.modules[package], sys.modules[name]


def _package(name: str, folder: Path) -> ModuleType:
    if name not in sys.modules:
        module = ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module
    return sys.modules[name]
