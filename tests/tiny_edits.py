"""Runs that edit facts in seconds: a tiny model that knows nothing, and facts about made-up towns in two languages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import byte_level_tokenizer, tiny_model_folder
from tests.tiny_runs import tiny_trainer

TOWNS = ["Oslo", "Rome", "Lima", "Cairo", "Delhi", "Quito", "Minsk", "Dakar"]
LANDS = {"en": ["Peru", "Chad", "Oman"], "de": ["Polen", "Irak", "Kuba"]}
WORDS = {"en": "{} is in", "de": "{} liegt in"}


def write_facts(path: Path, number: int = 8) -> Path:
    """Requests in English and German, each with a question of every kind."""
    lines = []
    for i in range(number):
        by_lang = {}
        for code, words in WORDS.items():
            town, other = _town(i), TOWNS[(i + 1) % 8]
            prompt = words.format(town)
            by_lang[code] = {
                "subject": town,
                "prompt": prompt,
                "target_new": LANDS[code][i % 3],
                "paraphrases": [f"So {prompt}"],
                "rephrase": [f"The town of {prompt}"],
                "locality": [{"prompt": f"A river near {other} and the sea", "answer": "Nile"}],
                "portability": [{"prompt": f"In {town} they speak", "answer": "so"}],
            }
        lines.append(json.dumps({"id": f"town-{i}", "relation": "land", "by_lang": by_lang}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _town(number: int) -> str:
    return TOWNS[number % 8] + (f" {number // 8}" if number >= 8 else "")


def edit_config(
    folder: Path, method: str = "NeuronEdit", family: str = "llama", data: dict | None = None, **settings: Any
):
    """Write a model, facts and a config; the config's stem is the method's name in small letters."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model_folder(
        folder / "model",
        family=family,
        tokenizer=byte_level_tokenizer(),
        hidden_size=32,
        layers=4,
        seed=1,
        initializer_range=0.15,
    )
    trainer = tiny_trainer(max_steps=-1, max_epochs=1)
    del trainer["gradient_clip_val"]
    arguments = {
        "student": {"source": str(model)},
        "generation": {"prompts": 4, "max_new_tokens": 6},
        **(
            {"layers": [1, 2], "optimising": {"steps": 12, "learning_rate": 0.5, "clamp": 20.0}}
            if method == "NeuronEdit"
            else {}
        ),
        **settings,
    }
    config = {
        "seed_everything": 3,
        "model": {"class_path": method, "init_args": arguments},
        "data": {
            "class_path": "Facts",
            "init_args": {
                "source": str(write_facts(folder / "facts.jsonl")),
                "languages": ["en", "de"],
                "batch_size": 2,
                **(data or {}),
            },
        },
        "trainer": trainer | {"val_check_interval": 4},
        "checkpoint": {"every_n_train_steps": 1},
        "run": {"root": str(folder / "runs")},
    }
    path = folder / f"{method.lower()}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
