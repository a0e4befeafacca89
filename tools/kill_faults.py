"""Processes that are killed at random moments: of training, of writing a teacher store, of exporting, of writing edits.

Each fault is a generator of results, one for each kill: {"during": what was being written, "lost": what was lost}. It goes on
in the folder that it left, so it may be interrupted itself.
"""

from __future__ import annotations

import itertools
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from forked import Ended, Process, lit_llm
from whole_files import begun, check_run, logged_step, model_tensors

from lit_llm.checkpoint_io import read_checkpoint
from lit_llm.data.shard_files import readable, whole_tensors
from lit_llm.editing.deltas import EditSet
from lit_llm.editing.edit_cache import CachedEdit
from lit_llm.editing.fact_text import FactText
from lit_llm.models.language_model import ModelSpec
from lit_llm.training_cli import TrainingCLI
from tests.tiny_runs import store_options, tiny_config, write_rows

Results = Iterator[dict[str, Any]]
STEPS, EVERY = 30, 3
NEWEST = "checkpoints/last.ckpt"


def kill_training(place: Path, random: Random) -> Results:
    """SIGKILL at any moment of `fit`, resumed with `--ckpt_path last` until the run is through, again and again."""
    yield from _ended_training(place, random, signal.SIGKILL)


def terminate_training(place: Path, random: Random) -> Results:
    """SIGTERM at any moment of `fit`, likewise."""
    yield from _ended_training(place, random, signal.SIGTERM)


def _ended_training(place: Path, random: Random, number: int) -> Results:
    config = place / "kd.yaml"
    if not config.exists():
        tiny_config(place, "kd", max_steps=STEPS, val_check_interval=10)
    fit = ["fit", f"--config={config}", f"--checkpoint.every_n_train_steps={EVERY}"]
    whole, seconds = undisturbed(place, [*fit, f"--run.root={place / 'undisturbed'}"])
    runs = place / "disturbed"
    while True:
        goes_on = bool(list(runs.glob(f"kd/*/{NEWEST}")))
        command = [*fit, f"--run.root={runs}", *(["--ckpt_path=last"] if goes_on else [])]
        end = Process(lit_llm(*command), place / "log").end(after=random.uniform(0, seconds), number=number)
        if end.status == 0:
            check_run(newest(runs))
            assert_same(weights_of(newest(runs)), whole)
            shutil.rmtree(runs)
            seconds = min(seconds, end.seconds)  # else most runs would be through before they are killed
            continue
        yield _after(runs, end, number)


def _after(runs: Path, end: Ended, number: int) -> dict[str, Any]:
    """What is lost; nothing is half-written."""
    if end.status not in (-number, 128 + number):
        raise AssertionError(f"ended with {end.status}: {end.said[-2000:]}")
    if end.status == 143 and not list(runs.glob(f"kd/*/{NEWEST}")):
        return {"during": "before the first step", "lost": "0 steps"}
    if not runs.exists() or not list(runs.glob("kd/*")):
        return {"during": "start", "lost": "0 steps"}
    folder = newest(runs)
    check_run(folder)
    lost = lost_steps(folder)
    if lost > (EVERY if number == signal.SIGKILL or end.status == -number else 0):
        raise AssertionError(f"{lost} steps are lost; a checkpoint was due every {EVERY}")
    return {"during": ", ".join(map(kind_of, begun(folder))) or "nothing written", "lost": f"{lost} steps"}


def lost_steps(folder: Path) -> int:
    """Steps that are logged and in no checkpoint."""
    saved = read_checkpoint(folder / NEWEST)["global_step"] if (folder / NEWEST).exists() else 0
    return max(logged_step(folder) - saved, 0)


def kill_store(place: Path, random: Random) -> Results:
    """SIGKILL at any moment of `cache_teacher`, until the store is complete; what is there stays as it is."""
    config = place / "kd.yaml"
    if not config.exists():
        tiny_config(place, "kd")
        write_rows(place / "train.jsonl", 400)
    settings = store_options(place, shard_rows=60)
    call = ["cache_teacher", f"--config={config}", f"--run.root={place / 'runs'}", *settings]
    store, whole = place / "store", place / "whole"
    seconds = (
        _seconds(place, lambda: TrainingCLI.run(call)) if not whole.exists() else float((place / "seconds").read_text())
    )
    if not whole.exists():
        store.rename(whole)
    wanted = {file.relative_to(whole): _content(file) for file in sorted(whole.rglob("shard-*.safetensors"))}
    while True:
        before = {file: file.stat().st_mtime_ns for file in store.rglob("shard-*.safetensors")}
        end = Process(lambda: TrainingCLI.run(call), place / "log").end(after=random.uniform(0, seconds))
        files = sorted(store.rglob("shard-*.safetensors"))
        for file in files:
            assert _content(file) == wanted[file.relative_to(store)], file
        assert all(file.stat().st_mtime_ns == time for file, time in before.items()), (
            "a finished shard was written again"
        )
        if end.status == 0:
            assert len(files) == len(wanted), f"{len(files)} of {len(wanted)} shards"
            shutil.rmtree(store)
            seconds = min(seconds, end.seconds)
            continue
        assert end.killed, end.said[-2000:]
        shards = len(list(store.rglob(".shard-*.partial")))
        yield {"during": "a shard" if shards else "nothing written", "lost": f"{min(shards, 1)} shards"}


