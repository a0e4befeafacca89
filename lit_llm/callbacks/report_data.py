"""What the files of a run folder say, read for the report. Files that a killed run did not write are simply absent."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llm.callbacks.append_only import whole_lines

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class RunData:
    """A run folder's files.

    Attributes:
        folder: the run folder.
        curves: metric -> (step, value), ascending in step, one value a step; values may be NaN or infinite. None:
            metrics.csv is missing.
        samples: the lines of samples.jsonl; None: missing.
        token_scores: the lines of token_scores.jsonl; None: missing, as most methods write none.
        config_text: config.yaml as it stands; None: missing.
        config: the same parsed; empty where it is missing or is not a mapping.
        starts: the entries of environment.json, oldest first; None: missing.
        has_model: whether model/ was written.
        languages: the lines of languages.jsonl; None: missing, as most methods write none.
        similarity: similarity.json; None: missing, likewise.
        expansion: expansion.json; None: missing, likewise.
        edits: the lines of edits.jsonl; None: missing, likewise.
    """

    folder: Path
    curves: dict[str, Curve] | None
    samples: list[dict[str, Any]] | None
    token_scores: list[dict[str, Any]] | None
    config_text: str | None
    config: dict[str, Any]
    starts: list[dict[str, Any]] | None
    has_model: bool
    languages: list[dict[str, Any]] | None = None
    similarity: dict[str, Any] | None = None
    expansion: dict[str, Any] | None = None
    edits: list[dict[str, Any]] | None = None

    def curve(self, name: str) -> Curve:
        """The finite values of a metric; empty where it was never logged."""
        return [point for point in (self.curves or {}).get(name, []) if math.isfinite(point[1])]

    def last(self, name: str) -> float | None:
        """The last finite value of a metric."""
        curve = self.curve(name)
        return curve[-1][1] if curve else None

    def at_start(self, name: str) -> float | None:
        """The value at step 0, before any training."""
        curve = self.curve(name)
        return curve[0][1] if curve and curve[0][0] == 0 else None

    @property
    def names(self) -> list[str]:
        return list(self.curves or {})

    @property
    def last_step(self) -> int:
        return max((curve[-1][0] for curve in (self.curves or {}).values() if curve), default=0)

    @property
    def fit(self) -> dict[str, Any]:
        """The latest start of training, or of anything where there was none; empty when nothing was recorded."""
        starts = self.starts or []
        return next((start for start in reversed(starts) if start["stage"] == "fit"), starts[-1] if starts else {})

    @property
    def method(self) -> str | None:
        model = self.config.get("model")
        return (
            str(model["class_path"]).rsplit(".", 1)[-1] if isinstance(model, dict) and "class_path" in model else None
        )

    def argument(self, name: str) -> Any:
        """A setting of the method, as the config gives it; None where it does not."""
        model = self.config.get("model")
        return (model.get("init_args") or {}).get(name) if isinstance(model, dict) else None

    def model_name(self, who: str) -> str | None:
        """The student's or the teacher's name, as the config gives it."""
        spec = self.argument(who) or (self.argument("dpo") if who == "teacher" else None)
        if not isinstance(spec, dict):
            return None
        if spec.get("source") is None:
            return f"a new {(spec.get('config') or {}).get('model_type', 'model')}"
        layers, source = spec.get("keep_layers"), str(spec["source"])
        parts = Path(source).parts
        if parts[-1:] == ("model",) and parts[-4:-3] == ("stages",):  # .../stages/NAME/HASH/model
            source = f"stage {parts[-3]}"
        elif source.startswith(("/", ".", "~")):
            source = Path(source).name
        return source + (f", {len(layers)} of its layers" if layers else "")

    def role(self, who: str) -> str:
        """What people call the student or the teacher of this method."""
        return self.fit.get("models", {}).get(who, {}).get("role", who)

    @property
    def on_pairs(self) -> bool:
        """Whether the run learned from preferences: pairs, or answers with a label."""
        names = ("reward_accuracy", "label_accuracy")
        return any(self.curve(f"{stage}/{name}") for stage in ("val", "test", "train") for name in names)

    @property
    def combines_teachers(self) -> bool:
        """Whether the teacher is put together from two models, as in AlignDistil."""
        return self.argument("dpo") is not None

    @property
    def starts_at_reference(self) -> bool:
        """Whether rewards relative to the reference are nothing but rounding at step 0, and so order no pairs."""
        names = ("reward_margin", "good_reward")
        margins = [self.at_start(f"{stage}/{name}") for stage in ("val", "test") for name in names]
        return any(margin is not None and abs(margin) < 1e-3 for margin in margins)

    @property
    def one_tokenizer(self) -> bool:
        """Whether losses per token of student and teacher can be compared."""
        return bool(self.fit.get("models", {}).get("one_tokenizer", True))


def read_run(folder: Path) -> RunData:
    """Read what there is in a run folder."""
    config_text = _text(folder / "config.yaml")
    environment = _text(folder / "environment.json")
    return RunData(
        folder=folder,
        curves=_curves(folder / "metrics.csv"),
        samples=_json_lines(folder / "samples.jsonl"),
        token_scores=_json_lines(folder / "token_scores.jsonl"),
        config_text=config_text,
        config=_parsed(config_text),
        starts=None if environment is None else json.loads(environment)["starts"],
        has_model=(folder / "model").is_dir(),
        languages=_json_lines(folder / "languages.jsonl"),
        similarity=_json(folder / "similarity.json"),
        expansion=_json(folder / "expansion.json"),
        edits=_json_lines(folder / "edits.jsonl"),
    )


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _json(path: Path) -> dict[str, Any] | None:
    text = _text(path)
    return None if text is None else json.loads(text)


def _parsed(text: str | None) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(text or "")
    except yaml.YAMLError:  # cut short by a killed process; the report then shows the text alone
        return {}
    return config if isinstance(config, dict) else {}


def _curves(path: Path) -> dict[str, Curve] | None:
    lines = whole_lines(path)
    if not lines:
        return None
    by_step: dict[str, dict[int, float]] = {}
    for row in csv.DictReader(lines):
        step = int(float(row["step"]))
        for name, cell in row.items():
            if cell and name not in ("step", "epoch"):
                by_step.setdefault(name, {})[step] = float(cell)
    return {name: sorted(values.items()) for name, values in by_step.items()}


def _json_lines(path: Path) -> list[dict[str, Any]] | None:
    lines = whole_lines(path)
    return [json.loads(line) for line in lines] if lines else None
