"""Fixtures that several folders of tests share."""

from __future__ import annotations

import json
import os

import datasets  # noqa: F401  now: its log writes to the stderr that it first sees, and that of a test would be closed later
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from lit_llm.storage import write_atomically
from tests import processes, tiny

# Tests that run side by side share the cores; so do the processes that they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

processes.preload()

# A busy machine is slow, not wrong.
settings.register_profile("lit_llm", deadline=None)
settings.load_profile("lit_llm")


@pytest.fixture(scope="session")
def byte_level_tokenizer():
    """Byte-level BPE with 360 tokens; see `tests.tiny`."""
    return tiny.byte_level_tokenizer()


@pytest.fixture(scope="session")
def sentencepiece_tokenizer():
    """BPE with `▁` for spaces and byte fall-back; see `tests.tiny`."""
    return tiny.sentencepiece_tokenizer()


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Does minutes of work once for all processes that tests are distributed to: `once(name, work)` is what it returns, as JSON."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def found(name, work):
        file = folder / f"{name}.json"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                write_atomically(file, json.dumps(work()))
        return json.loads(file.read_text())

    return found


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Tests leave the user's cache alone, and find nothing in it that they did not make."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LIT_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _no_seed_of_another_test(monkeypatch):
    """`seed_everything` leaves its number in the environment, where data modules look for it."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that is all pip knows, and an empty cache."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("LIT_LLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"
