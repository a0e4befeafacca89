"""How alike languages are inside a model: the mean cosine of the MLP inputs of two languages, layer by layer, exactly.

The mean over all pairs of tokens of two languages is the product of their mean unit vectors, so one pass per language and
one running sum per layer suffice (LayerMoE, arXiv 2505.22582, which forms all pairs). S of a layer is the mean of two
means: over pairs of two new languages, and over pairs of a new and an old one.

Shapes: B documents, T padded positions, M tokens that count, L layers, H hidden size, P pairs of languages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_llm.storage import write_atomically


class UnitVectors:
    """The running sum of unit vectors of one language, for each layer, in float64.

    Args:
        language: its name, for messages.
        layers: number of layers.
        hidden_size: width.
        device: where states come from.
    """

    def __init__(self, language: str, layers: int, hidden_size: int, device: torch.device | str = "cpu") -> None:
        self.language = language
        self.sum_LH = torch.zeros(layers, hidden_size, dtype=torch.float64, device=device)
        self.count_L = torch.zeros(layers, dtype=torch.int64, device=device)
        self.zeros_L = torch.zeros(layers, dtype=torch.int64, device=device)
        self.broken_L = torch.zeros(layers, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, layer: int, states_MH: Tensor) -> None:
        """Add states of a layer. A vector of zeros has no direction: it is left out, and counted."""
        states_MH = states_MH.to(torch.float64)
        norm_M = states_MH.norm(dim=1)
        has_direction_M = norm_M > 0
        inverse_M = torch.where(has_direction_M, 1 / norm_M, 0.0)
        self.sum_LH[layer] += inverse_M @ states_MH
        self.count_L[layer] += has_direction_M.sum()
        self.zeros_L[layer] += (norm_M == 0).sum()
        self.broken_L[layer] += (~norm_M.isfinite()).sum()

    def check(self) -> None:
        """See that all states were finite; reads from the device.

        Raises:
            ValueError: they were not.
        """
        if bool(self.broken_L.any()):
            layer = int(self.broken_L.nonzero()[0])
            raise ValueError(
                f"{int(self.broken_L[layer])} hidden states of language {self.language!r} are not finite at layer {layer}, so "
                f"their similarity to others is not defined. Look for a document that the model cannot take, or use "
                f"another dtype."
            )

    @property
    def mean_LH(self) -> Tensor:
        """(L, H) the mean unit vector of each layer.

        Raises:
            ValueError: a layer without any.
        """
        if bool((self.count_L == 0).any()):
            raise ValueError(f"Language {self.language!r} has no token to measure. Give it text.")
        return self.sum_LH / self.count_L[:, None]


@dataclass(frozen=True)
class MeasuredLanguage:
    """What was measured of one language.

    Attributes:
        group: `old` or `new`.
        tokens: tokens that counted.
        documents: documents that were run.
        zero_vectors: states without a direction, over all layers.
        fingerprint: sha256 of the ids that were run.
    """

    group: str
    tokens: int
    documents: int
    zero_vectors: int
    fingerprint: str


@dataclass(frozen=True)
class SimilarityReport:
    """Similarities per layer; what an expert allocation reads.

    Attributes:
        pairs: "a-b" -> (L,) mean cosine.
        new_new: (L,) mean over pairs of two new languages; None with one new language.
        new_old: (L,) mean over pairs of a new and an old one.
        similarity: (L,) the mean of the two; with one new language that of `new_old` alone.
        languages: name -> what was measured.
        model: which one.
        seed: of the order of documents.
        tokens_per_language: how many were wanted.
        skip_special_tokens: whether they were left out.
    """

    pairs: dict[str, list[float]]
    new_new: list[float] | None
    new_old: list[float]
    similarity: list[float]
    languages: dict[str, MeasuredLanguage] = field(default_factory=dict)
    model: str = ""
    seed: int | None = None
    tokens_per_language: int | None = None
    skip_special_tokens: bool | None = None

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_atomically(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> SimilarityReport:
        """Read what `write` wrote.

        Raises:
            ValueError: the file is something else.
        """
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not {"pairs", "new_old", "similarity"} <= set(content):
            raise ValueError(
                f"{path} is not a similarity report: it lacks 'pairs', 'new_old' or 'similarity'.\n"
                f"  tools/language_similarity.py writes one."
            )
        languages = {name: MeasuredLanguage(**found) for name, found in content.pop("languages", {}).items()}
        return cls(**content, languages=languages)

    def text(self) -> str:
        """A Markdown table with a row for each layer, and what was measured."""
        head = ["layer", "S", "new-new", "new-old", *self.pairs]
        lines = [head, ["---"] * len(head)]
        for layer, value in enumerate(self.similarity):
            new_new = "" if self.new_new is None else f"{self.new_new[layer]:.4f}"
            pairs = [f"{values[layer]:.4f}" for values in self.pairs.values()]
            lines.append([str(layer), f"{value:.4f}", new_new, f"{self.new_old[layer]:.4f}", *pairs])
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        told = [
            f"{name} ({found.group}): {found.tokens:,} tokens of {found.documents:,} documents"
            + (f", {found.zero_vectors} zero vectors left out" if found.zero_vectors else "")
            for name, found in self.languages.items()
        ]
        return "\n".join([*told, "", table] if told else [table])


def measure(
    body: nn.Module,
    mlps: Sequence[nn.Module],
    documents: dict[str, Iterable[Sequence[int]]],
    groups: dict[str, str],
    *,
    tokens_per_language: int = 100_000,
    skipped_ids: Iterable[int] = (),
    max_length: int = 1024,
    batch_tokens: int = 4096,
    told: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, UnitVectors], dict[str, MeasuredLanguage]]:
    """Run every language through the model once, up to the last MLP; the head is never run.

    Args:
        body: the model below its head; takes `input_ids` and `use_cache`.
        mlps: the MLP of each decoder layer, in order; dense or expanded.
        documents: language -> documents as ids, each run alone, in the order in which they are to be used.
        groups: language -> `old` or `new`.
        tokens_per_language: stop there, or where the documents end.
        skipped_ids: ids whose states do not count, such as special tokens.
        max_length: of a document; the rest of a longer one is left out.
        batch_tokens: positions of a batch, padding included.
        told: takes a line of progress for each language.

    Raises:
        ValueError: a language without tokens, or states that are not finite.
    """
    device = next(body.parameters()).device
    skipped = torch.tensor(sorted(set(skipped_ids)), dtype=torch.int64, device=device)
    vectors, measured = {}, {}
    was_training = body.training
    body.eval()
    try:
        for language, texts in documents.items():
            digest, count, left, found = hashlib.sha256(), 0, tokens_per_language, None
            for ids_BT, real_BT in _batches(texts, max_length, batch_tokens):
                ids_BT = ids_BT.to(device)
                counted_BT = real_BT.to(device) & ~torch.isin(ids_BT, skipped)
                counted_BT &= (counted_BT.flatten().cumsum(0) <= left).view(counted_BT.shape)
                found = _run(body, mlps, ids_BT, counted_BT, found, language)
                for row_T, length in zip(ids_BT.tolist(), real_BT.sum(1).tolist(), strict=True):
                    digest.update(json.dumps(row_T[:length]).encode())
                count, left = count + len(ids_BT), left - int(counted_BT.sum())
                if left <= 0:
                    break
            if found is None or left == tokens_per_language:
                raise ValueError(f"Language {language!r} has no token to measure. Give it text.")
            vectors[language] = found
            tokens = tokens_per_language - left
            measured[language] = MeasuredLanguage(
                groups[language], tokens, count, int(found.zeros_L.sum()), digest.hexdigest()
            )
            told(f"Similarity: {language} measured on {tokens:,} tokens of {count:,} documents.")
    finally:
        body.train(was_training)
    return vectors, measured


def aggregate(
    means: dict[str, Tensor], groups: dict[str, str], measured: dict[str, MeasuredLanguage] | None = None, **about
) -> SimilarityReport:
    """All pairs, and the aggregate of each layer, from mean unit vectors.

    Args:
        means: language -> (L, H) mean unit vectors.
        groups: language -> `old` or `new`.
        measured: what was measured, for the report.
        about: model, seed, tokens_per_language, skip_special_tokens, for the report.

    Raises:
        ValueError: no new or no old language.
    """
    new, old = ([name for name in means if groups[name] == group] for group in ("new", "old"))
    if not new or not old:
        raise ValueError(
            f"Similarity compares new languages with old ones, but there are {len(new)} new and {len(old)} old. Name both."
        )

    def cosine_L(a: str, b: str) -> Tensor:
        return (means[a].double() * means[b].double()).sum(-1)

    of_new = {f"{a}-{b}": cosine_L(a, b) for a, b in combinations(new, 2)}
    of_both = {f"{a}-{b}": cosine_L(a, b) for a in new for b in old}
    new_old_L = torch.stack(list(of_both.values())).mean(0)
    new_new_L = torch.stack(list(of_new.values())).mean(0) if of_new else None
    total_L = new_old_L if new_new_L is None else (new_new_L + new_old_L) / 2
    return SimilarityReport(
        pairs={name: value_L.tolist() for name, value_L in {**of_new, **of_both}.items()},
        new_new=None if new_new_L is None else new_new_L.tolist(),
        new_old=new_old_L.tolist(),
        similarity=total_L.tolist(),
        languages=measured or {},
        **about,
    )


def _batches(texts: Iterable[Sequence[int]], max_length: int, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, whether they are real) of documents padded on the right, in their order."""
    waiting: list[Sequence[int]] = []
    for text in texts:
        text = text[:max_length]
        longest = max([len(text), *map(len, waiting)])
        if waiting and longest * (len(waiting) + 1) > batch_tokens:
            yield _padded(waiting)
            waiting = []
        if len(text):
            waiting.append(text)
    if waiting:
        yield _padded(waiting)


