"""Every key of every shipped config reaches a constructor, with its value, and every argument there is used."""

import ast
import dataclasses
import inspect
import typing
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace

import lit_llm
from lit_llm import methods
from lit_llm.methods.base import _LEARNED_FROM
from lit_llm.training_cli import TrainingCLI
from tests.cli.parsing import CONFIGS, RECIPES, record_constructors, stop_before_the_run

ON_THIS_MACHINE = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
OF_THE_COMMAND_LINE = {"seed_everything", "run", "stages", "vars", "compile_loss"}
CLASSES = [*(getattr(methods, name) for name in methods.__all__), *_LEARNED_FROM]


@pytest.fixture(scope="module")
def constructors():
    with pytest.MonkeyPatch.context() as patch:
        stop_before_the_run(patch)
        yield record_constructors(patch)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS).with_suffix("")))
def test_every_key_of_a_recipe_reaches_a_constructor(recipe, constructors, tmp_path):
    options = [f"--trainer.{name}={value}" for name, value in ON_THIS_MACHINE.items()]
    constructors.clear()
    cli = TrainingCLI.run(["fit", "--config", str(recipe), f"--run.root={tmp_path}", *options])

    written, resolved = yaml.safe_load(recipe.read_text()), cli.config["fit"]
    assert written.keys() <= constructors.keys() | OF_THE_COMMAND_LINE
    read = [
        *reached(resolved.model.init_args, constructors["model"], "model"),
        *reached(resolved.data.init_args, constructors["data"], "data"),
        *reached(resolved.checkpoint, constructors["checkpoint"], "checkpoint"),
        *reached(only(written["trainer"], resolved.trainer), constructors["trainer"], "trainer"),
    ]
    assert set(leaves(written, ("model", "data", "trainer", "checkpoint"))) <= set(read)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_argument_of_a_constructor_is_used(cls):
    body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls.__init__))).body[0]
    used = {node.id for statement in body.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
    assert set(inspect.signature(cls.__init__).parameters) - {"self"} <= used


def test_every_field_of_nested_settings_is_looked_at():
    fields = {(inner, field.name) for cls in CLASSES for inner in nested(cls) for field in dataclasses.fields(inner)}
    looked_at = attributes()
    assert len(fields) > 50
    assert [f"{cls.__name__}.{name}" for cls, name in fields if name not in looked_at] == []


def reached(settings, arguments, where: str) -> list[str]:
    """Names of the leaves, each of which stands with its value in what a constructor was given."""
    names = []
    for name, value in vars(settings).items():
        assert name in arguments, f"{where}.{name} reaches no constructor"
        given = arguments[name]
        if isinstance(value, Namespace) and dataclasses.is_dataclass(given):
            names += reached(value, vars(given), f"{where}.{name}")
        else:
            assert plain(given) == plain(value), f"{where}.{name}"
            names.append(f"{where}.{name}")
    return names


def only(written: dict, resolved: Namespace) -> Namespace:
    """Of the trainer's settings, those that the file has; of the others most are Lightning's own defaults."""
    return Namespace(**{name: resolved[name] for name in written if name != "callbacks"})


def plain(value):
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (dict, Namespace)):
        return (
            {name: plain(item) for name, item in vars(value).items()} if isinstance(value, Namespace) else dict(value)
        )
    return value


def leaves(written: dict, sections: tuple[str, ...]) -> list[str]:
    """Names of the settings in a file, as `reached` writes them."""
    names = []
    for section in sections:
        settings = written.get(section, {})
        names += _leaves(settings.get("init_args", settings if "class_path" not in settings else {}), section)
    return names


def _leaves(settings: dict, where: str) -> list[str]:
    names = []
    for name, value in settings.items():
        whole = f"{where}.{name}"
        free = name in (
            "config",
            "columns",
            "groups",
            "tokens",
            "callbacks",
            "validation",
            "test",
        )  # values, not settings
        names += _leaves(value, whole) if isinstance(value, dict) and value and not free else [whole]
    return names


def nested(cls: type) -> set[type]:
    """Dataclasses among the types of a constructor's arguments, and those within them."""
    found = set()
    for hint in typing.get_type_hints(cls.__init__).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                found |= {part} | nested(part)
    return found


def attributes() -> set[str]:
    """Names that any file of the package reads from an object."""
    names = set()
    for file in Path(lit_llm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names
