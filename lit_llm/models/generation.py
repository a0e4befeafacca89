"""Continue prompts with a causal language model of transformers, batched and with cached keys and values.

Only the settings given here count: what the model's folder says about sampling or penalties is set aside, so that a
greedy answer is greedy for every model. Its end-of-sequence tokens do count.

Shapes: B prompts, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread

import torch
from torch import Tensor, nn

from lit_llm.models.sharding import gathered

_SAMPLING_ONLY = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_new_tokens: length limit.
        temperature: 0 is greedy.
        top_p: nucleus sampling; 1 is off.
        top_k: sampling among the k best; 0 is off.
        no_repeat_ngram_size: forbids repeated n-grams; 0 is off.
        seed: of the sampling.

    Raises:
        ValueError: a value that makes no sense.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    no_repeat_ngram_size: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0 (0 is greedy)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (1 is off)"),
            "top_k": (self.top_k >= 0, "at least 0 (0 is off)"),
            "no_repeat_ngram_size": (self.no_repeat_ngram_size >= 0, "at least 0 (0 is off)"),
        }
        for name, (fits, range_) in limits.items():
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {range_}.")


def check_sampling(section: str, max_new_tokens: int, **settings) -> None:
    """See that a section of a config could be a `Sampling`, before any model is loaded.

    Raises:
        ValueError: it could not; the setting has the section's name before it.
    """
    try:
        Sampling(max_new_tokens, **settings)
    except ValueError as error:
        raise ValueError(f"{section}.{error}") from error


def generate(
    model: nn.Module,
    tokenizer,
    prompts: list[list[int]],
    sampling: Sampling,
    batch_size: int,
    num_tokens: int | None = None,
    until: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """New token ids of each prompt, without the token that ended it.

    Runs in eval mode without gradients; the mode of every module and the global random state are left as they were.

    Args:
        model: a transformers model.
        tokenizer: with eos and pad.
        prompts: token ids, none of them empty.
        sampling: how tokens are chosen.
        batch_size: prompts at a time; prompts of similar length are put together.
        num_tokens: ids from here on are never chosen; None: every row of the head may be.
        until: (number of the prompt, its new ids so far) -> whether the answer ends with these; a batch of prompts is done when
            all of its answers are. None: only the model and the limit end them.

    Raises:
        ValueError: an empty prompt, or one that leaves no room in a model with a table of positions.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    _check_prompts(model, prompts, sampling)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    ends = end_ids(model, tokenizer)
    with _seeded(model.device, sampling.seed), gathered(model):  # processes generate different numbers of tokens
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            ids_BL, mask_BL = _left_padded([prompts[i] for i in members], tokenizer.pad_token_id, model.device)
            stop = _Until(until, members, ids_BL.shape[1])
            controls = {} if until is None else {"stopping_criteria": [stop]}
            new_BL = _continue(model, tokenizer, ids_BL, mask_BL, sampling, num_tokens, **controls)
            for i, new in zip(members, new_BL[:, ids_BL.shape[1] :].tolist(), strict=True):
                new = new[: stop.lengths.get(i)]  # padding follows
                answers[i] = new[: next((at for at, token in enumerate(new) if token in ends), len(new))]
    return answers


