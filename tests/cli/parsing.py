"""The command line up to the point where a run would begin: parsed, checked and constructed, with nothing loaded."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_llm import methods
from lit_llm.methods.base import _LEARNED_FROM
from lit_llm.stages import Stages
from lit_llm.training_cli import LitTrainer, TrainingCLI

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(
    path
    for path in CONFIGS.rglob("*.yaml")
    if path.parent.name not in ("debug", "trainer")
    and "class_path" in yaml.safe_load(path.read_text()).get("model", {})
)


def stop_before_the_run(patch: pytest.MonkeyPatch) -> None:
    """From here on, `fit` ends when everything is constructed; parsers are built once, stages are taken as done."""
    built: dict[str, object] = {}
    set_up = TrainingCLI.setup_parser

    def setup_once(self, *arguments, **settings) -> None:
        if not built:
            set_up(self, *arguments, **settings)
            built.update({name: getattr(self, name) for name in _PARSERS})
        for name, value in built.items():
            setattr(self, name, value)

    patch.setattr(TrainingCLI, "setup_parser", setup_once)
    patch.setattr(TrainingCLI, "_run_subcommand", lambda self, command: None)
    patch.setattr(Stages, "_run", lambda self, title, folder, options: None)


_PARSERS = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")


def record_constructors(patch: pytest.MonkeyPatch) -> dict[str, dict]:
    """What the constructors of method, data, trainer and checkpoints are called with, by section of the config."""
    seen: dict[str, dict] = {}
    sections = {cls: "model" for cls in (getattr(methods, name) for name in methods.__all__)}
    sections |= dict.fromkeys(_LEARNED_FROM, "data") | {LitTrainer: "trainer", ModelCheckpoint: "checkpoint"}
    for cls, section in sections.items():
        patch.setattr(cls, "__init__", _recorded(cls, section, cls.__init__, seen))
    return seen


def _recorded(cls: type, section: str, construct, seen: dict[str, dict]):
    @functools.wraps(construct)
    def recorded(self, *arguments, **settings):
        if type(self) is cls:
            assert not arguments, "settings are given by name"
            seen[section] = settings
        construct(self, *arguments, **settings)

    return recorded
