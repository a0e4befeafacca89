"""Whole runs of a few seconds: tiny models, tiny data, the real command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from lit_llm.training_cli import TrainingCLI
from tests.tiny import byte_level_tokenizer, sentencepiece_tokenizer, tiny_model_folder

CLASSES = {
    "sft": "SFT",
    "kd": "KD",
    "dskd": "DSKD",
    "uld": "ULD",
    "mined": "MinED",
    "shared": "SharedVocabularyKD",
    "gold": "GOLD",
    "dpo": "DPO",
    "align": "AlignDistil",
    "dckd": "DCKD",
    "adpa": "ADPA",
    "kto": "KTO",
}
METHODS = (
    *("sft", "kd", "dskd", "dskd_v1", "dskd_cross", "dskd_cross_cma"),
    *("uld", "uld_cross", "mined_cross", "shared_cross", "gold_cross", "gold_cross_hybrid"),
    *("kd_sampled", "dskd_sampled", "dskd_cross_sampled"),
    *("dpo", "dpo_token_level", "align", "align_sampled"),
    *("dckd", "adpa", "adpa_sampled", "kto"),
)
ON_PAIRS = ("dpo", "align", "dckd", "adpa", "kto")  # how the names of methods on pairs begin
ANIMALS = ["cat", "dog", "bird", "fish", "horse", "cow", "pig", "hen", "fox", "bear", "wolf", "owl"]


class DieAt(L.Callback):
    """Ends the process's training like a crash, after a given number of optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("died on purpose")


def write_rows(path: Path, number: int, start: int = 0) -> Path:
    rows = []
    for i in range(start, start + number):
        animal, other = ANIMALS[i % 12], ANIMALS[(i * 5 + 3) % 12]
        rows.append({"prompt": f"Name the {animal} number {i}.", "response": f"The {animal} {i} saw a {other}."})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def write_pairs(path: Path, number: int, start: int = 0) -> Path:
    rows = []
    for i in range(start, start + number):
        animal, other = ANIMALS[i % 12], ANIMALS[(i * 5 + 3) % 12]
        answers = {"chosen": f"The {animal} {i} saw a {other}.", "rejected": f"It is {other} or so, {i} times."}
        checks = [{"kind": "include", "words": [animal]}]
        rows.append({"prompt": f"Name the {animal} number {i}.", **answers, "checks": checks})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def write_labelled(path: Path, number: int, start: int = 0) -> Path:
    """Two of three answers are good."""
    rows = []
    for i in range(start, start + number):
        animal, other = ANIMALS[i % 12], ANIMALS[(i * 5 + 3) % 12]
        good = i % 3 != 1
        answer = f"The {animal} {i} saw a {other}." if good else f"It is {other} or so, {i} times."
        rows.append({"prompt": f"Name the {animal} number {i}.", "answer": answer, "label": "good" if good else "bad"})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def tiny_config(folder: Path, method: str, dropout: float = 0.1, **trainer) -> Path:
    """Write models, data and a config for one of METHODS; the config's stem is the method's name."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_level, cross = byte_level_tokenizer(), "cross" in method
    student = tiny_model_folder(
        folder / "student",
        family="gpt2",
        tokenizer=byte_level,
        hidden_size=16,
        layers=2,
        seed=1,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
    )
    teacher = tiny_model_folder(
        folder / "teacher",
        family="llama",
        tokenizer=sentencepiece_tokenizer() if cross else byte_level,
        hidden_size=32,
        layers=2,
        seed=2,
    )
    model = {
        "student": {"source": str(student)},
        "optimization": {"lr": 1e-2},
        "generation": {"prompts": 2, "test_prompts": 2, "max_new_tokens": 4},
    }
    on_pairs = method.startswith(ON_PAIRS)
    data, write = ("Preferences", write_pairs) if on_pairs else ("Instructions", write_rows)
    if method == "kto":
        data, write = "LabelledAnswers", write_labelled
    if method.startswith("align"):
        other = tiny_model_folder(folder / "other", tokenizer=byte_level, hidden_size=32, layers=2, seed=5)
        model |= {"dpo": {"source": str(teacher)}, "other": {"source": str(other)}, "watch_start": True}
    elif method not in ("sft", "kto") and not method.startswith("dpo"):
        model["teacher"] = {"source": str(teacher)}
    if method.startswith("adpa"):
        before = tiny_model_folder(folder / "before", tokenizer=byte_level, hidden_size=32, layers=2, seed=5)
        model |= {"reference_teacher": {"source": str(before)}}
        model["answers"] = "start" if "sampled" in method else "rejected"
    if method == "dpo_token_level":
        model["loss"] = "tdpo2"
    if method in ("dskd_v1", "dskd_cross_cma"):
        model["projectors"] = {"version": "v1"}
    if method.endswith("hybrid"):
        model["hybrid"] = True
    if "sampled" in method:
        model["on_policy"] = {"student_fraction": 0.5, "updates": 2, "max_new_tokens": 6, "validation_prompts": 3}
    config = {
        "seed_everything": 3,
        "model": {"class_path": CLASSES[method.split("_")[0]], "init_args": model},
        "data": {
            "class_path": data,
            "init_args": {
                "train": str(write(folder / "train.jsonl", 24)),
                "validation": str(write(folder / "validation.jsonl", 4, start=24)),
                "test": str(write(folder / "test.jsonl", 4, start=28)),
                "template": "plain",
                "max_length": 48,
                "max_prompt_length": 24,
                "batch_size": 4,
                "eval_batch_size": 4,
            },
        },
        "trainer": tiny_trainer(**trainer),
        "checkpoint": {"every_n_train_steps": 1},
        "run": {"root": str(folder / "runs")},
    }
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def tiny_trainer(**changes) -> dict:
    """A few steps on the CPU, without a display."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    often = {"max_steps": 8, "val_check_interval": 4, "check_val_every_n_epoch": None}
    return {"accelerator": "cpu", "gradient_clip_val": 1.0, **often, **quiet, **changes}


def store_options(folder: Path, **settings) -> list[str]:
    """Options of `fit` for a teacher store in small shards."""
    settings = {"folder": folder / "store", "dtype": "float32", "shard_rows": 40, "batch_size": 4, **settings}
    return [f"--model.init_args.teacher_store.{name}={value}" for name, value in settings.items()]


def weights(cli: TrainingCLI) -> dict[str, torch.Tensor]:
    """Copies of what a checkpoint would hold."""
    return {name: value.clone() for name, value in cli.model.state_dict().items()}


def assert_identical(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same names, and the same values bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def fit(config: Path, *options: str) -> TrainingCLI:
    """Run `fit` in this process."""
    return TrainingCLI.run(["fit", "--config", str(config), *options])


def assert_same_logs(ours: Path, theirs: Path, tolerance: float = 1e-6) -> None:
    """Two runs have logged the same numbers in training, but for speed."""
    (our, their) = (_logged(run) for run in (ours, theirs))
    assert our.keys() == their.keys() and "train/loss" in our and "train/grad_norm" in our
    for name, values in our.items():
        assert their[name] == pytest.approx(values, rel=tolerance, abs=tolerance), name


def _logged(run: Path) -> dict[str, list[float]]:
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("train/")]
    return {name: [float(row[name]) for row in rows if row[name]] for name in names}


def largest_gap(ours: dict, theirs: dict) -> float:
    """Largest difference of two states with the same names."""
    assert ours.keys() == theirs.keys()
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in ours)


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    """Those of a run's last checkpoint."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
