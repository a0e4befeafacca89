"""Who may import whom, read from the source; and what stays light."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lit_llm"
ALLOWED = {
    "losses": {"losses"},
    "models": {"models", "losses", "data.batch", "storage", "wheels"},
    "editing": {"editing", "losses", "models", "folding", "similar_names", "storage"},
    "data": {"data", "losses", "folding", "similar_names", "seeds", "storage", "wheels"},
    "evaluation": {"evaluation", "losses", "storage"},
    "callbacks": {"callbacks", "evaluation.samples", "storage"},
    "planning": {"planning", "methods", "models", "losses", "data"},
    "methods": {"methods", "losses", "models", "data", "editing", "evaluation", "seeds", "storage"},
}
HEAVY = ("torch", "lightning", "transformers", "datasets", "peft", "gguf", "matplotlib", "torchmetrics")


def imports_of(path: Path, top_level_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


def allowed(module: str, permitted: set[str]) -> bool:
    inner = module.removeprefix("lit_llm.")
    return any(inner == name or inner.startswith(name + ".") for name in permitted)


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_what_it_may(folder):
    files = list((PACKAGE / folder).rglob("*.py"))
    assert files
    for path in files:
        ours = [name for name in imports_of(path) if name.startswith("lit_llm")]
        wrong = [name for name in ours if name != "lit_llm" and not allowed(name, ALLOWED[folder])]
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}"


def test_losses_import_torch_and_nothing_else():
    for path in (PACKAGE / "losses").glob("*.py"):
        foreign = {name.split(".")[0] for name in imports_of(path) if name.split(".")[0] not in sys.stdlib_module_names}
        assert foreign <= {"torch", "lit_llm"}, path


def test_nobody_imports_the_command_line():
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("cli.py", "__main__.py"):
            assert not {"lit_llm.cli", "lit_llm.training_cli", "lit_llm.commands"} & set(imports_of(path)), path


def test_transformers_and_its_like_are_imported_where_they_are_used():
    late = {"transformers", "datasets", "peft", "gguf", "matplotlib"}
    for path in PACKAGE.rglob("*.py"):
        assert not late & {name.split(".")[0] for name in imports_of(path, top_level_only=True)}, path


def test_help_answers_without_loading_anything_heavy():
    code = (
        "import sys; from lit_llm.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"assert not set({HEAVY!r}) & set(sys.modules), sorted(set({HEAVY!r}) & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert "python -m lit_llm fit --config configs/dskd.yaml" in shown.stdout


def test_help_takes_less_than_two_seconds_once_the_disk_is_warm():
    command = [sys.executable, "-m", "lit_llm", "--help"]
    subprocess.run(command, capture_output=True, check=True)
    took = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        took.append(time.perf_counter() - start)
    assert min(took) < 2


def test_files_stay_readable():
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "tools").glob("*.py")]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 420, f"{path.name} has {lines} lines"