def _padded(texts: list[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, texts))
    ids_BT = torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text)] = torch.as_tensor(text)
    return ids_BT, torch.arange(width) < torch.tensor([len(text) for text in texts])[:, None]


class _PastLastMlp(Exception):
    """Everything has been seen: the rest of the forward is not needed."""


def _run(body, mlps, ids_BT: Tensor, counted_BT: Tensor, found: UnitVectors | None, language: str) -> UnitVectors:
    """One batch, added to what was found before; None begins anew."""
    holder = [found]

    def see(layer: int, states_BTH: Tensor) -> None:
        if holder[0] is None:
            holder[0] = UnitVectors(language, len(mlps), states_BTH.shape[-1], states_BTH.device)
        holder[0].add(layer, states_BTH.reshape(-1, states_BTH.shape[-1])[counted_BT.flatten()])

    with torch.no_grad(), _seeing(mlps, see):
        try:
            body(input_ids=ids_BT, use_cache=False)
        except _PastLastMlp:
            pass
    holder[0].check()
    return holder[0]


@contextmanager
def _seeing(mlps: Sequence[nn.Module], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Show the input of every MLP, and end the forward at the last one."""

    def hook(layer: int):
        def before(module: nn.Module, arguments: tuple, keywords: dict) -> None:
            see(layer, arguments[0] if arguments else keywords["hidden_states"])
            if layer == len(mlps) - 1:
                raise _PastLastMlp

        return before

    handles = [mlp.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer, mlp in enumerate(mlps)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
