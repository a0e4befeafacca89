"""A causal language model as body (ids to hidden states), head (hidden states to logits) and tokenizer.

Shapes: B sequences, L padded positions, T supervised positions, D width, V rows of the head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_llm.data.batch import TokenBatch
from lit_llm.losses.head import Head
from lit_llm.models import generation, quantization, sources
from lit_llm.models.adapter_folder import adapter_folder, base_identity, save_adapters, with_merged_adapters
from lit_llm.models.adapters import FROZEN, Lora, with_adapters
from lit_llm.models.generation import Sampling
from lit_llm.models.quantization import Quantization
from lit_llm.models.saving import save_model
from lit_llm.models.sharding import whole_numel

_TESTED_FAMILIES = {"gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"}
_TESTED = f"Tested architectures: {', '.join(sorted(_TESTED_FAMILIES))}."


@dataclass
class ModelSpec:
    """Which model, and how it is held.

    Args:
        source: a hub id, a local folder, or `package:NAME` for a model shipped inside a wheel of the package index. A
            folder `adapters/` that a run with `lora` left stands for its base with the adapters merged.
        config: a random start instead: fields of a transformers config with `model_type`, e.g.
            {model_type: llama, hidden_size: 64, ...}; needs `tokenizer`, whose special tokens it takes, and whose size
            where `vocab_size` is left out. The weights follow torch's global generator (`seed_everything`).
        tokenizer: hub id, folder or package of the tokenizer; None: that of `source`.
        keep_layers: a cut: these layers of the source, in this order.
        dtype: of the weights.
        attention: implementation of attention; None: transformers' choice for the architecture.
        lora: train adapters instead of the weights.
        quantization: keep the body's frozen weights in 4 bits (`nf4`, as in QLoRA) or 8 (`int8`), by bitsandbytes; the
            head is left as it is. For a frozen teacher, or for a student with `lora`.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        pickled_weights: read pickles where there are no safetensors; only of sources that you trust, for they can run code.
        trim_head: losses and generation leave out the rows of the head beyond the tokenizer's highest id, which pad many
            published heads (152,064 rows for 151,665 ids), to different lengths for models of one tokenizer. The
            weights keep their shape; the rows get no gradient.
    """

    source: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    keep_layers: list[int] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    lora: Lora | None = None
    quantization: Quantization | None = None
    gradient_checkpointing: bool = False
    trim_head: bool = True
    pickled_weights: bool = False

    def __post_init__(self) -> None:
        for name in ("source", "tokenizer"):
            if getattr(self, name) == "None":  # what jsonargparse makes of `--model.init_args.student.NAME=null`
                setattr(self, name, None)
        if (self.source is None) == (self.config is None):
            raise ValueError(
                f"A model needs either `source` (a hub id, folder or package) or `config` (a random start), "
                f"not both and not neither: source is {self.source!r}, config is {self.config!r}."
            )
        if self.config is not None and self.tokenizer is None:
            raise ValueError("A model with `config` needs `tokenizer`: a hub id, folder or package.")
        if self.config is not None and self.keep_layers is not None:
            raise ValueError(
                "`keep_layers` cuts a `source`, but `config` is a random start. Set num_hidden_layers there."
            )
        if self.config is not None and self.quantization is not None:
            raise ValueError(
                f"`quantization` ({self.quantization}) is for the weights of a `source`, but `config` is a random start. "
                f"Leave it out."
            )
        if self.config is not None and self.pickled_weights:
            raise ValueError("`pickled_weights` is for a `source`, but `config` is a random start. Leave it out.")
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
        model = self._transformer(tokenizer, self.quantization)
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if self.quantization is not None and self.lora is not None:
            model = quantization.prepared_for_adapters(model)
        base = None
        if self.lora is not None:
            base = base_identity(self, model)
            model = with_adapters(model, self.lora)
        plain = None if self.quantization is None else partial(self._plain, tokenizer)
        # transformers hands models out in eval mode
        saved = None if self.lora is None else self.lora.saved
        return LanguageModel(model, tokenizer, self.trim_head, plain, base, saved).train()

    def _transformer(self, tokenizer, kind: Quantization | None) -> nn.Module:
        dtype = getattr(torch, self.dtype)
        if self.source is None:
            return sources.random_start(self.config, self.attention, dtype, tokenizer)
        if (folder := adapter_folder(self.source)) is not None:
            return with_merged_adapters(folder, self)
        settings = None if kind is None else quantization.quantization_config(kind, dtype)
        model = sources.load_model(self.source, self.keep_layers, self.attention, dtype, settings, self.pickled_weights)
        if kind is not None:
            quantization.settle(model, self.source)
        if self.tokenizer not in (None, self.source):
            sources.use_special_tokens(model, tokenizer)
        return model

    def _plain(self, tokenizer) -> nn.Module:
        """What is trained as it would be without quantisation: another copy of the source, with adapters."""
        model = self._transformer(tokenizer, None)
        return model if self.lora is None else with_adapters(model, self.lora)


class LanguageModel(nn.Module):
    """Body, head and tokenizer of a causal language model of transformers, with or without adapters.

    Args:
        model: a transformers causal language model, or a peft model around one.
        tokenizer: a fast tokenizer with eos and pad.
        trim_head: leave out the head's rows beyond the tokenizer's ids.
        plain: builds the same model without quantisation, for saving; None where it is not quantised.
        base: identity of the model under the adapters (`base_identity`); None where there are no adapters.
        saved: what a run leaves of it, see `Lora`; None: the model.

    Raises:
        ValueError: the tokenizer has ids without a row in the head; or the architecture is outside the tested ones and
            `check_head` finds that it does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        trim_head: bool = True,
        plain: Callable[[], nn.Module] | None = None,
        base: dict[str, Any] | None = None,
        saved: Literal["both", "merged", "adapters"] | None = None,
    ) -> None:
        super().__init__()
        self._plain, self.base, self._saved = plain, base, saved or "merged"
        if plain is not None:
            quantization.keep_base_out_of_checkpoints(self)
        self.model, self.tokenizer, self.trim_head = model, tokenizer, trim_head
        self.num_tokens = max(tokenizer.get_vocab().values()) + 1
        if self.num_tokens > self.vocab_size:
            raise ValueError(
                f"The tokenizer of {tokenizer.name_or_path!r} has ids up to {self.num_tokens - 1:,}, but the model's head has only "
                f"{self.vocab_size:,} rows. Take the tokenizer that belongs to the model, or resize the model first."
            )
        self._packing_unknown = self.family not in _TESTED_FAMILIES
        if self._packing_unknown:
            self.check_head()

    @property
    def transformer(self) -> nn.Module:
        """The transformers model itself; adapters, if any, sit inside it."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def family(self) -> str:
        """The architecture; that of the dense model where experts were added."""
        config = self.transformer.config
        return getattr(config, "base_model_type", None) or config.model_type

    @property
    def hidden_size(self) -> int:
        return self.transformer.get_output_embeddings().in_features

    @property
    def vocab_size(self) -> int:
        """Rows of the model's own head; may exceed the tokenizer's ids."""
        return self.transformer.get_output_embeddings().out_features

    @property
    def num_parameters(self) -> int:
        """Its own: base and adapters that are trained, without what others keep beside them."""
        return sum(whole_numel(parameter) for name, parameter in self.named_parameters() if f".{FROZEN}" not in name)

    @property
    def head(self) -> Head:
        """The output head with its live weight, without the rows that `trim_head` leaves out."""
        layer, config = self.transformer.get_output_embeddings(), self.transformer.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        head = Head(layer.weight, layer.bias, getattr(config, "final_logit_softcapping", None), scale)
        return head.rows(self.num_tokens) if self.trim_head else head

    @property
    def trains_head(self) -> bool:
        """Whether the head is trained; under adapters it is not."""
        return self.transformer.get_output_embeddings().weight.requires_grad

    @property
    def input_embedding(self) -> Tensor:
        """(V, D) input embedding."""
        return self.transformer.get_input_embeddings().weight

    def hidden_grid(self, tokens: TokenBatch) -> Tensor:
        """(B, L, D) last hidden states after the final norm, or (R, L, D) of packed rows.

        Sequences are padded on the right and attention is causal, so no real position sees padding and no mask is
        needed; what stands at padded positions has no meaning.

        Raises:
            ValueError: more positions than the model's table of positions has (GPT-2; rotary positions have no end); or
                packed rows for an architecture that `check_packing` finds to mix their sequences.
        """
        length, limit = tokens.longest or tokens.ids_BL.shape[1], generation.position_limit(self.transformer)
        if limit is not None and length > limit:
            raise ValueError(
                f"A sequence of {length} tokens does not fit the {limit} positions of {type(self.transformer).__name__}. "
                f"Set data.max_length to {limit} or less."
            )
        if tokens.branch_RL is not None:
            return self._branched_hidden(tokens)
        if tokens.position_ids_RL is None:
            return self.transformer.base_model(input_ids=tokens.ids_BL, use_cache=False).last_hidden_state
        if self._packing_unknown:
            self.check_packing()
        return self._packed_hidden(tokens.ids_BL, tokens.position_ids_RL)

    def branches(self, tokens: TokenBatch) -> bool:
        """Whether two answers can share the run of their prompt: it takes a mask of our own, over all tokens."""
        config = self.transformer.config
        window = getattr(config.get_text_config(), "sliding_window", None)
        masked = config._attn_implementation in ("sdpa", "eager") and self.family in _TESTED_FAMILIES
        return masked and (not window or tokens.longest <= window)

    def _branched_hidden(self, tokens: TokenBatch) -> Tensor:
        """(R, L, D) of rows with two answers to one prompt."""
        branch_RL = tokens.branch_RL
        length, dtype = branch_RL.shape[1], self.transformer.dtype
        device = branch_RL.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        earlier_LL = torch.ones(length, length, dtype=torch.bool, device=branch_RL.device).tril()
        seen_RLL = earlier_LL & ((branch_RL == 0)[:, None, :] | (branch_RL[:, :, None] == branch_RL[:, None, :]))
        mask_RLL = torch.zeros(seen_RLL.shape, dtype=dtype, device=branch_RL.device)
        mask_RLL.masked_fill_(~seen_RLL, torch.finfo(dtype).min)
        return self.transformer.base_model(
            input_ids=tokens.ids_BL,
            attention_mask=mask_RLL[:, None],
            position_ids=tokens.position_ids_RL,
            use_cache=False,
        ).last_hidden_state

    def _packed_hidden(self, ids_RL: Tensor, position_ids_RL: Tensor) -> Tensor:
        """(R, L, D); without a mask, transformers keeps attention within sequences, told by where positions restart."""
        rows, length = ids_RL.shape
        if self.transformer.config._attn_implementation.startswith("flash"):  # looks for restarts in a single row only
            ids_RL, position_ids_RL = ids_RL.reshape(1, -1), position_ids_RL.reshape(1, -1)
        body = self.transformer.base_model
        hidden = body(input_ids=ids_RL, position_ids=position_ids_RL, use_cache=False).last_hidden_state
        return hidden.view(rows, length, -1)

    def hidden(self, tokens: TokenBatch) -> Tensor:
        """(T, D) last hidden states of the supervised positions."""
        return self.hidden_grid(tokens).flatten(0, 1)[tokens.position_T]

    @torch.no_grad()
    def check_head(self) -> None:
        """Compare head(hidden) with the model's own logits on a few tokens, and see that no position looks ahead.

        Raises:
            ValueError: this architecture does something to its logits that we do not know, or is not causal.
        """
        model, name = self.transformer, type(self.transformer).__name__
        ids_BL = torch.arange(1, 5, device=model.device)[None] % self.vocab_size
        with generation.evaluating(self):
            own_TV = model(input_ids=ids_BL, use_cache=False).logits[0, :, : self.head.num_rows].float()
            hidden_TD = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state[0]
            shorter_TD = model.base_model(input_ids=ids_BL[:, :-1], use_cache=False).last_hidden_state[0]
        if not _close(self.head(hidden_TD).float(), own_TV):
            raise ValueError(
                f"{name} changes its logits after the head in a way that lit_llm does not know (they differ by up to "
                f"{(own_TV - self.head(hidden_TD).float()).abs().max().item():.3g}), so losses on hidden states would be "
                f"wrong. {_TESTED}"
            )
        if not _close(hidden_TD[:-1].float(), shorter_TD.float()):
            raise ValueError(f"{name} is not causal: a later token changes earlier hidden states. {_TESTED}")

    @torch.no_grad()
    def check_packing(self) -> None:
        """Compare the hidden states of two sequences in one row with those of each alone.

        Raises:
            ValueError: this architecture does not keep them apart.
        """
        ids_BL = torch.arange(1, 9, device=self.transformer.device)[None] % self.vocab_size
        position_ids_BL = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], device=ids_BL.device)
        body = self.transformer.base_model
        with generation.evaluating(self):
            alone = [body(input_ids=piece, use_cache=False).last_hidden_state for piece in ids_BL.split([3, 5], 1)]
            packed = self._packed_hidden(ids_BL, position_ids_BL)
        tolerance = 1e-2 if packed.dtype in (torch.float16, torch.bfloat16) else 1e-3
        if not _close(packed.float(), torch.cat(alone, 1).float(), tolerance):
            raise ValueError(
                f"{type(self.transformer).__name__} does not keep sequences of one row apart, so packed rows would mix "
                f"them.\n  Set data.pack_to: null. {_TESTED}"
            )
        self._packing_unknown = False

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
        until: Callable[[int, list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """New token ids of each prompt, without the end-of-sequence token; the global random state is left as it was.

        Args:
            prompts: token ids.
            max_new_tokens: length limit.
            temperature: 0 is greedy.
            top_p: nucleus sampling; 1 is off.
            top_k: sampling among the k best; 0 is off.
            no_repeat_ngram_size: forbids repeated n-grams; 0 is off.
            seed: of the sampling.
            batch_size: prompts at a time; prompts of similar length are put together.
            until: see `generation.generate`.

        Raises:
            ValueError: an empty prompt, or a setting outside its range.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, no_repeat_ngram_size, seed)
        num_tokens = self.head.num_rows
        return generation.generate(self.transformer, self.tokenizer, prompts, sampling, batch_size, num_tokens, until)

    def stream(
        self, prompt: list[int], *, max_new_tokens: int, temperature: float, top_p: float, top_k: int, seed: int
    ) -> Iterator[str]:
        """Pieces of text as they are generated for one prompt (settings as in `generate`)."""
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed=seed)
        return generation.stream(self.transformer, self.tokenizer, prompt, sampling, num_tokens=self.head.num_rows)

    @property
    def exports(self) -> dict[str, Callable[[Path], None]]:
        """What a run leaves of it: name of a folder -> what writes it."""
        kinds = {"merged": {"model": self.save}, "adapters": {"adapters": self.save_adapters}}
        return kinds.get(self._saved) or kinds["merged"] | kinds["adapters"]

    def save_adapters(self, folder: Path) -> None:
        """Write the adapters with the identity of their base; the folder appears when it is complete."""
        save_adapters(self.model, self.tokenizer, self.base, folder)

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder: config, safetensors, tokenizer; adapters merged into a copy.

        Quantised weights are written as the numbers that they stand for, in the model's dtype.

        The folder appears when it is complete, after a reload through `AutoModelForCausalLM` gave the same weights.

        Raises:
            ValueError: the reloaded weights differ.
        """
        save_model(self._merged(), self.tokenizer, self.head.num_rows, Path(folder))

    def _merged(self) -> nn.Module:
        if self._plain is not None:
            whole = quantization.dequantized(self.model, self._plain())
        else:
            whole = copy.deepcopy(self.model) if self.model is not self.transformer else self.model
        return whole.merge_and_unload() if hasattr(whole, "peft_config") else whole


class Frozen(nn.Module):
    """Holds a language model as `model` that follows devices and dtypes but is never trained and never saved.

    The held model is not a child module: it is in no `state_dict`, no `parameters()` and so in no optimizer and no
    checkpoint. It stays in eval mode without gradients.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        object.__setattr__(self, "model", model.eval().requires_grad_(False))

    def _apply(self, fn, recurse: bool = True) -> Frozen:
        self.model._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-2) -> bool:
    """Equal but for rounding, also in half precision; a scale or a cap that is missed changes more."""
    return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())
