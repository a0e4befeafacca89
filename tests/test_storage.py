"""Files and folders have their names when they are whole; a disk that does not take them is told in one way."""

import os
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from lit_llm.callbacks.append_only import append_lines, whole_lines
from lit_llm.checkpoint_io import StreamedCheckpointIO, read_checkpoint
from lit_llm.storage import CannotWrite, complete_file, complete_folder, remove_leftovers, write_atomically


@contextmanager
def files_of_at_most(size: int):
    """The system takes no more than so many bytes of a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def of_torch(file):
    StreamedCheckpointIO().save_checkpoint({"weights": torch.ones(50_000)}, file)


def of_safetensors(file):
    with complete_file(file) as partial:
        save_file({"weights": torch.ones(50_000)}, partial)


def of_text(file):
    write_atomically(file, "x" * 200_000)


@pytest.mark.parametrize("write", [of_torch, of_safetensors, of_text])
def test_a_disk_that_is_full_in_the_middle_leaves_what_was_there_and_is_named(write, tmp_path):
    file = tmp_path / "file"
    file.write_text("before")
    with files_of_at_most(10_000), pytest.raises(CannotWrite, match=r"file could not be written: .*free there"):
        write(file)
    assert file.read_text() == "before" and os.listdir(tmp_path) == ["file"]


def test_a_line_that_is_not_taken_whole_is_an_error_and_is_cut_off_later(tmp_path):
    file = tmp_path / "metrics.csv"
    append_lines(file, "a,b\n")
    with files_of_at_most(7), pytest.raises(CannotWrite, match="metrics.csv"):
        append_lines(file, "1,22222222\n")
    assert whole_lines(file) == ["a,b"]
    append_lines(file, "3,4\n")
    assert whole_lines(file) == ["a,b", "3,4"]


def test_an_error_of_the_block_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="ours"), complete_folder(tmp_path / "folder"):
        raise RuntimeError("ours")
    assert os.listdir(tmp_path) == []


def test_a_folder_is_replaced_at_once_and_is_whole_if_that_fails(tmp_path, monkeypatch):
    folder, seen = tmp_path / "model", []
    for version in "12":
        with complete_folder(folder) as scratch:
            (scratch / "weights").write_text(version)
    assert (folder / "weights").read_text() == "2" and os.listdir(tmp_path) == ["model"]
    monkeypatch.setattr("lit_llm.storage.rmtree", lambda path, **_: seen.append(path))
    with complete_folder(folder) as scratch:
        (scratch / "weights").write_text("3")
    # nothing is ever removed piece by piece under the final name
    assert (folder / "weights").read_text() == "3" and folder not in seen and seen


def test_what_killed_processes_had_begun_is_taken_away_and_nothing_else(tmp_path):
    for name in (".last.ckpt.17.partial", "last.ckpt", ".hidden"):
        (tmp_path / name).write_text("")
    (tmp_path / ".model.x.partial").mkdir()
    remove_leftovers(tmp_path, "model")
    assert sorted(os.listdir(tmp_path)) == [".hidden", ".last.ckpt.17.partial", "last.ckpt"]
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "last.ckpt"]


def test_what_a_library_leaves_beside_its_file_when_it_is_killed_goes_with_it(tmp_path):
    file = tmp_path / "weights.safetensors"
    if (killed := os.fork()) == 0:
        with complete_file(file) as partial:  # safetensors writes to a name of its own in the same folder
            (partial.parent / ".tmpAbCdEf").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(killed, 0)
    assert len(os.listdir(tmp_path)) == 1
    remove_leftovers(tmp_path, file.name)
    assert not os.listdir(tmp_path)


def test_one_flipped_bit_anywhere_in_the_tensors_of_a_checkpoint_is_noticed(tmp_path):
    file = tmp_path / "last.ckpt"
    StreamedCheckpointIO().save_checkpoint({"lit_llm": {}, "state_dict": {"w": torch.zeros(1000)}}, file)
    read_checkpoint(file, verify=True)
    good = file.read_bytes()
    at = good.index(bytes(400))  # within the zeros
    file.write_bytes(good[: at + 200] + b"\x01" + good[at + 201 :])
    with pytest.raises(ValueError, match=r"(?s)last.ckpt is damaged.*start anew"):
        read_checkpoint(file, verify=True)
