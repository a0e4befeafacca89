"""From a GGUF file to a normal Hugging Face folder.

Weights are dequantised with the `gguf` package into a model built from the file's own metadata, and the tokenizer is
built from the metadata too: seconds instead of minutes, and the result can be saved (transformers' own GGUF loading
keeps the model marked as quantised and refuses).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_CONTROL, _USER_DEFINED = 3, 4  # token types of the format
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA = {**_LAYER, "ffn_norm": "post_attention_layernorm"}
_GEMMA3 = {
    **_LAYER,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert_gguf(file: Path, folder: Path) -> None:
    """Write config, float32 weights, tokenizer and generation settings of a GGUF file into `folder`.

    Args:
        file: a GGUF file of the llama or gemma3 architecture.
        folder: an existing folder.

    Raises:
        ValueError: not a GGUF file, another architecture, something of it that is not known here (scaled rotary
            positions, experts), or tensors that do not fit the model.
    """
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        reader = GGUFReader(str(file))
    except (ValueError, IndexError) as error:
        raise ValueError(f"{file.name} is no readable GGUF file: {error}") from error
    metadata = _Metadata(reader)
    config = _config(metadata)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(_weights(reader, metadata, config), strict=False, assign=True)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise ValueError(
            f"{file.name} does not fit {type(model).__name__}: missing {missing}, unexpected {unexpected}."
        )
    model.tie_weights()
    tokenizer = gguf_tokenizer(metadata)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def gguf_tokenizer(metadata: _Metadata):
    """A fast tokenizer from the metadata of a GGUF file: byte-level BPE, or SentencePiece-style BPE by scores."""
    from transformers import PreTrainedTokenizerFast

    kind, kinds = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.token_type"]
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
    if kind not in builders:
        raise ValueError(f"The GGUF file has a tokenizer of the kind {kind!r}; known are {', '.join(builders)}.")
    tokens = metadata["tokenizer.ggml.tokens"]
    if kind == "llama":  # the file writes user-defined tokens with plain spaces
        tokens = [t.replace(" ", "▁") if k == _USER_DEFINED else t for t, k in zip(tokens, kinds, strict=True)]
    backend = builders[kind](metadata, tokens)
    backend.add_tokens(_added_tokens(metadata, tokens))
    if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        backend.post_processor = _begin_with(metadata["tokenizer.ggml.bos_token_id"], tokens)
    roles = {}
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for theirs, ours in names.items():
        number = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if number is not None:
            roles[f"{ours}_token"] = tokens[number]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles)
    tokenizer.model_max_length = metadata.architecture_value("context_length")
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


class _Metadata:
    """The key-value part of a GGUF file."""

    def __init__(self, reader) -> None:
        self.fields = reader.fields
        self.tensor_names = {tensor.name for tensor in reader.tensors}

    def __getitem__(self, key: str) -> Any:
        if key not in self.fields:
            raise ValueError(f"The GGUF file has no {key!r}; it is not a complete language model.")
        return self.fields[key].contents()

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self.fields else default

    def architecture_value(self, key: str, default: Any = None) -> Any:
        """A value of the model's architecture, e.g. `block_count`."""
        name = f"{self['general.architecture']}.{key}"
        return self[name] if default is None else self.get(name, default)


def _config(metadata: _Metadata):
    from transformers import AutoConfig

    architecture, value = metadata["general.architecture"], metadata.architecture_value
    heads = value("attention.head_count")
    _refuse_what_is_not_converted(metadata)
    common = {
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": value("attention.key_length", value("embedding_length") // heads),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": _shortest_float32(value("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in metadata.tensor_names,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if architecture == "llama":
        rope = {"rope_type": "default", "rope_theta": value("rope.freq_base", 10000.0)}
        return AutoConfig.for_model("llama", rope_parameters=rope, **common)
    if architecture == "gemma3":
        return AutoConfig.for_model(
            "gemma3_text",
            sliding_window=value("attention.sliding_window"),
            query_pre_attn_scalar=common["head_dim"],
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": value("rope.freq_base", 1e6)},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            **common,
        )
    raise ValueError(f"The GGUF file holds a {architecture!r} model; llama and gemma3 can be converted.")


def _refuse_what_is_not_converted(metadata: _Metadata) -> None:
    """Things that a file may ask for, and that would be dropped without a word."""
    value = metadata.architecture_value
    head_dim = value("attention.key_length", value("embedding_length") // value("attention.head_count"))
    asked = {
        "scaled rotary positions": value("rope.scaling.type", "none") != "none",
        "rotary factors": "rope_freqs.weight" in metadata.tensor_names,
        "partly rotary heads": value("rope.dimension_count", head_dim) != head_dim,
        "experts": value("expert_count", 0) > 0,
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise ValueError(
                f"The GGUF file holds a model with {what}, which cannot be converted. Name its folder or hub id."
            )


def _weights(reader, metadata: _Metadata, config) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    gemma = metadata["general.architecture"] == "gemma3"
    names = _GEMMA3 if gemma else _LLAMA
    weights = {}
    for tensor in reader.tensors:
        name = _hugging_face_name(tensor.name, names)
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if gemma and name.endswith("norm.weight"):
            value = value - 1  # stored as the factor; Gemma multiplies by 1 + weight
        if not gemma and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = _halves(value, heads)
        weights[name] = value
    return weights


def _hugging_face_name(name: str, layer_names: dict[str, str]) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{_OUTER[stem]}.{kind}" if stem in _OUTER else name
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{layer_names.get(part, part)}.{kind}"


def _halves(weight_OD: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF interleaves the two halves of each rotary dimension; transformers keeps them apart."""
    out, width = weight_OD.shape
    return weight_OD.view(heads, out // heads // 2, 2, width).transpose(1, 2).reshape(out, width)


def _byte_level_bpe(metadata: _Metadata, tokens: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=bool(metadata.get("tokenizer.ggml.add_space_prefix", False)))
    splits = {
        # digits one by one: what transformers' own conversion of these files leaves out
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "gpt-2": [],
    }
    rule = metadata.get("tokenizer.ggml.pre", "default")
    if rule not in splits:
        raise ValueError(f"The GGUF file splits text by the rule {rule!r}; known are {', '.join(splits)}.")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits[rule], byte_level]) if splits[rule] else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: _Metadata, tokens: list[str]):
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges_by_score(tokens, metadata["tokenizer.ggml.scores"], vocabulary),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_by_score(tokens: list[str], scores: list[float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece keeps no merges: every split of a token into two tokens is one, ranked by the token's score."""
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        found = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        merges += [(score, vocabulary[left], vocabulary[right], left, right) for left, right in found]
    merges.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
    return [(left, right) for *_, left, right in merges]


def _begin_with(begin: int, tokens: list[str]):
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{tokens[begin]}:0 $A:0",
        pair=f"{tokens[begin]}:0 $A:0 {tokens[begin]}:1 $B:1",
        special_tokens=[(tokens[begin], begin)],
    )


def _added_tokens(metadata: _Metadata, tokens: list[str]):
    """Control tokens, and those that are matched before anything is merged (Gemma's runs of spaces)."""
    from tokenizers import AddedToken

    added = []
    for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if kind == _CONTROL:
            added.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER_DEFINED:
            added.append(AddedToken(token, special=False, normalized=metadata["tokenizer.ggml.model"] == "llama"))
    return added


def _shortest_float32(value: float) -> float:
    """1e-05 for 9.999999747378752e-06: the file keeps single precision."""
    return json.loads(f"{value:.6g}")