def stream(
    model: nn.Module, tokenizer, prompt: list[int], sampling: Sampling, num_tokens: int | None = None
) -> Iterator[str]:
    """Pieces of the text that continues one prompt, as they come; an error is raised where the text is read.

    The random state is given back when the text ends.
    """
    from transformers import TextIteratorStreamer

    _check_prompts(model, [prompt], sampling)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids_BL, mask_BL = _left_padded([prompt], tokenizer.pad_token_id, model.device)
    abandoned, failures = Event(), []

    def stop(ids_BL: Tensor, scores, **_) -> Tensor:
        return torch.full((len(ids_BL),), abandoned.is_set(), device=ids_BL.device)

    def run() -> None:
        try:
            with _seeded(model.device, sampling.seed):
                controls = {"streamer": streamer, "stopping_criteria": [stop]}
                _continue(model, tokenizer, ids_BL, mask_BL, sampling, num_tokens, **controls)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)  # raised again below, in the reader's thread
        finally:
            streamer.end()

    thread = Thread(target=run, name="lit_llm stream", daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        abandoned.set()
        thread.join()
    if failures:
        raise failures[0]


def end_ids(model: nn.Module, tokenizer) -> set[int]:
    """The tokens that end an answer: the tokenizer's eos, and what the model's folder adds (ends of a chat turn).

    The latter only where they are special tokens of this tokenizer: many configs carry ids that nobody chose.
    """
    listed = model.generation_config.eos_token_id
    listed = [] if listed is None else [listed] if isinstance(listed, int) else listed
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {tokenizer.eos_token_id} | (set(listed) & special)


def settle_defaults(model: nn.Module, tokenizer, num_tokens: int | None = None) -> None:
    """Make the generation settings that are saved with a model agree with the tokenizer and with themselves.

    Ids from `num_tokens` on are suppressed: training never lowered them, and the tokenizer has no text for them.
    """
    settings, ends = model.generation_config, sorted(end_ids(model, tokenizer))
    settings.eos_token_id = ends if len(ends) > 1 else ends[0]
    settings.pad_token_id = tokenizer.pad_token_id
    if beyond := _beyond(model, num_tokens):
        settings.suppress_tokens = sorted({*(settings.suppress_tokens or []), *beyond})
    if any(getattr(settings, name, None) is not None for name in _SAMPLING_ONLY):
        settings.do_sample = True  # published folders forget it, and transformers refuses to save them


def position_limit(model: nn.Module) -> int | None:
    """How many positions the model has a table for; None where positions are rotary and have no end."""
    config = model.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None)
    return None if rotary else getattr(config, "max_position_embeddings", None)


class _Until:
    """Ends the rows of a batch one by one, and keeps how many new tokens each had by then."""

    def __init__(self, until: Callable[[int, list[int]], bool] | None, members: Sequence[int], start: int) -> None:
        self._until, self._members, self._start = until, members, start
        self.lengths: dict[int, int] = {}

    def __call__(self, ids_BL: Tensor, scores, **_) -> Tensor:
        for i, new in zip(self._members, ids_BL[:, self._start :].tolist(), strict=True):
            if i not in self.lengths and self._until(i, new):
                self.lengths[i] = len(new)
        return torch.tensor([i in self.lengths for i in self._members], device=ids_BL.device)


@torch.no_grad()
def _continue(
    model, tokenizer, ids_BL: Tensor, mask_BL: Tensor, sampling: Sampling, num_tokens: int | None, **more
) -> Tensor:
    from transformers import GenerationConfig

    chosen = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        no_repeat_ngram_size=sampling.no_repeat_ngram_size or None,
        eos_token_id=sorted(end_ids(model, tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        suppress_tokens=_beyond(model, num_tokens),
        **chosen,
    )
    with evaluating(model), _only(settings, model), _dense_head_input(model):
        return model.generate(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            generation_config=settings,
            synced_gpus=False,  # what FSDP divides is whole here, and processes generate by themselves
            **more,
        )


def _beyond(model: nn.Module, num_tokens: int | None) -> list[int] | None:
    """Rows of the head for which the tokenizer has no id."""
    rows = model.get_output_embeddings().out_features
    return list(range(num_tokens, rows)) if num_tokens is not None and num_tokens < rows else None


def _check_prompts(model: nn.Module, prompts: list[list[int]], sampling: Sampling) -> None:
    limit = position_limit(model)
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"Prompt {number} has no tokens; begin it with a beginning-of-sequence token or a text.")
        if limit is not None and len(prompt) + sampling.max_new_tokens > limit:
            raise ValueError(
                f"Prompt {number} has {len(prompt)} tokens; with max_new_tokens {sampling.max_new_tokens} it passes the "
                f"{limit} positions of {type(model).__name__}. Shorten the prompt or lower max_new_tokens."
            )


def _left_padded(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids_BL = torch.full((len(prompts), longest), pad_id, dtype=torch.int64)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        ids_BL[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BL[row, longest - len(prompt) :] = 1
    return ids_BL.to(device), mask_BL.to(device)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device.index] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _dense_head_input(model: nn.Module) -> Iterator[None]:
    """The last position of every prompt, sliced out, takes torch on a CPU 4 times as long in float32 and copies the whole head
    for each prompt in bfloat16 (400 times as long with 262,144 rows).
    """
    dense = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: tuple(value.contiguous() for value in inputs)
    )
    try:
        yield
    finally:
        dense.remove()


@contextmanager
def _only(settings, model: nn.Module) -> Iterator[None]:
    """transformers fills what is left unset from the model's own settings; here nothing but `settings` counts."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own
