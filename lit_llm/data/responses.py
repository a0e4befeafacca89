"""A model's answers to the prompts of a data set, written so that a killed run goes on where it stopped.

Answers grow in `NAME.partial`: a first line that says what they were made with, then one line for each answer, in batches.
When all are there, `NAME` appears with the columns prompt, response and reference, and `NAME.manifest.json` beside it.
Sequence-level distillation trains on such a file (arXiv 1606.07947).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lit_llm.storage import write_atomically


class ResponseFile:
    """Answers on disk, by the index of their prompt.

    Args:
        path: the `.jsonl` file that will hold the finished rows.
        manifest: what the answers depend on: names, settings and hashes, as JSON can hold them.

    Raises:
        ValueError: the name does not end in `.jsonl`, or the file or its beginning was made with something else (each
            difference with both values).
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        if path.suffix != ".jsonl":
            raise ValueError(
                f"--to is {path}; answers are written as lines of JSON. Choose a name that ends in .jsonl."
            )
        self.path, self.manifest = path, json.loads(json.dumps(manifest))
        self.partial = path.with_name(path.name + ".partial")
        self.manifest_path = path.with_name(path.name + ".manifest.json")
        self.answers: dict[int, dict[str, Any]] = {}
        if path.exists():
            found = json.loads(self.manifest_path.read_text(encoding="utf-8")) if self.manifest_path.exists() else {}
            self._check(found, path)
        elif self.partial.exists():
            self._read_partial()

    @property
    def complete(self) -> bool:
        """Whether the finished file is there, made with the same settings."""
        return self.path.exists()

    def append(self, answers: dict[int, dict[str, Any]]) -> None:
        """Write the answers of one batch and see that they reach the disk.

        Args:
            answers: index of the prompt -> fields `response` and `finished`.
        """
        lines = [json.dumps({"index": index, **answer}, ensure_ascii=False) for index, answer in answers.items()]
        if not self.partial.exists():
            write_atomically(self.partial, json.dumps(self.manifest) + "\n")
        with self.partial.open("ab") as file:
            file.write("".join(line + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
        self.answers.update(answers)

    def finish(self, rows: list[dict[str, Any]]) -> None:
        """Give the finished rows and the manifest their names, and remove the beginning."""
        write_atomically(self.manifest_path, json.dumps(self.manifest, indent=1) + "\n")
        write_atomically(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.partial.unlink(missing_ok=True)

    def _read_partial(self) -> None:
        content = self.partial.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # a killed process left half a line
            os.truncate(self.partial, len(whole))
        header, *lines = whole.decode().split("\n")[:-1] or ["{}"]
        self._check(json.loads(header), self.partial)
        for line in lines:
            answer = json.loads(line)
            self.answers[answer.pop("index")] = answer

    def _check(self, found: dict[str, Any], path: Path) -> None:
        differing = [key for key in {**found, **self.manifest} if found.get(key) != self.manifest.get(key)]
        if differing:
            raise ValueError(
                f"{path} was made with other settings:\n"
                + "\n".join(f"  {key}: there {found.get(key)!r}, now {self.manifest.get(key)!r}" for key in differing)
                + "\n  Choose another name with --to, repeat those settings, or remove the file."
            )


def plan_batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Prompts by length, the longest first, in batches; depends on nothing else, so that a resumed run has the same."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def batch_seed(seed: int, first_index: int) -> int:
    """The seed of the batch that begins with a prompt, whatever was answered before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{first_index}".encode()).digest()[:4], "big")


def content_hash(parts: Any) -> str:
    """Names a JSON-like value by what it holds."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
