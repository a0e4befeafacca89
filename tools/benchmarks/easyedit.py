"""ROME and MEMIT of a checkout of zjunlp/EasyEdit beside ours: text of random words in, changed weights out.

Both get the same model, tokenizer, facts, contexts, layers, number of updates and second moments, and no early stop. Ours
factorises the second moments in every run, as EasyEdit solves with them in every run. Facts whose updates differ by more
than `TOLERANCE` of their norm (Frobenius, the worst weight) are void.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.reference_code import load_module
from lit_llm.data.edit_requests import Edit, LanguageEdit
from lit_llm.data.encoded_facts import FactEncoding, encode_edits
from lit_llm.data.fact_tokens import FactRow
from lit_llm.editing.closed_form import memit, rome
from lit_llm.editing.covariance import second_moments
from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.rows import Row
from lit_llm.editing.values import Request, ValueSettings
from lit_llm.losses.head import Head

TOLERANCE = 1e-3
MOST_FACTS = 16
_WORDS, _LETTERS, _TEXT = 4000, 6, 128
_COVARIANCE_WEIGHT = 15_000.0
_MAIN = "easyeditor.models.{0}.{0}_main"


class Fact(NamedTuple):
    """One fact in words: a prompt that contains the subject, and the new answer."""

    prompt: str
    subject: str
    target: str


class Side(NamedTuple):
    """Edits all of the facts in the live model."""

    name: str
    edit: Callable[[Sequence[Fact]], None]


class Measured(NamedTuple):
    """Of one method and one number of facts.

    Attributes:
        seconds: contender -> seconds per fact of each turn, ours first.
        gap: between both updates, relative to theirs, of the weight where it is largest.
    """

    seconds: dict[str, list[float]]
    gap: float


def check_folder(folder: str) -> None:
    """Raises SystemExit where a folder is no checkout of EasyEdit."""
    for method in ("rome", "memit"):
        file = Path(folder, *_MAIN.format(method).split(".")).with_suffix(".py")
        if not file.is_file():
            raise SystemExit(
                f"bench: --easyedit is {folder}, but {file} is missing. Give a checkout of zjunlp/EasyEdit."
            )


class Comparison:
    """Our ROME and MEMIT, and EasyEdit's, on one model.

    Args:
        folder: of the checkout.
        model: a Llama, in eval mode.
        updates: of every value that is optimised.
    """

    def __init__(self, folder: str, model: nn.Module, body: FeedForwards, head: Head, updates: int) -> None:
        self.folder, self.model, self.body, self.head = folder, model, body, head
        self.layers = body.default_layers()
        self.settings = ValueSettings(evaluations=updates + 1, stop_loss=0.0)
        vocabulary = model.config.vocab_size
        self.words = _words(min(_WORDS, (vocabulary - 8) // 2))
        self.tokenizer = _tokenizer(self.words)
        generator = torch.Generator().manual_seed(7)
        self._contexts = {
            "ROME": [_text(self.words, length, generator) for length in 10 * [5] + 10 * [10]],
            "MEMIT": [_text(self.words, 10, generator) for _ in range(5)],
        }
        self._moments: dict[int, Tensor] | None = None

    def measure(self, method: str, count: int, warmup: int, turns: int, clock: Callable[[], float]) -> Measured:
        """Seconds per fact in turns, and how far both updates are apart.

        Args:
            method: ROME takes one fact after the other, MEMIT all at once.
            count: of facts.
            warmup: turns that are not timed.
            turns: that are.
            clock: in seconds.
        """
        generator = torch.Generator().manual_seed(count)
        facts = [_fact(self.words, generator) for _ in range(count)]
        sides = self._rome() if method == "ROME" else self._memit()
        seconds: dict[str, list[float]] = {side.name: [] for side in sides}
        changes: dict[str, dict[int, Tensor]] = {}
        before = {layer: self.body.weight(layer).detach().clone() for layer in self.layers}
        for turn in range(warmup + turns):
            for side in sides:
                with self.body.restoring(self.layers):
                    start = clock()
                    side.edit(facts)
                    if self.body.device.type == "cuda":
                        torch.cuda.synchronize()
                    taken = (clock() - start) / count
                    changes[side.name] = {layer: self.body.weight(layer).detach() - before[layer] for layer in before}
                if turn >= warmup:
                    seconds[side.name].append(taken)
        return Measured(seconds, _gap(*(changes[side.name] for side in sides)))

    def _rome(self) -> tuple[Side, Side]:
        layer, contexts = self.layers[-1], self._contexts["ROME"]
        main = self._easyedit("rome")
        main.CONTEXT_TEMPLATES_CACHE = ["{}", *(f"{text}. {{}}" for text in contexts)]
        told = main.ROMEHyperParams(
            **self._told([layer]), mom2_adjustment=False, context_template_length_params=[[5, 10], [10, 10]]
        )

        def ours(facts: Sequence[Fact]) -> None:
            for request in _requests(facts, contexts, self.tokenizer):
                rome(self.body, self.head, request, layer, None, self.settings)

        def theirs(facts: Sequence[Fact]) -> None:
            for fact in facts:
                _silently(main.apply_rome_to_model, self.model, self.tokenizer, [_as_request(fact)], told)

        return Side("lit_llm ROME", ours), Side("EasyEdit ROME", theirs)

    def _memit(self) -> tuple[Side, Side]:
        contexts, moments = self._contexts["MEMIT"], self._second_moments()
        main = self._easyedit("memit")
        main.CONTEXT_TEMPLATES_CACHE = [["{}"], [f"{text}. {{}}" for text in contexts]]
        told = main.MEMITHyperParams(
            **self._told(self.layers),
            layer_selection="all",
            mom2_adjustment=True,
            mom2_update_weight=_COVARIANCE_WEIGHT,
        )
        name = self.model.config._name_or_path.replace("/", "_")
        for layer in self.layers:
            main.COV_CACHE[name, told.rewrite_module_tmp.format(layer)] = moments[layer].cpu()

        def ours(facts: Sequence[Fact]) -> None:
            requests = _requests(facts, contexts, self.tokenizer)
            settings, weight = self.settings, _COVARIANCE_WEIGHT
            memit(self.body, self.head, requests, self.layers, moments, settings, covariance_weight=weight)

        def theirs(facts: Sequence[Fact]) -> None:
            requests = [_as_request(fact) for fact in facts]
            _silently(main.apply_memit_to_model, self.model, self.tokenizer, requests, told)

        return Side("lit_llm MEMIT", ours), Side("EasyEdit MEMIT", theirs)

    def _easyedit(self, method: str):
        return load_module(self.folder, _MAIN.format(method))

    def _told(self, layers: list[int]) -> dict:
        """What both of its methods are told."""
        blocks, settings = "model.layers.{}", self.settings
        return {
            "layers": layers,
            "fact_token": "subject_last",
            "v_num_grad_steps": settings.evaluations,
            "v_lr": settings.learning_rate,
            "v_loss_layer": self.body.num_layers - 1,
            "v_weight_decay": settings.weight_decay,
            "clamp_norm_factor": settings.clamp,
            "kl_factor": settings.kl_weight,
            "rewrite_module_tmp": f"{blocks}.mlp.down_proj",
            "layer_module_tmp": blocks,
            "mlp_module_tmp": f"{blocks}.mlp",
            "attn_module_tmp": f"{blocks}.self_attn",
            "ln_f_module": "model.norm",
            "lm_head_module": "lm_head",
            "mom2_dataset": "none: its cache is filled",
            "mom2_n_samples": 0,
            "mom2_dtype": "float32",
            "alg_name": "",
            "device": str(self.body.device),
            "model_name": "",
            "stats_dir": "",
        }

    def _second_moments(self) -> dict[int, Tensor]:
        """Over random tokens, twice as many as neurons; in float32, as EasyEdit keeps them."""
        if self._moments is None:
            generator, tokens = torch.Generator().manual_seed(11), 2 * self.body.width
            shape = (-(-tokens // _TEXT), _TEXT)
            texts = torch.randint(2, self.model.config.vocab_size, shape, generator=generator).tolist()
            found = second_moments(self.body, texts, self.layers, max_tokens=tokens)
            self._moments = {layer: moments.float() for layer, moments in found.moments.items()}
        return self._moments


def _requests(facts: Sequence[Fact], contexts: Sequence[str], tokenizer) -> list[Request]:
    """As the methods make them: the bare prompt, then the same behind contexts."""
    edits = [
        Edit(str(number), {"en": LanguageEdit(fact.prompt, fact.target, fact.subject)})
        for number, fact in enumerate(facts)
    ]
    behind = [
        encode_edits(edits, FactEncoding(target_separator="space", prompt_format=wrapper), tokenizer).facts
        for wrapper in ("{}", *(f"{text}. {{}}" for text in contexts))
    ]
    return [
        Request(tuple(_row(of_fact.rows[0].tokens) for of_fact in wrapped), _row(wrapped[0].essence["en"]))
        for wrapped in zip(*behind, strict=True)
    ]


def _row(tokens: FactRow) -> Row:
    return Row(tokens.ids[: tokens.prompt_length], tokens.lookup, tokens.ids[tokens.prompt_length :])


def _as_request(fact: Fact) -> dict[str, str]:
    return {"case_id": "", "prompt": fact.prompt, "subject": fact.subject, "target_new": fact.target}


def _silently(function: Callable, *arguments) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        function(*arguments)


def _gap(ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> float:
    changed = [layer for layer, change in theirs.items() if change.any() or ours[layer].any()]
    return max(((ours[layer] - theirs[layer]).norm() / theirs[layer].norm()).item() for layer in changed)


def _words(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(5)
    found: dict[str, None] = {}
    while len(found) < count:
        letters = torch.randint(97, 123, (_LETTERS,), generator=generator).tolist()
        found["".join(map(chr, letters))] = None
    return list(found)


def _text(words: Sequence[str], length: int, generator: torch.Generator) -> str:
    return " ".join(words[at] for at in torch.randint(len(words), (length,), generator=generator).tolist())


def _fact(words: Sequence[str], generator: torch.Generator) -> Fact:
    """Ten words, of which the third and fourth are the subject, and an answer of three; none of them twice."""
    chosen = [words[at] for at in torch.randperm(len(words), generator=generator)[:13].tolist()]
    return Fact(" ".join(chosen[:10]), " ".join(chosen[2:4]), " ".join(chosen[10:]))


def _tokenizer(words: Sequence[str]):
    """One token per word, another where it begins a text, as byte-level tokenizers have it; decoding gives the text back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = "\u0120"  # how byte-level tokenizers write it
    spellings = ["<eos>", "<unk>", ".", f"{space}is", f"{space}a", *words, *(space + word for word in words)]
    numbers = {spelling: number for number, spelling in enumerate(spellings)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
