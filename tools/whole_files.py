"""What a run may leave behind when it dies: every file under its final name can be read to its end."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch
import yaml

from lit_llm.callbacks.append_only import whole_lines
from lit_llm.checkpoint_io import read_checkpoint
from lit_llm.data.shard_files import readable, whole_tensors


def check_run(folder: Path) -> None:
    """Read everything of a run folder.

    Raises:
        Exception: a file is not whole.
    """
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if any(part.endswith(".partial") for part in file.relative_to(folder).parts):
            continue
        check_file(file)
    if (folder / "model").exists():
        model_tensors(folder / "model")


def check_file(file: Path) -> None:
    if file.suffix == ".ckpt":
        read_checkpoint(file, verify=True)
    elif file.suffix == ".json":
        json.loads(file.read_text(encoding="utf-8"))
    elif file.suffix == ".jsonl":
        for line in whole_lines(file):
            json.loads(line)
    elif file.suffix == ".yaml":
        assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict), file
    elif file.suffix == ".csv":
        widths = {len(row) for row in csv.reader(whole_lines(file))}
        assert len(widths) <= 1, f"{file}: rows of {widths} cells"
    elif file.suffix == ".safetensors":
        with readable(file) as shard:
            whole_tensors(shard, file)
    elif file.suffix == ".html":
        assert file.read_text(encoding="utf-8").rstrip().endswith("</html>"), file


def model_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a Hugging Face folder, loaded as anybody would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def begun(folder: Path) -> list[str]:
    """What was being written when a process died: names without process number."""
    parts = [path.name for path in folder.rglob(".*.partial")]
    return sorted({part.removeprefix(".").rsplit(".", 2)[0] for part in parts})


def logged_step(folder: Path) -> int:
    """The last optimizer step whose loss is in metrics.csv."""
    lines = whole_lines(folder / "metrics.csv")
    if not lines:
        return 0
    steps = [int(float(row["step"])) for row in csv.DictReader(lines) if row.get("train/loss")]
    return max(steps, default=0)
