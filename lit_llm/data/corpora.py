"""Monolingual corpora: from files, hubs and packaged text to the tokens of documents, in an order given by their content.

Documents are tokenised without special tokens and end with the end-of-sequence token (arXiv 2408.11396, its code). The order
is that of a hash of the text, and a share from its beginning is held out: the same on other languages, orders of training and
stages. How many documents there are, or `limit`, decides where that share ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lit_llm.data.package_text import KIND, package_text
from lit_llm.data.rows import load_rows
from lit_llm.data.tokenized import begin_ids, map_cached

_FORMAT = 1  # raise it when the meaning of a cached column changes
_PACKAGED, _HUB = f"{KIND}:", "hub:"
_TEXT_FILES = (".txt", ".txt.gz")
_FILES = (*_TEXT_FILES, ".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents of one language; repeated and empty ones are left out.

    Attributes:
        language: its code.
        table: a `datasets.Dataset` on disk with the column `ids`.
        documents: rows of the table, in the order of their hash.
        lengths: tokens of each of them, the end-of-sequence token included.
        num_bytes: of their text, UTF-8.
        left_out: documents that were empty or came again.
    """

    language: str
    table: object
    documents: np.ndarray
    lengths: np.ndarray
    num_bytes: int
    left_out: int

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def ids(self, number: int) -> list[int]:
        """Tokens of a document by its place in the order."""
        return self.table[int(self.documents[number])]["ids"]


def load_corpus(
    sources: Sequence[str],
    language: str,
    tokenizer,
    *,
    columns: dict[str, str],
    begin: Literal["auto", "never"],
    order_seed: int,
    workers: int,
) -> Corpus:
    """Read and tokenise the corpus of a language, or find its tokens in the cache.

    Args:
        sources: as `Languages.groups` describes them.
        language: its code; packaged text is asked for it.
        tokenizer: a fast tokenizer with an end-of-sequence token.
        columns: {"text": the column's name} where it has another.
        begin: whether documents begin as the tokenizer begins texts by itself.
        order_seed: of the order of documents.
        workers: processes; 0 chooses by the number of rows.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, without that column, or empty.
    """
    rows = _rows(sources, language, columns)
    begins = begin_ids(tokenizer) if begin == "auto" else []
    table = map_cached(
        rows,
        DocumentEncoder(tokenizer, begins),
        [_FORMAT, "documents", begins],
        (tokenizer,),
        workers=workers,
        name=language,
        features=_features(),
    )
    lengths, identity = np.asarray(table["num_tokens"][:]), np.asarray(table["identity"][:], dtype=np.int64)
    filled = np.flatnonzero(lengths)
    _, first = np.unique(identity[filled], return_index=True)
    kept = filled[first]
    if len(kept) == 0:
        raise ValueError(f"The corpus of {language!r} holds no text: {', '.join(sources)}. Correct data.groups.")
    documents = kept[np.argsort(_mixed(identity[kept], order_seed), kind="stable")]
    return Corpus(
        language=language,
        table=table,
        documents=documents,
        lengths=lengths[documents],
        num_bytes=int(np.asarray(table["num_bytes"][:])[documents].sum()),
        left_out=len(lengths) - len(documents),
    )


def _rows(sources: Sequence[str], language: str, columns: dict[str, str]):
    from datasets import Value, concatenate_datasets

    parts = []
    for source in sources:
        if source.startswith(_PACKAGED):  # a .txt file has the column `text` alone
            parts += [load_rows(str(file), {}, ("text",)) for file in package_text(source[len(_PACKAGED) :], language)]
            continue
        name = source.removeprefix(_HUB)
        if name == source and name.endswith(_FILES):
            _check_file(Path(name), language)
        part = load_rows(name, {} if name.endswith(_TEXT_FILES) else columns, ("text",))
        if getattr(part.features["text"], "dtype", None) not in ("string", "large_string"):
            raise ValueError(
                f"The column {columns.get('text', 'text')!r} of {source} ({language!r}) holds {part.features['text']}, not "
                f"text. Name the column with text: --data.columns '{{text: NAME}}'"
            )
        part = part.select_columns("text")
        parts.append(part if part.features["text"].dtype == "string" else part.cast_column("text", Value("string")))
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _check_file(path: Path, language: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"No text of {language!r} at {path} (looked in {Path.cwd()}).\n  Correct data.groups, or use text that comes with "
            f"a package: {_PACKAGED}software."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"The corpus of {language!r} holds no text: {path} is empty. Correct data.groups.")


class DocumentEncoder:
    """Turns one row into the tokens of a document; picklable, so that workers can run it."""

    def __init__(self, tokenizer, begins: list[int]) -> None:
        self.tokenizer, self.begins = tokenizer, begins

    def __call__(self, row: dict) -> dict:
        text = (row["text"] or "").strip()
        ids = []
        if text:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids = [*self.begins, *ids, self.tokenizer.eos_token_id]
        return {
            "ids": ids,
            "num_tokens": len(ids),
            "num_bytes": len(text.encode()),
            "identity": int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True),
        }


def _features():
    from datasets import Features, Value
    from datasets import Sequence as Column

    counts = dict.fromkeys(("num_tokens", "num_bytes", "identity"), Value("int64"))
    return Features({"ids": Column(Value("int32")), **counts})


def _mixed(identity: np.ndarray, seed: int) -> np.ndarray:
    """Another hash of each hash for every seed (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        mixed = identity.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed + 1)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
