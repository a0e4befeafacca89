"""What strangers hand in: good tiny models, rows and configs, and the same broken in every way that we could think of."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.tiny import sentencepiece_tokenizer, tiny_model_folder
from tests.tiny_runs import fit, store_options, tiny_config, write_pairs

ROW = {"prompt": "Name it.", "response": "A cat."}
PAIR = {"prompt": "Name it.", "chosen": "A cat.", "rejected": "A dog."}


class Opened:
    """A pickle that would leave a trace if it were opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def write_all(folder: Path) -> None:
    """Everything that the table of bad inputs names, below one folder."""
    good_configs(folder)
    for part in (broken_rows, broken_configs, broken_models, broken_runs):
        part(folder, folder / "bad")


def good_configs(folder: Path) -> None:
    """`kd.yaml`, and from it one for each other kind of method; all share models and rows."""
    settings = yaml.safe_load(tiny_config(folder, "kd", max_steps=1).read_text())
    settings["model"]["init_args"]["generation"] = {"prompts": 0, "test_prompts": 0}
    settings["trainer"] |= {"val_check_interval": 1, "limit_val_batches": 0}
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    tiny_model_folder(folder / "other", tokenizer=sentencepiece_tokenizer())
    pairs = {part: str(write_pairs(folder / f"{part}_pairs.jsonl", 8)) for part in ("train", "validation", "test")}
    student = {"student": model["student"], "generation": model["generation"]}
    text = folder / "text.txt"
    text.write_text("\n".join(f"Sentence {number} of a language." for number in range(40)))
    groups = {"old": {"en": str(text)}, "new": {"hu": str(text)}}
    configs = {
        "kd": {},
        "sft": {"model": {"class_path": "SFT", "init_args": student}},
        "dskd": {
            "model": {"class_path": "DSKD", "init_args": {**student, "teacher": {"source": str(folder / "other")}}}
        },
        "dpo": {
            "model": {"class_path": "DPO", "init_args": student},
            "data": {"class_path": "Preferences", "init_args": {**data, **pairs}},
        },
        "languages": {
            "model": {"class_path": "SFT", "init_args": student},
            "data": {"class_path": "Languages", "init_args": {"groups": groups, "row_length": 16}},
        },
    }
    for name, changes in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings | changes))


