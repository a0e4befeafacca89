"""GGUF files as llama.cpp writes them, from tiny models of transformers; and wheels that hold files."""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import ZipFile

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lit_llm.models.gguf import _GEMMA3, _LLAMA, _OUTER

_NORMAL, _CONTROL, _BYTE = 1, 3, 6


def write_gguf(folder: Path, file: Path, *, kind: str = "llama", **more: object) -> Path:
    """Write the model and the byte-level tokenizer of a Hugging Face folder as a GGUF file in single precision.

    Args:
        folder: a tiny llama or gemma3_text model.
        kind: the architecture's name in the format: llama or gemma3.
        more: further keys; one whose value is None is left out.
    """
    from gguf import GGUFWriter

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    writer = GGUFWriter(str(file), kind)
    for key, value in (_model_keys(model.config, kind) | _tokenizer_keys(tokenizer) | more).items():
        if value is not None:
            _add(writer, key, value)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            writer.add_tensor(_gguf_name(name, kind), _as_llama_cpp(name, weight, model.config, kind).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_wheel(
    folder: Path, name: str, files: dict[str, bytes | Path], version: str = "1.0", python: str = ">=3.8"
) -> Path:
    """A wheel that pip takes, with `files` at their paths in it."""
    stem = f"{name.replace('-', '_')}-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{stem}-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content if isinstance(content, bytes) else content.read_bytes())
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Python: {python}\n"
        archive.writestr(f"{stem}.dist-info/METADATA", metadata)
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    return wheel


def _model_keys(config, kind: str) -> dict[str, object]:
    keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    if kind == "llama":
        keys |= {"rope.freq_base": 10000.0, "rope.dimension_count": config.head_dim}
    else:
        keys |= {"rope.freq_base": 1e6, "attention.sliding_window": config.sliding_window}
    return {f"{kind}.{key}": value for key, value in keys.items()}


def _tokenizer_keys(tokenizer) -> dict[str, object]:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    special = set(tokenizer.all_special_tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [_CONTROL if token in special else _NORMAL for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
    }


def _add(writer, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _gguf_name(name: str, kind: str) -> str:
    outer = {f"{ours}.weight": f"{theirs}.weight" for theirs, ours in _OUTER.items()}
    if name in outer:
        return outer[name]
    _, _, layer, *rest, suffix = name.split(".")
    theirs = {ours: theirs for theirs, ours in (_LLAMA if kind == "llama" else _GEMMA3).items()}
    return f"blk.{layer}.{theirs['.'.join(rest)]}.{suffix}"


def _as_llama_cpp(name: str, weight: torch.Tensor, config, kind: str) -> torch.Tensor:
    """llama.cpp's converter: Llama's rotary halves interleaved (`permute`), Gemma's norms as the whole factor."""
    if kind == "gemma3":
        return weight + 1 if name.endswith("norm.weight") else weight
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )
