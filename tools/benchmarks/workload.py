"""What every contender of a suite works on: two random Llamas, one batch of random tokens, and how a step is judged.

Shapes: B sequences, L positions, T supervised positions, D and E widths of student and teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_llm.data.batch import TokenBatch, collate_tokens
from lit_llm.models.language_model import LanguageModel

IGNORED = -100
TEMPERATURE = 2.0
KD_WEIGHT = 0.5


@dataclass(frozen=True)
class Setting:
    """Sizes of a workload.

    Attributes:
        vocabulary: rows of both heads.
        sequences: sequences of the batch.
        length: positions of each, the second half supervised.
        student: width and layers.
        teacher: width and layers.
    """

    vocabulary: int
    sequences: int
    length: int
    student: tuple[int, int]
    teacher: tuple[int, int]

    @property
    def positions(self) -> int:
        return self.sequences * self.length


SETTINGS = {
    "A": Setting(vocabulary=32_000, sequences=4, length=256, student=(256, 4), teacher=(512, 8)),
    "B": Setting(vocabulary=151_936, sequences=2, length=256, student=(256, 4), teacher=(512, 8)),
    "tiny": Setting(vocabulary=96, sequences=2, length=16, student=(16, 1), teacher=(32, 1)),
}


@dataclass
class Step:
    """One training step of a contender, without the optimizer.

    Attributes:
        loss: forward and backward; returns the loss.
        trained: the parameters whose gradient norm is compared.
    """

    loss: Callable[[], Tensor]
    trained: list[nn.Parameter]

    def clear(self) -> None:
        for parameter in self.trained:
            parameter.grad = None

    def gradient_norm(self) -> float:
        return float(nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None]))


class Workload:
    """Models and batch of a setting; the same numbers in every process.

    Attributes:
        student, teacher: transformers models; the teacher is frozen and in eval mode.
        ids_BL: token ids.
        labels_BL: the next token at supervised positions, elsewhere -100.
        tokens: the same as a batch of lit_llm.
    """

    def __init__(self, setting: Setting, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.setting = setting
        self.student = _llama(setting.vocabulary, *setting.student, seed=1).to(device, dtype)
        self.teacher = (
            _llama(setting.vocabulary, *setting.teacher, seed=2).to(device, dtype).eval().requires_grad_(False)
        )
        generator = torch.Generator().manual_seed(3)
        ids_BL = torch.randint(0, setting.vocabulary, (setting.sequences, setting.length), generator=generator)
        prompt = setting.length // 2
        self.tokens: TokenBatch = collate_tokens(ids_BL.tolist(), [prompt] * setting.sequences, pad_id=0).to(device)
        self.ids_BL = ids_BL.to(device)
        self.labels_BL = torch.full_like(self.ids_BL, IGNORED)
        self.labels_BL[:, prompt - 1 : -1] = self.ids_BL[:, prompt:]

    @property
    def supervised(self) -> int:
        return self.tokens.num_supervised

    def frozen_like_student(self, seed: int) -> nn.Module:
        """Another model of the student's size, frozen and in eval mode."""
        model = _llama(self.setting.vocabulary, *self.setting.student, seed=seed)
        return model.to(self.ids_BL.device, self.student.dtype).eval().requires_grad_(False)

    def language_models(self) -> tuple[LanguageModel, LanguageModel]:
        """Student and teacher as lit_llm holds them."""
        student, teacher = self.as_language_models(self.student, self.teacher)
        return student, teacher

    def as_language_models(self, *models: nn.Module) -> list[LanguageModel]:
        """Models of transformers as lit_llm holds them."""
        tokenizer = _tokenizer()
        return [LanguageModel(model, tokenizer, False) for model in models]


def closed_form(head_from_VX: Tensor, head_into_VY: Tensor) -> Tensor:
    """The map between hidden spaces that reproduces logits best, (Y, X), by float64 least squares."""
    into, source = head_into_VY.double(), head_from_VX.double()
    return torch.linalg.pinv(into.T @ into, hermitian=True) @ (into.T @ source)


def parameters(*modules: nn.Module) -> list[nn.Parameter]:
    return [p for module in modules for p in _unique(module.parameters()) if p.requires_grad]


def _unique(values: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list(dict.fromkeys(values))


def _llama(vocabulary: int, width: int, layers: int, seed: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        num_key_value_heads=max(width // 64, 1),
        tie_word_embeddings=False,
        initializer_range=0.08,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
