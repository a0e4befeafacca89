"""Tiny runs of LayerMoE and its baseline: three made-up languages of a few words each, a model of three layers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import byte_level_tokenizer, tiny_model_folder
from tests.tiny_runs import tiny_trainer

WORDS = {
    "en": ["the", "cat", "dog", "sat", "on", "mat", "saw", "a", "and", "log"],
    "hu": ["egy", "macska", "kutya", "ült", "szőnyeg", "látta", "és", "nagyon", "szép", "ház"],
    "tr": ["bir", "kedi", "köpek", "oturdu", "halı", "gördü", "ve", "çok", "güzel", "ev"],
}
GROUPS = {"old": ["en"], "new": ["hu", "tr"]}


def write_corpora(folder: Path, documents: int = 60) -> dict[str, str]:
    """One text file for each language, one document a line."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for language, words in WORDS.items():
        draw = random.Random(language)
        lines = [" ".join(draw.choices(words, k=draw.randint(6, 14))) + "." for _ in range(documents)]
        path = folder / f"{language}.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        found[language] = str(path)
    return found


def language_config(
    folder: Path,
    stage: int | None = 1,
    *,
    source: Path | None = None,
    family: str = "llama",
    groups: dict[str, list[str]] | None = None,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **trainer: Any,
) -> Path:
    """Write corpora, a model and a config.

    Args:
        folder: where to.
        stage: of LayerMoE; None: the baseline, SFT on the newest group.
        source: the student; None: a dense one of three layers.
        family: of that one.
        groups: name -> languages.
        model: more arguments of the method.
        data: more arguments of `Languages`.
        trainer: more arguments of the Trainer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    corpora = write_corpora(folder / "text")
    if source is None:
        source = tiny_model_folder(
            folder / "dense", family, tokenizer=byte_level_tokenizer(), hidden_size=16, layers=3, seed=1
        )
    settings: dict[str, Any] = {"student": {"source": str(source)}, "optimization": {"lr": 1e-2, "weight_decay": 0.0}}
    settings["generation"] = {"prompts": 2, "max_new_tokens": 4}
    if stage is not None:
        settings["stage"] = stage
        settings["routing_window"] = 2
    if stage == 1:
        settings["expand"] = {"experts": [3, 1, 2]}
    config = {
        "seed_everything": 3,
        "model": {
            "class_path": "SFT" if stage is None else "LayerMoE",
            "init_args": {**settings, **(model or {})},
        },
        "data": {
            "class_path": "Languages",
            "init_args": {
                "groups": {
                    name: {language: corpora[language] for language in members}
                    for name, members in (groups or GROUPS).items()
                },
                "stage": stage or 1,
                "row_length": 32,
                "batch_size": 4,
                "eval_batch_size": 4,
                "validation_tokens": 128,
                **(data or {}),
            },
        },
        "trainer": tiny_trainer(**trainer),
        "checkpoint": {"every_n_train_steps": 1},
        "run": {"root": str(folder / "runs")},
    }
    path = folder / f"stage{stage}.yaml" if stage else folder / "baseline.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path