def broken_rows(folder: Path, bad: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    bad.mkdir()
    line, pair = json.dumps(ROW), json.dumps(PAIR)
    written = {
        "empty.jsonl": "",
        "blank.jsonl": "\n\n",
        "words.jsonl": "hello world\n",
        "truncated.jsonl": f"{line}\n{line[:20]}",
        "middle.jsonl": f'{line}\n{{"prompt": broken}}\n{line}\n',
        "mixed.jsonl": f'{line}\n{{"prompt": 3, "response": "x"}}\n',
        "numbers.jsonl": '{"prompt": 1, "response": 2}\n',
        "objects.jsonl": '{"prompt": {"a": 1}, "response": ["x"]}\n',
        "list.jsonl": '["a", "b"]\n',
        "scalars.jsonl": "3\n4\n",
        "targets.jsonl": '{"prompt": "a", "response": ""}\n{"prompt": "b", "response": "  "}\n',
        "nulls.jsonl": '{"prompt": null, "response": null}\n',
        "columns.jsonl": '{"question": "a", "answer": "b"}\n',
        "cut.json": '{"a": [1,',
        "quotes.csv": 'prompt,response\n"a,b\nc,d,e,f\n',
        "table.xlsx": "no spreadsheet",
        "same.jsonl": json.dumps(PAIR | {"rejected": PAIR["chosen"]}) + "\n",
        "no_chosen.jsonl": json.dumps({"prompt": "a", "rejected": "b"}) + "\n",
        "number_pairs.jsonl": json.dumps(PAIR | {"chosen": 1, "rejected": 2}) + "\n",
        "cut_pairs.jsonl": f"{pair}\n{pair[:30]}",
    }
    for name, text in written.items():
        (bad / name).write_text(text)
    (bad / "latin.jsonl").write_bytes(f"{line}\n".replace("cat", "caf\xe9").encode("latin-1"))
    (bad / "utf16.jsonl").write_bytes(f"{line}\n".encode("utf-16"))
    (bad / "plain.jsonl.gz").write_bytes(line.encode())
    packed = gzip.compress(f"{line}\n".encode() * 200)
    (bad / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    parquet.write_table(arrow.table({"prompt": ["a"] * 50, "response": ["b"] * 50}), bad / "cut.parquet")
    whole = (bad / "cut.parquet").read_bytes()
    (bad / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    parquet.write_table(arrow.table({"prompt": ["a"], "response": [b"\x00\xff"]}), bad / "bytes.parquet")
    (bad / "folder").mkdir()


def broken_configs(folder: Path, bad: Path) -> None:
    kd = yaml.safe_load((folder / "kd.yaml").read_text())
    written = {
        "brackets.yaml": "model: {class_path: KD, init_args: [\n",
        "list.yaml": "- model\n- data\n",
        "words.yaml": "just words\n",
        "typo.yaml": yaml.safe_dump({"modle": kd["model"]}),
        "nested_typo.yaml": yaml.safe_dump({"model": {"init_args": {"optimization": {"learning_rate": 1e-3}}}}),
        "null.yaml": "model: {init_args: {kd_weight: null}}\n",
        "null_settings.yaml": "model: {init_args: {optimization: null}}\n",
        "null_section.yaml": "checkpoint: null\n",
        "no_variable.yaml": "data: {init_args: {batch_size: '${vars.rows}'}}\n",
        "itself.yaml": yaml.safe_dump(kd | {"stages": {"first": {"config": ["itself.yaml"]}}}),
        "back.yaml": yaml.safe_dump(kd | {"stages": {"first": {"config": ["forth.yaml"]}}}),
        "forth.yaml": yaml.safe_dump(kd | {"stages": {"second": {"config": ["back.yaml"]}}}),
    }
    for name, text in written.items():
        (bad / name).write_text(text)
    (bad / "binary.yaml").write_bytes(bytes(range(128, 256)))


def broken_models(folder: Path, bad: Path) -> None:
    """Copies of the student, each with one thing wrong."""

    def copy(name: str, leave_out: tuple[str, ...] = (), **config) -> Path:
        place = bad / name
        shutil.copytree(folder / "student", place, ignore=shutil.ignore_patterns(*leave_out))
        if config:
            file = place / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return place

    copy("no_config", leave_out=("config.json",))
    (copy("broken_config") / "config.json").write_text('{"model_type": ')
    (copy("list_config") / "config.json").write_text("[1, 2]")
    copy("unknown_type", model_type="gpt17")
    copy("other_shape", n_embd=32)
    copy("more_layers", n_layer=3)
    copy("no_weights", leave_out=("*.safetensors",))
    copy("no_tokenizer", leave_out=("tokenizer*",))
    (copy("broken_tokenizer") / "tokenizer.json").write_text("{}")
    copy("own_code", model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    (bad / "own_code" / "modeling_mine.py").write_text(f"open({str(folder / 'code_ran')!r}, 'w')\n")
    whole = (folder / "student" / "model.safetensors").read_bytes()
    for name, content in {"cut_weights": whole[: len(whole) // 2], "no_safetensors": b"\xff" * 100}.items():
        (copy(name) / "model.safetensors").write_bytes(content)
    tensors = load_file(folder / "student" / "model.safetensors")
    pickled = copy("pickled", leave_out=("*.safetensors",))
    torch.save(tensors, pickled / "pytorch_model.bin")
    (copy("unsafe_pickle", leave_out=("*.safetensors",)) / "pytorch_model.bin").write_bytes(
        pickle.dumps(Opened(folder / "pickle_ran"))
    )
    outside = copy("outside", leave_out=("*.safetensors",))
    save_file(tensors, bad / "outside.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../outside.safetensors")}
    (outside / "model.safetensors.index.json").write_text(json.dumps(index))
    no_end = copy("no_end") / "tokenizer_config.json"
    no_end.write_text(json.dumps({k: v for k, v in json.loads(no_end.read_text()).items() if k != "eos_token"}))
    (copy("adapters", leave_out=("config.json", "*.safetensors")) / "adapter_config.json").write_text("{}")
    tiny_model_folder(bad / "small_head", family="gpt2", hidden_size=16, vocab_size=300)
    (bad / "a_file").write_text("no folder")


def broken_runs(folder: Path, bad: Path) -> None:
    """A finished run with a teacher store, and what may become of its checkpoint and of the store."""
    fit(folder / "kd.yaml", *store_options(folder), "--run.version=done")
    last = folder / "runs" / "kd" / "done" / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    (bad / "cut.ckpt").write_bytes(whole[:-500])
    (bad / "words.ckpt").write_text("no checkpoint")
    torch.save([1, 2], bad / "list.ckpt")
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, bad / "foreign.ckpt")
    torch.save({"state_dict": Opened(folder / "pickle_ran")}, bad / "unsafe.ckpt")
    for name in ("no_manifest", "cut_shard"):
        shutil.copytree(folder / "store", bad / name)
    (bad / "no_manifest" / "train" / "manifest.json").write_text('{"binding": ')
    for shard in (bad / "cut_shard" / "train").glob("shard-*"):
        shard.write_bytes(shard.read_bytes()[:-200])
