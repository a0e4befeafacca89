"""What a frozen teacher says about every supervised token of a data set, kept on disk and read memory-mapped.

A store is a folder with one sub-folder for each part (`train`, `validation`). A part is a `manifest.json`, which says
what the numbers depend on, and shards: safetensors files of whole examples, longest examples first. Which example lies
where follows from the data alone, so any number of processes can write, and a shard that exists is never written again.

Shapes: N rows (supervised tokens of the teacher's reading), E the teacher's width, K tokens kept of each distribution.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_llm.data.batch import SparseTargets, TokenBatch, collate_tokens
from lit_llm.data.shard_files import check_sum, readable, whole_tensors
from lit_llm.data.stored_answers import AnswerSet
from lit_llm.data.tokenized import TokenizedSet
from lit_llm.losses.divergence import at_least_float32
from lit_llm.storage import complete_file, remove_leftovers, write_atomically

_FORMAT = 1  # raise it when the meaning of a shard changes
_SECONDS_BETWEEN_LINES = 10.0

UNKNOWN = "unknown"  # in a binding: not known here, and so not compared
Encoded = tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclass
class TeacherStore:
    """Keep what the teacher says on disk: it runs over the data once, and later epochs and runs read.

    The first `fit` writes the training and the validation part; once they are complete the teacher's body is not even
    loaded. Anything that the numbers depend on is compared first, and a difference is refused.

    Args:
        folder: where; seen by all processes of a run.
        dtype: of the hidden states: `bfloat16`, `float32`, or `int8` with one scale per token.
        top_k: keep only so many of the largest probabilities of each training token, and the mass of the rest, instead
            of hidden states; for KD with forward_kl. None: hidden states.
        batch_size: examples at a time while writing.
        shard_rows: tokens of a shard; a kill during writing loses at most the shard that each process was at.
    """

    folder: str
    dtype: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    top_k: Optional[int] = None
    batch_size: int = 16
    shard_rows: int = 32768

    def __post_init__(self) -> None:
        if Path(self.folder).exists() and not Path(self.folder).is_dir():
            raise ValueError(f"teacher_store.folder is {self.folder!r}, which is a file. Name a folder.")
        for name in ("top_k", "batch_size", "shard_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"teacher_store.{name} is {value}; it counts things and must be at least 1.")

    def refuse_divided(self) -> None:
        """Asked where a strategy is to divide frozen models.

        Raises:
            ValueError: always: each process fills its share of a store alone.
        """
        raise ValueError(
            f"model.teacher_store.folder is {self.folder!r} and strategy.divide_frozen is true, but a store is filled by whole "
            f"models, and what it was filled from is let go. Leave one of the two out."
        )


class StoredPart:
    """One part of a store: plans it, writes it, reads it. Cheap to pickle; shards are opened where they are read.

    Args:
        folder: of this part.
        examples: the tokenised part, or answers of its pairs.
        binding: what the numbers depend on beside the data: name -> value that JSON can hold. `UNKNOWN` ones are not
            compared.
        shard_rows: rows of a shard, for a part that does not exist yet.

    Raises:
        ValueError: the folder holds a part with another binding (each difference with both values).
    """

    def __init__(
        self, folder: Path, examples: TokenizedSet | AnswerSet, binding: dict[str, Any], shard_rows: int
    ) -> None:
        self.folder, self._examples = Path(folder), examples
        digest, lengths, rows = teacher_side(examples)
        counts = {"data": digest, "examples": len(lengths), "rows": int(rows.sum())}
        self.binding = {"format": _FORMAT, "part": self.folder.name, **binding, **counts}
        found = self._found()
        if found is not None:
            _check(self.folder, found["binding"], self.binding)
        self._shard_rows = shard_rows if found is None else found["shard_rows"]
        self._place(lengths, rows)
        self._open: dict[int, dict[str, Tensor]] = {}

    def _place(self, lengths: np.ndarray, rows: np.ndarray) -> None:
        """Longest examples first, so that memory runs out at the start or never; shards are cut between examples."""
        order = np.argsort(-lengths, kind="stable")
        shards, current, filled = [], [], 0
        for example in order.tolist():
            if current and filled + rows[example] > self._shard_rows:
                shards.append(current)
                current, filled = [], 0
            current.append(example)
            filled += rows[example]
        self.shards: list[list[int]] = [*shards, current]
        self._rows = rows
        self._shard_of, self._start_of = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        for number, members in enumerate(self.shards):
            self._shard_of[members] = number
            self._start_of[members] = np.cumsum(rows[members]) - rows[members]

    # ---------------------------------------------------------------- state

    @property
    def is_complete(self) -> bool:
        """Whether every shard is there and the manifest was closed."""
        found = self._found()
        return found is not None and "written" in found and not self.missing()

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there."""
        names = {path.name for path in self.folder.glob("shard-*.safetensors")} if self.folder.is_dir() else set()
        return [number for number in range(len(self.shards)) if self._file(number).name not in names]

    @property
    def written(self) -> dict[str, Any]:
        """What the manifest says about a complete part: bytes, dtype of the live states, errors."""
        return self._found()["written"]

    def _found(self) -> dict[str, Any] | None:
        manifest = self.folder / "manifest.json"
        if not manifest.is_file():
            return None
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
            if isinstance(found["binding"], dict) and isinstance(found["shard_rows"], int):
                return found
            why = "it lacks what a manifest says"
        except (ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{manifest} is no manifest of a teacher store ({why}).\n  Delete the folder {self.folder}; the next run writes it "
            f"anew. Or name another model.teacher_store.folder."
        )

    def _file(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    @cached_property
    def _key(self) -> str:
        """In every shard: a manifest that was exchanged by hand does not make foreign shards ours."""
        return hashlib.sha256(json.dumps(self._found()["binding"], sort_keys=True).encode()).hexdigest()[:32]

    # -------------------------------------------------------------- writing

    def begin(self) -> None:
        """Write the manifest, unless it is there.

        Raises:
            ValueError: something in the binding is not known here, so what is written could not be recognised.
        """
        if unknown := [name for name, value in self.binding.items() if value == UNKNOWN]:
            raise ValueError(
                f"The teacher store {self.folder} cannot be written: {', '.join(unknown)} cannot be hashed, for the files "
                "were not found on this machine. Name a local folder with config.json and safetensors as the teacher."
            )
        if self._found() is None:
            content = {"binding": self.binding, "shard_rows": self._shard_rows}
            write_atomically(self.folder / "manifest.json", json.dumps(content, indent=2) + "\n")

    def fill(
        self, encode: Callable[[list[int]], Encoded], *, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[int]:
        """Write this process's share of the shards that are missing.

        Args:
            encode: examples -> (tensors with one row per supervised token, measures of each row), see `encode_hidden`.
            batch_size: examples at a time.
            rank: this process.
            world_size: processes that write.

        Returns:
            Numbers of the shards that were written.
        """
        from filelock import FileLock

        share, missing = range(rank, len(self.shards), world_size), set(self.missing())
        wanted, progress = [number for number in share if number in missing], _Progress(self, rank, world_size)
        for number in wanted:
            with FileLock(self.folder / f".{self._file(number).name}.lock"):
                if not self._file(number).exists():  # another run may write here too
                    self._write(number, encode, batch_size, progress)
        return wanted

    def _write(self, number: int, encode, batch_size: int, progress: _Progress) -> None:
        from safetensors.torch import save_file

        members, pieces, totals = self.shards[number], [], {}
        for start in range(0, len(members), batch_size):
            batch = members[start : start + batch_size]
            tensors, measures = encode(batch)
            pieces.append({name: tensor.cpu() for name, tensor in tensors.items()})
            for name, value_N in measures.items():
                total, largest = totals.get(name, (0.0, 0.0))
                totals[name] = total + value_N.cpu().double().sum().item(), max(largest, value_N.max().item())
            progress.advance(int(self._rows[batch].sum()))
        whole = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        expected = int(self._rows[members].sum())
        if any(len(tensor) != expected for tensor in whole.values()):
            raise ValueError(f"Shard {number} has {expected} rows, but {[len(t) for t in whole.values()]} were given.")
        file = self._file(number)
        remove_leftovers(self.folder, file.name)  # of a process that was killed; we hold the lock
        with complete_file(file) as partial:
            metadata = {"key": self._key, "measures": json.dumps(totals), "crc32": check_sum(whole)}
            save_file(whole, partial, metadata=metadata)
            partial.chmod(0o644)  # safetensors writes files that only their owner may read

    def check_whole(self) -> None:
        """See that every process finds the shards of all others.

        Raises:
            ValueError: shards are missing.
        """
        if missing := self.missing():
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of {len(self.shards)} shards, the first is {self._file(missing[0])}."
                f"\n  All processes must see the same folder: name a shared one in teacher_store.folder."
            )

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Close the manifest of a part whose shards are all there; returns what was added to it.

        Args:
            facts: what else the manifest shall say.

        Raises:
            ValueError: shards are missing.
        """
        self.check_whole()
        remove_leftovers(self.folder)  # of processes that were killed when a shard had got its name
        totals = [json.loads(self._metadata(number)["measures"]) for number in range(len(self.shards))]
        errors = {}
        for name in totals[0]:
            mean = math.fsum(shard[name][0] for shard in totals) / self.binding["rows"]
            errors[name] = {"mean": mean, "largest": max(shard[name][1] for shard in totals)}
        size = sum(self._file(number).stat().st_size for number in range(len(self.shards)))
        written = {"shards": len(self.shards), "bytes": size, "errors": errors, **facts}
        content = {**self._found(), "written": written}
        write_atomically(self.folder / "manifest.json", json.dumps(content, indent=2) + "\n")
        for lock in self.folder.glob(".*.lock"):
            with suppress(FileNotFoundError):
                lock.unlink()
        return written

    def tokens(self, examples: Sequence[int], pad_id: int) -> TokenBatch:
        """The examples as the teacher reads them."""
        side = "teacher" if self._examples.distinct_teacher else "student"
        rows = [self._examples[example] for example in examples]
        return collate_tokens([row[f"{side}_ids"] for row in rows], [row[f"{side}_prompt"] for row in rows], pad_id)

    # -------------------------------------------------------------- reading

    def read(self, examples: Sequence[int]) -> Tensor | SparseTargets:
        """(N, E) hidden states of the examples' supervised tokens, one after the other, or their largest probabilities.

        Raises:
            ValueError: a shard that is damaged, or that belongs to another store.
        """
        pieces = [self._piece(example) for example in examples]
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        if "ids" in joined:
            return SparseTargets(joined["ids"].long(), joined["log_p"], joined["log_rest"])
        if "scale" in joined:
            return joined["hidden"].float() * joined["scale"][:, None]
        return joined["hidden"]

    def _piece(self, example: int) -> dict[str, Tensor]:
        number, start = int(self._shard_of[example]), int(self._start_of[example])
        if number not in self._open:
            self._open[number] = self._mapped(number)
        return {name: tensor[start : start + self._rows[example]] for name, tensor in self._open[number].items()}

    def _mapped(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard as views of the file; all of it is read once, to compare its check sum."""
        with readable(self._file(number)) as shard:
            key = (shard.metadata() or {}).get("key")
            if key != self._key:
                raise ValueError(
                    f"{self._file(number)} belongs to another store: its key is {key}, the manifest's is {self._key}.\n"
                    f"  Delete the folder {self.folder}; the next run writes it anew."
                )
            return whole_tensors(shard, self._file(number))

    def _metadata(self, number: int) -> dict[str, str]:
        with readable(self._file(number)) as shard:
            return shard.metadata()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def read_pairs(self, pairs: tuple[int, ...]) -> Tensor:
        """The same of the stored answers of some pairs, one side after the other."""
        return self.read(self._examples.of(pairs))


def encode_hidden(hidden_NE: Tensor, dtype: Literal["bfloat16", "float32", "int8"]) -> Encoded:
    """Hidden states as they are kept, and the relative error of each row, ||kept - h|| / ||h||.

    int8 is symmetric with one scale per row: the largest entry becomes 127.
    """
    exact_NE = at_least_float32(hidden_NE)
    if dtype == "int8":
        scale_N = (exact_NE.float().abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        kept_NE = (exact_NE.float() / scale_N[:, None]).round().to(torch.int8)
        tensors = {"hidden": kept_NE, "scale": scale_N}
        error_NE = kept_NE * scale_N[:, None] - exact_NE
    else:
        kept_NE = hidden_NE.to(getattr(torch, dtype))
        tensors, error_NE = {"hidden": kept_NE}, kept_NE - exact_NE
    size_N = exact_NE.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return tensors, {"relative_error": error_NE.norm(dim=-1) / size_N}


def encode_top_k(log_p_NV: Tensor, k: int) -> Encoded:
    """The k largest log-probabilities of each row with their ids, best first, and the logarithm of the remaining mass.

    Measures: `rest_mass`; `uniform_tail_error`, what forward KL falls short by when the student spreads the rest evenly.
    """
    log_p_NV = log_p_NV.float()
    top_NK, ids_NK = log_p_NV.topk(k, dim=-1)
    tail_NV = log_p_NV.scatter(-1, ids_NK, -math.inf)
    log_rest_N = tail_NV.logsumexp(-1)
    rest_N, tail_size = log_rest_N.exp(), log_p_NV.shape[-1] - k
    entropy_N = -(tail_NV.exp() * tail_NV.masked_fill(tail_NV == -math.inf, 0.0)).sum(-1)
    shortfall_N = rest_N * (math.log(tail_size) - log_rest_N.masked_fill(rest_N == 0, 0.0)) - entropy_N
    tensors = {"ids": ids_NK.to(torch.int32), "log_p": top_NK, "log_rest": log_rest_N}
    return tensors, {"rest_mass": rest_N, "uniform_tail_error": shortfall_N.clamp(min=0)}


def teacher_side(examples: TokenizedSet | AnswerSet) -> tuple[str, np.ndarray, np.ndarray]:
    """What the teacher reads of a part: a hash of its tokens and prompt lengths, and per example tokens and rows."""
    import pyarrow.compute as pc

    if isinstance(examples, AnswerSet):
        return examples.reading()
    side = "teacher" if examples.distinct_teacher else "student"
    table = examples.table.select_columns([f"{side}_ids", f"{side}_prompt"]).with_format("arrow")
    digest, all_lengths, all_rows = hashlib.sha256(), [], []
    for start in range(0, len(table), 10_000):
        piece = table[start : start + 10_000]
        ids, prompts = piece.column(f"{side}_ids"), piece.column(f"{side}_prompt").to_numpy().astype(np.int64)
        lengths = pc.list_value_length(ids).to_numpy().astype(np.int64)
        for values in (lengths, prompts, pc.list_flatten(ids).to_numpy().astype(np.int64)):
            digest.update(values.tobytes())
        all_lengths.append(lengths)
        all_rows.append(lengths - np.maximum(prompts, 1))
    return digest.hexdigest(), np.concatenate(all_lengths), np.concatenate(all_rows)


def _check(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    unknown = [name for name, value in ours.items() if value == UNKNOWN]
    differing = [name for name in {**theirs, **ours} if name not in unknown and theirs.get(name) != ours.get(name)]
    if differing:
        raise ValueError(
            f"The teacher store in {folder} was written for something else:\n"
            + "\n".join(f"  {name}: store {theirs.get(name)!r}, config {ours.get(name)!r}" for name in differing)
            + "\n  Name another model.teacher_store.folder, set these back, or delete this folder to write it anew."
        )
    if unknown:
        rank_zero_info(
            f"Teacher store {folder}: not compared, for it is not on this machine: "
            + ", ".join(f"{name} ({theirs.get(name)})" for name in unknown)
        )


class _Progress:
    """A line now and then: rows of this process's share, speed, time left."""

    def __init__(self, part: StoredPart, rank: int, world_size: int) -> None:
        missing = set(part.missing())
        self._name, self._done = part.folder, 0
        self._total = sum(
            int(part._rows[part.shards[number]].sum())
            for number in range(rank, len(part.shards), world_size)
            if number in missing
        )
        self._began = self._told = time.monotonic()

    def advance(self, rows: int) -> None:
        self._done += rows
        now = time.monotonic()
        if now - self._told < _SECONDS_BETWEEN_LINES:
            return
        self._told = now
        speed = self._done / (now - self._began)
        left = (self._total - self._done) / speed
        rank_zero_info(
            f"Teacher store {self._name}: {self._done:,} of {self._total:,} tokens ({self._done / self._total:.0%}), "
            f"{speed:,.0f} tokens/s, {left:,.0f} s left"
        )
