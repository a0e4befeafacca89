"""Rows of text from files, folders and hubs, as a `datasets.Dataset` with the columns that a DataModule asks for."""

from __future__ import annotations

import codecs
import gzip
import importlib.resources
import json
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
    _check_mapping(columns, required)
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


def _check_mapping(columns: dict[str, str], required: tuple[str, ...]) -> None:
    theirs = [columns.get(name, name) for name in {**dict.fromkeys(required), **columns}]
    if twice := [name for name in theirs if theirs.count(name) > 1]:
        raise ValueError(
            f"data.columns is {columns}, which takes the file's column {twice[0]!r} for two of ours. Ours are "
            f"{', '.join(required)} and optional ones; map each to a column of its own."
        )


def _read(source: str):

    if source.startswith(tuple(_DEMO)):
        source = _demo_file(source)
    path = Path(source)
    name, _, split = source.partition("@")
    if Path(name).is_dir():
        return _single(_from_folder(Path(name)), name, split or "train")
    if path.suffix in _FORMATS:
        if not path.is_file():
            raise FileNotFoundError(
                f"No data file at {source} (looked in {Path.cwd()}).\n"
                f"  Correct data.train / validation / test, or use the shipped set: demo:train, demo:validation, ..."
            )
        return _from_file(path, "text" if path.name.endswith(".txt.gz") else _FORMATS[path.suffix])
    return _from_hub(name, split or "train")


def _from_folder(folder: Path):
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"The folder {folder} holds no data set that can be read: {error}\n"
            f"  Name a folder that `datasets.save_to_disk` has written, or a file (.jsonl, .json, .parquet, .csv)."
        ) from error


def _from_file(path: Path, kind: str):
    import datasets

    if path.stat().st_size == 0:
        raise ValueError(
            f"{path} is empty (0 bytes). Write it again, or point data.train / validation / test elsewhere."
        )
    settings = {"data_files": str(path), "split": "train", "cache_dir": str(cache_folder() / "datasets")}
    try:
        return datasets.load_dataset(kind, **settings)
    except (datasets.exceptions.DatasetGenerationError, EOFError, OSError, ValueError, StopIteration) as error:
        raise ValueError(f"{path} could not be read as {kind}: {_why(path, kind, error.__cause__ or error)}") from error


def _why(path: Path, kind: str, error: BaseException) -> str:
    """What is wrong with a file, with the number of the line where there are lines, and what to do."""
    said = str(error).strip() or "nothing in it"
    if path.suffix == ".gz":
        if isinstance(error, (EOFError, gzip.BadGzipFile)):
            return f"{said}.\n  It is damaged, or no gzip file: fetch or compress it again."
    elif path.open("rb").read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return f"it is UTF-16, not UTF-8.\n  Convert it: iconv -f UTF-16 -t UTF-8 {path.name}"
    if kind == "parquet":
        return f"{said}\n  It is cut off or no parquet file: write or fetch it again."
    try:
        broken = _broken_line(path) if ".jsonl" in path.suffixes else None
    except UnicodeDecodeError as undecoded:
        said, error = str(undecoded), undecoded
        broken = None
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 ({said}).\n  Convert it: iconv -f LATIN1 -t UTF-8 {path.name} (or whatever it is)."
    if kind != "json":
        return f"{said}\n  Quote fields that hold commas, quotes or line ends, or write the rows as .jsonl."
    return f"{broken or said}\n  A .jsonl file holds one JSON object a line, the same fields in each."


def _broken_line(path: Path) -> str | None:
    """The first line that is no JSON object."""
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    with opened as lines:
        for number, line in enumerate(lines, start=1):
            text = line.decode("utf-8")
            try:
                whole = not text.strip() or isinstance(json.loads(text), dict)
            except ValueError as error:
                return f"line {number} is no JSON: {error}: {text.strip()[:80]!r}"
            if not whole:
                return f"line {number} is no JSON object: {text.strip()[:80]!r}"
    return None


def check_text(rows, source: str, columns: dict[str, str], names: tuple[str, ...], lists: tuple[str, ...] = ()) -> None:
    """See that columns hold text; those that are all null count as empty text.

    Args:
        rows: of `load_rows`.
        source: where they came from, for the message.
        columns: our name -> the file's name.
        names: our columns, those that are there are looked at.
        lists: of them, those that may hold lists of strings.

    Raises:
        ValueError: numbers, objects, a mixture.
    """
    text = ("string", "large_string", "null")
    for name in names:
        kind = rows.features.get(name)
        item = getattr(kind, "feature", None) if name in lists else None
        if kind is not None and getattr(kind if item is None else item, "dtype", None) not in text:
            found = getattr(kind, "dtype", kind)
            wanted = "text or a list of texts" if name in lists else "text"
            raise ValueError(
                f"The column {columns.get(name, name)!r} of {source} holds {found}, not {wanted} in every row.\n"
                f"  Write the values as strings, or name another column: --data.columns '{{{name}: NAME}}'"
            )


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
