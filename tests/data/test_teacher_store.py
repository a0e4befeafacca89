"""What a teacher store writes, refuses to mix up, and reads back."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_llm.data.batch import SparseTargets, TokenBatch, collate_tokens
from lit_llm.data.teacher_store import UNKNOWN, StoredPart, TeacherStore, encode_hidden, encode_top_k
from lit_llm.data.tokenized import Encoding, TokenizedSet, tokenize_rows
from tests.tiny import byte_level_tokenizer, sentencepiece_tokenizer
from tests.tiny_runs import tiny_config, write_rows

ROWS = [{"prompt": f"Say {i}.", "response": f"The number is {i}, " + "and so on " * (i % 5)} for i in range(23)]
RULES = Encoding("plain", None, "auto", "answers", 64, 32, "keep_end", "cut", "bytes")
TABLE_VE = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
ROOT = Path(__file__).parents[2]


def tokenized(teacher=None, rows=ROWS) -> TokenizedSet:
    table = datasets.Dataset.from_list(rows)
    return tokenize_rows(table, RULES, byte_level_tokenizer(), teacher, workers=0, name="rows")


def states(tokens: TokenBatch) -> torch.Tensor:
    """Stands for a body: a row depends on the token at its position and on the place within its sequence."""
    length = tokens.ids_BL.shape[1]
    ids_T = tokens.ids_BL.flatten()[tokens.position_T]
    return TABLE_VE[ids_T] + (tokens.position_T % length)[:, None]


class Writer:
    """Writes a part and remembers for which examples the teacher was asked."""

    def __init__(self, part: StoredPart, dtype: str = "float32", dies_at: int | None = None) -> None:
        self.part, self.dtype, self.asked, self.dies_at = part, dtype, [], dies_at

    def __call__(self, examples: list[int]):
        if self.dies_at is not None and len(self.asked) >= self.dies_at:
            raise KeyboardInterrupt
        self.asked += examples
        hidden_NE = states(self.part.tokens(examples, pad_id=0))
        return (
            encode_top_k(hidden_NE.log_softmax(-1), 3) if self.dtype == "top" else encode_hidden(hidden_NE, self.dtype)
        )

    def fill(self, **settings) -> list[int]:
        self.part.begin()
        return self.part.fill(self, batch_size=3, **settings)


def part_in(folder: Path, examples: TokenizedSet, **binding) -> StoredPart:
    return StoredPart(folder / "train", examples, {"teacher.weights": "abc", **binding}, shard_rows=60)


def filled(folder: Path, examples: TokenizedSet, dtype: str = "float32") -> StoredPart:
    part = part_in(folder, examples)
    Writer(part, dtype).fill()
    part.finish(hidden_dtype="float32")
    return part


@pytest.mark.parametrize("two_tokenizers", [False, True])
def test_any_examples_are_read_back_in_the_order_in_which_a_batch_has_them(tmp_path, two_tokenizers):
    examples = tokenized(sentencepiece_tokenizer() if two_tokenizers else None)
    filled(tmp_path, examples)
    again = part_in(tmp_path, examples)
    assert again.is_complete and len(again.shards) > 3
    side = "teacher" if two_tokenizers else "student"
    for wanted in ([3], [0, 22, 7, 7], list(range(23))):
        rows = [examples[example] for example in wanted]
        batch = collate_tokens([row[f"{side}_ids"] for row in rows], [row[f"{side}_prompt"] for row in rows], 0)
        assert torch.equal(again.read(wanted), states(batch))


def test_every_example_is_asked_for_once_and_a_complete_part_asks_nothing(tmp_path):
    examples = tokenized()
    writer = Writer(part_in(tmp_path, examples))
    writer.fill()
    assert sorted(writer.asked) == list(range(23))
    assert writer.part.fill(writer, batch_size=3) == []
    assert sorted(writer.asked) == list(range(23))


def test_a_part_is_complete_only_when_its_manifest_is_closed(tmp_path):
    part = part_in(tmp_path, tokenized())
    assert not part.is_complete
    Writer(part).fill()
    assert not part.missing() and not part.is_complete
    part.finish(hidden_dtype="float32")
    assert part.is_complete


def test_two_ranks_write_disjoint_shards_that_make_the_same_part_as_one(tmp_path):
    examples = tokenized()
    alone = filled(tmp_path / "one", examples)
    parts = [part_in(tmp_path / "two", examples) for _ in range(2)]
    wrote = [Writer(part).fill(rank=rank, world_size=2) for rank, part in enumerate(parts)]
    assert set(wrote[0]).isdisjoint(wrote[1]) and len(wrote[0]) + len(wrote[1]) == len(alone.shards)
    facts = parts[0].finish(hidden_dtype="float32")
    assert facts == alone.written
    assert torch.equal(parts[1].read(range(23)), alone.read(range(23)))


def test_a_rank_that_does_not_see_the_shards_of_the_others_says_so(tmp_path):
    part = part_in(tmp_path, tokenized())
    Writer(part).fill(rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"lacks \d+ of \d+ shards.*\n.*teacher_store.folder"):
        part.check_whole()


def test_writing_goes_on_after_the_last_complete_shard(tmp_path):
    examples = tokenized()
    part = part_in(tmp_path, examples)
    with pytest.raises(KeyboardInterrupt):
        Writer(part, dies_at=10).fill()
    kept = {file: file.stat().st_mtime_ns for file in part.folder.glob("shard-*")}
    done = [
        example for number, members in enumerate(part.shards) if number not in part.missing() for example in members
    ]
    assert kept and done and part.missing()
    partial = part.folder / f".shard-{part.missing()[0]:05d}.safetensors.123.partial"
    partial.mkdir()  # what a killed process leaves
    (partial / ".tmp1a2b3c").write_bytes(b"half a shard")
    (part.folder / f".{next(iter(kept)).name}.456.partial").mkdir()  # what one leaves that had just finished a shard

    again = part_in(tmp_path, examples)
    writer = Writer(again)
    writer.fill()
    again.finish(hidden_dtype="float32")

    assert set(writer.asked).isdisjoint(done) and sorted(writer.asked + done) == list(range(23))
    assert all(file.stat().st_mtime_ns == time_ns for file, time_ns in kept.items())
    names = {file.name for file in part.folder.iterdir()}
    assert names == {"manifest.json", *(f"shard-{number:05d}.safetensors" for number in range(len(part.shards)))}
    assert torch.equal(again.read(range(23)), filled(tmp_path / "whole", examples).read(range(23)))


def test_a_process_killed_while_writing_loses_at_most_the_shard_that_it_was_at(tmp_path):
    config = tiny_config(tmp_path, "kd")
    rows = write_rows(tmp_path / "many.jsonl", 400)
    options = [f"--data.init_args.train={rows}", f"--model.init_args.teacher_store.folder={tmp_path / 'store'}"]
    options += ["--model.init_args.teacher_store.shard_rows=30", "--model.init_args.teacher_store.batch_size=1"]
    command = [sys.executable, str(ROOT / "tools" / "cache_teacher.py"), "--config", str(config), *options]
    folder = tmp_path / "store" / "train"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(6000):
        if len(list(folder.glob("shard-*"))) >= 3 or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("shard-*")}
    assert 3 <= len(kept) < 150 and "written" not in json.loads((folder / "manifest.json").read_text())
    for file in kept:
        assert load_file(file)  # whole

    done = subprocess.run(command, capture_output=True, text=True, timeout=240)

    assert done.returncode == 0, done.stderr[-2000:]
    assert "written" in json.loads((folder / "manifest.json").read_text())
    assert all(file.stat().st_mtime_ns == time_ns for file, time_ns in kept.items())
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_another_binding_is_refused_naming_both_values(tmp_path):
    examples = tokenized()
    filled(tmp_path, examples)
    with pytest.raises(ValueError, match=re.escape("teacher.weights: store 'abc', config 'xyz'")):
        part_in(tmp_path, examples, **{"teacher.weights": "xyz"})
    with pytest.raises(ValueError, match=r"top_k: store None, config 4"):
        part_in(tmp_path, examples, top_k=4)


def test_other_tokens_are_refused_though_their_number_is_the_same(tmp_path):
    filled(tmp_path, tokenized())
    other = [{**row, "prompt": row["prompt"].replace("Say", "Sat")} for row in ROWS]
    with pytest.raises(ValueError, match="data: store") as refused:
        part_in(tmp_path, tokenized(rows=other))
    assert "examples" not in str(refused.value)


def test_what_is_not_known_here_is_not_compared_but_nothing_is_begun_with_it(tmp_path):
    examples = tokenized()
    filled(tmp_path, examples)
    assert part_in(tmp_path, examples, **{"teacher.weights": UNKNOWN}).is_complete
    with pytest.raises(ValueError, match=r"teacher\.weights cannot be hashed"):
        part_in(tmp_path / "new", examples, **{"teacher.weights": UNKNOWN}).begin()


def test_a_bfloat16_part_is_the_rounded_states_and_reports_the_rounding(tmp_path):
    examples = tokenized()
    part, exact = filled(tmp_path / "b", examples, "bfloat16"), filled(tmp_path / "f", examples)
    assert torch.equal(part.read(range(23)), exact.read(range(23)).bfloat16())
    assert 0 < part.written["errors"]["relative_error"]["largest"] < 2**-8
    assert exact.written["errors"]["relative_error"]["largest"] == 0


def test_int8_errs_by_half_a_step_at_most_and_reports_its_relative_error():
    hidden_NE = torch.randn(50, 16, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 3, 50)[:, None]
    hidden_NE[7] = 0.0
    tensors, measures = encode_hidden(hidden_NE, "int8")
    kept_NE = tensors["hidden"].double() * tensors["scale"].double()[:, None]
    step_N1 = hidden_NE.double().abs().amax(-1, keepdim=True) / 127
    assert tensors["hidden"].dtype == torch.int8
    assert ((kept_NE - hidden_NE).abs() <= 0.5001 * step_N1).all()
    error_N = (kept_NE - hidden_NE).norm(dim=-1) / hidden_NE.double().norm(dim=-1).clamp(min=1e-300)
    torch.testing.assert_close(measures["relative_error"].double(), error_N, rtol=1e-4, atol=1e-7)
    assert measures["relative_error"][7] == 0 and error_N.max() < 0.01


def test_int8_is_read_back_with_its_scales(tmp_path):
    examples = tokenized()
    part, exact = filled(tmp_path / "i", examples, "int8"), filled(tmp_path / "f", examples)
    ours, theirs = part.read([4, 1]), exact.read([4, 1])
    assert ours.dtype == torch.float32
    assert ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max() < 0.01


def test_the_largest_probabilities_are_read_back_as_sparse_targets(tmp_path):
    examples = tokenized()
    part, exact = filled(tmp_path / "t", examples, "top"), filled(tmp_path / "f", examples)
    targets, p_TV = part.read([4, 1]), exact.read([4, 1]).softmax(-1)
    assert isinstance(targets, SparseTargets) and targets.ids_TK.dtype == torch.int64
    assert torch.equal(targets.ids_TK, p_TV.topk(3).indices)
    torch.testing.assert_close(targets.log_p_TK.exp().sum(-1) + targets.log_rest_T.exp(), torch.ones(len(p_TV)))


def test_a_damaged_shard_is_named(tmp_path):
    examples = tokenized()
    part = filled(tmp_path, examples)
    file = part.folder / "shard-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is damaged or missing"):
        part_in(tmp_path, examples).read([part.shards[0][0]])


def test_a_shard_of_another_store_is_not_read_as_ours(tmp_path):
    examples = tokenized()
    part = filled(tmp_path, examples)
    file = part.folder / "shard-00001.safetensors"
    save_file(load_file(file), file, metadata={"key": "other", "measures": "{}"})
    with pytest.raises(ValueError, match="belongs to another store: its key is other"):
        part_in(tmp_path, examples).read([part.shards[1][0]])


def test_a_part_travels_to_a_worker_without_its_open_shards(tmp_path):
    part = filled(tmp_path, tokenized())
    expected = part.read([5, 2])
    sent = pickle.dumps(part)
    assert len(sent) < 20_000
    assert torch.equal(pickle.loads(sent).read([5, 2]), expected)


def test_counts_below_one_are_refused():
    with pytest.raises(ValueError, match=r"teacher_store\.shard_rows is 0"):
        TeacherStore("somewhere", shard_rows=0)
