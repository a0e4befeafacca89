"""Random models of every family that can be edited, and random facts about nothing."""

from __future__ import annotations

from typing import Any

import torch

from lit_llm.editing.hooks import FAMILIES, FeedForwards
from lit_llm.editing.optimise import FactRows
from lit_llm.editing.rows import Row
from lit_llm.losses.head import Head

EVERY = sorted(FAMILIES)
VOCABULARY = 61
_GATED = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
_PLAIN = {"n_embd": 24, "n_layer": 4, "n_head": 4, "n_positions": 64}
_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {**_PLAIN, "n_inner": 40},
    "gptj": {**_PLAIN, "n_inner": 40, "rotary_dim": 4},
    "gpt_neox": {k: v for k, v in _GATED.items() if k not in ("num_key_value_heads", "head_dim")},
    "bloom": {"hidden_size": 24, "n_layer": 4, "n_head": 4},
    "opt": {
        "hidden_size": 24,
        "ffn_dim": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 24,
        "max_position_embeddings": 64,
    },
    "phi3": {k: v for k, v in _GATED.items() if k != "head_dim"},
}


def transformer(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any):
    """A random model with weights large enough that every part of it matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**_SIZES.get(family, _GATED), "vocab_size": VOCABULARY, "initializer_range": 0.15, "init_std": 0.15}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **(sizes | tokens | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases and norms start at 0 and 1, where mistakes do not show
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def body_and_head(family: str = "llama", **settings: Any) -> tuple[FeedForwards, Head]:
    model = transformer(family, **settings)
    layer = model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return FeedForwards(model), Head(layer.weight.detach(), layer.bias, softcap)


def row(generator: torch.Generator, prompt: int, lookup: int, target: int = 2) -> Row:
    ids = torch.randint(3, VOCABULARY, (prompt + target,), generator=generator).tolist()
    return Row(ids[:prompt], lookup, ids[prompt:])


def facts(count: int, *, languages: int = 2, seed: int = 0) -> list[FactRows]:
    """Facts with two prompts in each language, of all lengths, subjects early and late."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        rows, essence = [], []
        for language in range(languages):
            for extra in (0, 2):
                length = 4 + (number + language + extra) % 5
                rows.append(row(generator, length, (number + language) % (length - 1) + 1, 1 + (number + extra) % 3))
            essence.append(row(generator, 3, 1, 0))
        of_row = tuple(language for language in range(languages) for _ in "ab")
        made.append(FactRows(tuple(rows), of_row, tuple(essence)))
    return made


def neurons(
    count: int, layers: list[int], width: int = 40, each: int = 9, seed: int = 0
) -> list[dict[int, torch.Tensor]]:
    """Different ones, and differently many, for each fact and layer."""
    generator = torch.Generator().manual_seed(seed)

    def some(number: int, layer: int) -> torch.Tensor:
        return torch.randperm(width, generator=generator)[: each + (number + layer) % 3].sort().values

    return [{layer: some(number, layer) for layer in layers} for number in range(count)]