def _content(file: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Of a shard, compared with its check sum; safetensors writes the keys of its header in any order."""
    with readable(file) as shard:
        tensors = whole_tensors(shard, file)
        return dict(shard.metadata()), {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def kill_export(place: Path, random: Random) -> Results:
    """SIGKILL of a process that exports one model after the other to the same folder."""
    folder = place / "exported"
    if not (place / "student").exists():
        tiny_config(place, "sft")
    work = lambda: _export_for_ever(place / "student", folder)  # noqa: E731
    yield from _overwritten(folder, random, work, lambda: _one(folder))


def kill_edits(place: Path, random: Random) -> Results:
    """SIGKILL of a process that writes one set of edits after the other to the same file."""
    file = place / "edits.safetensors"
    yield from _overwritten(file, random, lambda: _write_edits_for_ever(file), lambda: _one_edit_set(file))


def _overwritten(target: Path, random: Random, work, version) -> Results:
    """Kill what writes version after version under one name, and see that one whole version is there."""
    place = target.parent
    while True:
        before, process = _stamp(target), Process(work, place / "log")
        while _stamp(target) == before and process.running:
            time.sleep(0.002)
        end = process.end(after=process.seconds + random.uniform(0, 1.5))
        assert end.killed, end.said[-2000:]
        found, parts = version(), begun(place)
        for part in place.glob(".*.partial"):
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        yield {"during": "writing" if parts else "nothing written", "lost": "nothing" if found else "no version there"}


def _stamp(path: Path) -> tuple[int, int] | None:
    """Tells one file or folder of a name from another."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_mtime_ns


def _export_for_ever(source: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    model = ModelSpec(source=str(source)).load()
    for version in itertools.count(1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(version)
        model.save(folder)


def _one(folder: Path) -> bool:
    """Whether a model is there; all of it is of one version."""
    if not folder.exists():
        return False
    values = {float(value) for name, tensor in model_tensors(folder).items() for value in tensor.unique()}
    assert len(values) == 1, f"{folder} holds parts of {len(values)} models"
    return True


def _write_edits_for_ever(file: Path) -> None:
    for version in itertools.count(1):
        edits = []
        for number in range(20):
            texts = [{"en": text.format(number)} for text in ("Land {}", "The capital of Land {} is", "Töwn {}")]
            values = {layer: torch.full((2000,), float(version)) for layer in (1, 2)}
            neurons = {layer: torch.arange(2000) for layer in (1, 2)}
            edits.append(CachedEdit(FactText(f"edit-{number}", *texts, relation="capital"), neurons, values))
        EditSet("base", edits).save(file)


def _one_edit_set(file: Path) -> bool:
    if not file.exists():
        return False
    edits = list(EditSet.load(file))
    versions = {float(value) for edit in edits for values in edit.values.values() for value in values.unique()}
    assert len(edits) == 20 and len(versions) == 1, f"{len(edits)} edits of {len(versions)} versions"
    return True


def undisturbed(place: Path, command: list[str]) -> tuple[dict[str, torch.Tensor], float]:
    """Weights of a run that nobody disturbs, and the seconds that it takes."""
    folder = place / "undisturbed"
    if not (place / "seconds").exists():
        shutil.rmtree(folder, ignore_errors=True)
        _seconds(place, lit_llm(*command))
    return weights_of(newest(folder)), float((place / "seconds").read_text())


def _seconds(place: Path, work: Callable[[], object]) -> float:
    end = Process(work, place / "log").end()
    assert end.status == 0, end.said[-2000:]
    (place / "seconds").write_text(str(end.seconds))
    return end.seconds


def newest(runs: Path) -> Path:
    return max(runs.glob("kd/version_*"), key=lambda folder: int(folder.name.partition("_")[2]))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    saved = read_checkpoint(folder / NEWEST)["state_dict"]
    exported = model_tensors(folder / "model")
    return {**saved, **{f"model: {name}": value for name, value in exported.items()}}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    assert not different, f"{len(different)} tensors differ from those of the undisturbed run, e.g. {different[0]}"


def kind_of(name: str) -> str:
    if name.endswith(".ckpt"):
        return "a checkpoint"
    return {"model": "the exported model"}.get(name, name)
