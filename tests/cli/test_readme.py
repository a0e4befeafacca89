"""The commands of the README work as they stand, with tiny stand-ins for models and data."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lit_llm.cli import main
from lit_llm.editing.deltas import EditSet
from tests.cli.test_every_config import CONFIGS, reduced
from tests.tiny import tiny_model_folder

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
LINES = [
    line.split("#")[0].strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()
]
COMMANDS = [part.strip() for line in LINES for part in line.split("&&")]
OURS = [command.split("python -m lit_llm ")[1] for command in COMMANDS if "python -m lit_llm " in command]


def test_every_command_of_the_readme_is_either_ours_or_a_known_tool():
    known = (
        "python -m lit_llm",
        "python -m pip install -e",
        "python -m pytest",
        "tensorboard --logdir",
        "LIT_LLM_",
        "export LIT_LLM_",
    )
    assert all(command.startswith(known) for command in COMMANDS), COMMANDS
    assert len(OURS) >= 8


def test_the_test_command_is_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "python -m pip install -e '.[test]' && python -m pytest" in README
    assert "-e '.[test]'" in ci and "python -m pytest" in ci


def small(options: list[str], folder: Path, monkeypatch) -> list[str]:
    """The command with stand-ins put between its own configs and its own overrides."""
    recipe = Path(options[options.index("--config") + 1])
    override = reduced(ROOT / recipe, folder)
    last = max(i for i, option in enumerate(options) if option == "--config") + 2
    if "export" in options[0] or "test" in options[0]:
        extra = [str(override)]
    else:
        extra = [str(override), str(CONFIGS / "debug" / "tiny.yaml")]
    flags = [flag for config in extra for flag in ("--config", config)]
    return [*options[:last], *flags, *options[last:]]


@pytest.fixture
def in_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("command", [c for c in OURS if c.startswith("fit") and "ckpt_path" not in c])
def test_a_fit_of_the_readme_runs(command, tmp_path, in_checkout, monkeypatch, capsys):
    options = small(shlex.split(command), tmp_path, monkeypatch)
    if "--print_config" in options:
        with pytest.raises(SystemExit):
            main(options)
        assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"].endswith("DSKD")
        return
    main(options)
    assert list((tmp_path / "runs").glob("*/version_0/model/model.safetensors"))


def test_the_commands_after_a_run_work_in_their_order(tmp_path, in_checkout, monkeypatch, capsys):
    first = next(c for c in OURS if c.startswith("fit"))
    main(small(shlex.split(first), tmp_path, monkeypatch))
    run = tmp_path / "runs" / "dskd" / "version_0"
    later = [c for c in OURS if c.split()[0] in ("test", "export", "generate") or "--ckpt_path last" in c]
    assert {c.split()[0] for c in later} == {"fit", "test", "export", "generate"}
    for command in later:
        options = shlex.split(
            command.replace("runs/dskd/version_0", str(run)).replace("my-model", str(tmp_path / "my-model"))
        )
        main(small(options, tmp_path, monkeypatch) if "--config" in options else [*options, "--max_new_tokens=3"])
    assert (tmp_path / "my-model" / "model.safetensors").is_file()


def test_the_lines_about_facts_work_in_their_order(tmp_path, capsys):
    model = tiny_model_folder(tmp_path / "model", layers=4, seed=1, initializer_range=0.15)
    lines = [shlex.split(c) for c in OURS if c.split()[0] in ("edit", "ask", "undo")]
    assert [line[0] for line in lines] == ["edit", "ask", "undo"]
    said = []
    for line in lines:
        line[line.index("--model") + 1], line[line.index("--edits") + 1] = (
            str(model),
            str(tmp_path / "edits.safetensors"),
        )
        more = ["--layers", "[1,2]", "--optimising.steps", "3"] if line[0] == "edit" else []
        main([*line, *more])
        said.append(capsys.readouterr().out)
    assert "malta-capital" in said[1] and len(EditSet.load(tmp_path / "edits.safetensors")) == 0


def test_the_file_tree_of_the_readme_names_what_exists():
    tree = README.split("## Where things are")[1]
    for folder in re.findall(r"^(\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
    for folder in re.findall(r"^  (\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / "lit_llm" / folder).is_dir(), folder


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
