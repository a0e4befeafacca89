"""Tokenizers and models small enough to build inside a test: nothing is read from the disk or the network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

SENTENCES = (
    "The cat sat on the mat, and the dog sat on the log.",
    "Below is an instruction that describes a task. Write a response that answers it.",
    "### Instruction:\nName three colours.\n\n### Response:\nRed, green and blue.",
    "What is the capital of France? The capital of France is Paris.",
    "Café naïve déjà vu; Grüße aus München, 你好 世界, привет мир, 🙂🙂",
    "def add(a, b):\n    return a + b\n\n    # two   spaces    and more\n\tand tabs",
    "It's 3 o'clock on 12 May 2024; the answer to the question is 42.",
)
VOCABULARY_SIZE = 360


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in the manner of GPT-2 with 360 tokens; `<|endoftext|>` is eos, pad and bos in one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _wrapped(tokenizer, bos="<|endoftext|>", eos="<|endoftext|>", pad="<|endoftext|>")


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """BPE in the manner of Llama 2 with at most 360 tokens: spaces are `▁`, one stands before the text, unknown
    characters fall apart into `<0xNN>` bytes; `<s>`, `</s>` and `<pad>` are bos, eos and pad. It adds no bos by itself.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = _spaces_to_marks()
    specials = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [sentence.encode("ascii", "ignore").decode().replace("\n", " ") for sentence in SENTENCES]
    trained.train_from_iterator(
        [f" {word}" for sentence in words for word in sentence.split()],
        trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE, special_tokens=specials, show_progress=False),
    )
    # Rebuilt from the learned merges, for the trainer has made special tokens of the 256 bytes.
    model = _bpe_of(trained)
    tokenizer = Tokenizer(models.BPE(**model, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), _spaces_to_marks()])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(tokenizer, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>")


def tiny_config(
    family: str = "llama", *, vocab_size: int, hidden_size: int = 32, layers: int = 2, **settings: Any
) -> PretrainedConfig:
    """The configuration of a model of `hidden_size` (a multiple of 4), with four heads.

    Args:
        family: gpt2, llama, mistral, qwen2, qwen3, gemma2 or gemma3_text.
        vocab_size: rows of the embedding and of the head.
        settings: more fields of the family's own configuration.
    """
    from transformers import AutoConfig

    if family == "gpt2":
        sizes = {"n_embd": hidden_size, "n_layer": layers, "n_head": 4, "n_positions": 256}
    else:
        sizes = {
            "hidden_size": hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": hidden_size // 4,
            "intermediate_size": 2 * hidden_size,
            "max_position_embeddings": 256,
        }
    return AutoConfig.for_model(family, vocab_size=vocab_size, **(sizes | settings))


def tiny_model_folder(
    folder: Path,
    family: str = "llama",
    tokenizer: PreTrainedTokenizerFast | None = None,
    hidden_size: int = 32,
    layers: int = 2,
    seed: int = 0,
    vocab_size: int | None = None,
    **settings: Any,
) -> Path:
    """Save a random model with its tokenizer as a plain Hugging Face folder and return that folder.

    Args:
        folder: where to, for instance pytest's `tmp_path`; made if missing.
        tokenizer: default: `byte_level_tokenizer()`.
        vocab_size: rows of the head; default: the tokenizer's length.
        settings: more fields of the family's own configuration.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = byte_level_tokenizer() if tokenizer is None else tokenizer
    config = tiny_config(
        family, vocab_size=vocab_size or len(tokenizer), hidden_size=hidden_size, layers=layers, **settings
    )
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.bos_token_id = tokenizer.bos_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def _spaces_to_marks():
    from tokenizers import normalizers

    return normalizers.Replace(" ", "▁")


def _bpe_of(tokenizer) -> dict[str, Any]:
    import json

    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def _wrapped(tokenizer, *, bos: str, eos: str, pad: str, unk: str | None = None) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    roles = {"bos_token": bos, "eos_token": eos, "pad_token": pad} | ({"unk_token": unk} if unk else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles)
