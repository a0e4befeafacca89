"""Rows of text from files, folders and hubs, as a `datasets.Dataset` with the columns that a DataModule asks for."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from lit_llm.storage import cache_folder

_FORMATS = {".jsonl": "json", ".json": "json", ".gz": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}

_DEMO = {  # what a source begins with -> how the file's name begins, and the parts
    "demo:": ("", ("train", "validation", "test")),
    "demo-preferences:": ("preferences_", ("train", "judge", "validation", "test")),
}


def load_rows(source: str, columns: dict[str, str], required: tuple[str, ...]):
    """Read a data set and rename its columns.

    Args:
        source: a `.jsonl`, `.jsonl.gz`, `.json`, `.parquet` or `.csv` file; a `.txt` or `.txt.gz` file, whose lines are
            the column `text`; a folder written by `datasets.save_to_disk`; `demo:train`, `demo:validation` or `demo:test`
            for the instructions that are shipped, `demo-preferences:train`, `:judge`, `:validation` or `:test` for the
            pairs; else a hub id. A folder or hub id may name its part, sliced as `datasets` does: `NAME@train[:1000]`.
        columns: our name -> the file's name. Columns that are not named keep their own names.
        required: our names that must exist afterwards.

    Returns:
        A `datasets.Dataset`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable file, empty file or missing columns (those found are listed).
    """
    rows = _read(source)
    if len(rows) == 0:
        raise ValueError(f"{source} holds no rows. Check the file, or point data.train / validation / test elsewhere.")
    wanted = {theirs: ours for ours, theirs in columns.items() if theirs != ours}
    missing = [theirs for theirs in [columns.get(name, name) for name in required] if theirs not in rows.column_names]
    missing += [theirs for theirs in wanted if theirs not in rows.column_names and theirs not in missing]
    if missing:
        raise ValueError(
            f"{source} has no column {', '.join(repr(name) for name in missing)}; it has: "
            f"{', '.join(rows.column_names)}.\n  Map your names with data.columns, e.g. "
            f"--data.columns '{{{required[0]}: {rows.column_names[0]}}}'"
        )
    clash = [ours for ours in wanted.values() if ours in rows.column_names]
    return rows.remove_columns(clash).rename_columns(wanted)


def _read(source: str):
    import datasets

    if source.startswith(tuple(_DEMO)):
        source = _demo_file(source)
    path = Path(source)
    name, _, split = source.partition("@")
    if Path(name).is_dir():
        return _single(datasets.load_from_disk(name), name, split or "train")
    if path.suffix in _FORMATS:
        if not path.is_file():
            raise FileNotFoundError(
                f"No data file at {source} (looked in {Path.cwd()}).\n"
                f"  Correct data.train / validation / test, or use the shipped set: demo:train, demo:validation, ..."
            )
        kind = "text" if path.name.endswith(".txt.gz") else _FORMATS[path.suffix]
        try:
            return datasets.load_dataset(
                kind, data_files=str(path), split="train", cache_dir=str(cache_folder() / "datasets")
            )
        except (datasets.exceptions.DatasetGenerationError, EOFError, OSError, UnicodeDecodeError) as error:
            cause = error.__cause__ or error
            raise ValueError(
                f"{source} could not be read as {kind}: {cause}\n"
                f"  A .jsonl file holds one JSON object a line, the same fields in each."
            ) from error
    return _from_hub(name, split or "train")


def _from_hub(source: str, split: str):
    import datasets

    try:
        return datasets.load_dataset(source, split=split, cache_dir=str(cache_folder() / "datasets"))
    except (ConnectionError, FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"{source!r} is neither a file, nor a folder, nor a data set that the hub gives: {error}\n"
            f"  Without network, download it elsewhere and name the file (.jsonl, .jsonl.gz, .json, .parquet, .csv), "
            f"or use demo:train."
        ) from error


def _single(loaded, source: str, split: str):
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise ValueError(
            f"{source} has the parts {', '.join(loaded)}, not {split!r}. Name one: {source}@{next(iter(loaded))}."
        )
    return loaded[split]


def _demo_file(source: str) -> str:
    kind, _, split = source.partition(":")
    prefix, parts = _DEMO[f"{kind}:"]
    if split not in parts:
        *first, last = [f"{kind}:{part}" for part in parts]
        raise ValueError(f"{source} does not exist. The shipped set has {', '.join(first)} and {last}.")
    return str(importlib.resources.files("lit_llm.data") / "demo" / f"{prefix}{split}.jsonl.gz")
