"""What is left of a frozen teacher whose hidden states are on disk: the output head, perhaps the input embedding.

Shapes: W tokens of the teacher's vocabulary, E its width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lit_llm.losses.head import Head
from lit_llm.models.language_model import LanguageModel
from lit_llm.storage import complete_file


class TeacherHead(nn.Module):
    """Head and sizes of a language model, without its body; stands where a method looks at its teacher.

    Args:
        head: the output head.
        input_embedding: (W, E), for methods that read it; None: not kept.
        num_parameters: of the whole model.
    """

    def __init__(self, head: Head, input_embedding: Tensor | None, num_parameters: int) -> None:
        super().__init__()
        tied = input_embedding is not None and input_embedding.data_ptr() == head.weight_VD.data_ptr()
        self.register_buffer("weight_WE", head.weight_VD.detach(), persistent=False)
        self.register_buffer("bias_W", None if head.bias_V is None else head.bias_V.detach(), persistent=False)
        self.register_buffer(
            "embedding_WE", None if tied or input_embedding is None else input_embedding.detach(), persistent=False
        )
        self.softcap, self.scale = head.softcap, head.scale
        self.num_parameters, self._tied = num_parameters, tied

    @property
    def head(self) -> Head:
        return Head(self.weight_WE, self.bias_W, self.softcap, self.scale)

    @property
    def hidden_size(self) -> int:
        return self.weight_WE.shape[1]

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self.weight_WE.shape[0]

    @property
    def input_embedding(self) -> Tensor:
        """(W, E) input embedding.

        Raises:
            ValueError: it was not kept.
        """
        if self._tied:
            return self.weight_WE
        if self.embedding_WE is None:
            raise ValueError(
                "The teacher's input embedding is asked for, but only its output head was kept. The method must say "
                "`needs_teacher_embedding`."
            )
        return self.embedding_WE


def keep_head(model: LanguageModel, with_embedding: bool) -> TeacherHead:
    """The head of a model, sharing its memory."""
    return TeacherHead(model.head, model.input_embedding if with_embedding else None, model.num_parameters)


def save_head(model: LanguageModel, file: Path, key: str) -> None:
    """Write head and input embedding as safetensors, under their final name only when complete.

    Args:
        key: names the model; `load_head` gives it back.
    """
    from safetensors.torch import save_file

    head, embedding_WE = model.head, model.input_embedding
    tensors = {"weight": head.weight_VD.detach()}
    if head.bias_V is not None:
        tensors["bias"] = head.bias_V.detach()
    tied = embedding_WE.data_ptr() == head.weight_VD.data_ptr()
    if not tied:
        tensors["input_embedding"] = embedding_WE.detach()
    facts = {"key": key, "parameters": str(model.num_parameters), "scale": repr(head.scale), "tied": str(int(tied))}
    if head.softcap is not None:
        facts["softcap"] = repr(head.softcap)
    with complete_file(file) as partial:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata=facts)
        partial.chmod(0o644)  # safetensors writes files that only their owner may read


def head_key(file: Path) -> str | None:
    """The key that a head was saved with; None where there is no such file."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            return stored.metadata()["key"]
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}\n  Delete it; the next run writes it anew.") from error


def load_head(file: Path, dtype: torch.dtype, with_embedding: bool) -> TeacherHead:
    """A head that was saved.

    Args:
        dtype: of the weights.
        with_embedding: keep the input embedding too.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        facts, names = stored.metadata(), set(stored.keys())
        head = Head(
            stored.get_tensor("weight").to(dtype),
            stored.get_tensor("bias").to(dtype) if "bias" in names else None,
            float(facts["softcap"]) if "softcap" in facts else None,
            float(facts["scale"]),
        )
        embedding_WE = None
        if with_embedding:
            embedding_WE = head.weight_VD if facts["tied"] == "1" else stored.get_tensor("input_embedding").to(dtype)
    return TeacherHead(head, embedding_WE, int(facts["parameters"]))
