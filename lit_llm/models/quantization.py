"""Frozen weights in 4 or 8 bits, by bitsandbytes: under adapters (QLoRA, arXiv 2305.14314) or in a frozen teacher.

Only the linear layers of the body are quantised; embedding and head keep their precision, for losses take them as they
are. A quantised base never enters a checkpoint: it comes from its source again.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn

Quantization = Literal["nf4", "int8"]


def quantization_config(kind: Quantization, dtype: torch.dtype):
    """What transformers is told: `nf4` with doubly quantised scales as in QLoRA, or `int8`; computed in `dtype`.

    Raises:
        ValueError: bitsandbytes or accelerate is missing, or bitsandbytes runs on no device of this machine.
    """
    _check_backend(kind)
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def prepared_for_adapters(model: nn.Module) -> nn.Module:
    """The quantised model with everything frozen and what is not quantised in float32 (peft)."""
    from peft import prepare_model_for_kbit_training

    # checkpointing is the caller's: its non-reentrant form needs no inputs with gradients
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def settle(model: nn.Module, source: str) -> None:
    """Make a quantised model fit for training, and see that its head was left as it is.

    Raises:
        ValueError: it was quantised.
    """
    weight = model.get_output_embeddings().weight
    if not weight.is_floating_point():
        raise ValueError(
            f"The output head of {source!r} was quantised to {weight.dtype}, but losses take its weight as it is. "
            f"Leave `quantization` out for this model."
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # on some CPUs evaluation would repack the weights for good: rounded scales, and no gradients afterwards
            module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def dequantized(model: nn.Module, plain: nn.Module) -> nn.Module:
    """Fill `plain`, the same model built without quantisation, with the numbers that `model` computes with."""
    from transformers.pytorch_utils import Conv1D

    twins = dict(model.named_modules())
    for path, module in plain.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = getattr(twins[path], name)
            if type(value).__name__ in ("Params4bit", "Int8Params"):
                value = _dequantized_weight(twins[path])
                value = value.T if isinstance(module, Conv1D) else value
            parameter.copy_(value)
    return plain


def keep_base_out_of_checkpoints(module: nn.Module) -> None:
    """Let the state of `module` hold its trained parameters only; the rest stays as it is when a state is loaded."""
    if getattr(module, "base_is_kept_out", False):
        return
    module.base_is_kept_out = True
    module.register_state_dict_post_hook(_drop_frozen)
    module.register_load_state_dict_pre_hook(_fill_frozen)


def _dequantized_weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    # peft's and transformers' own way moves the weight about and loses its scales
    scales = weight.SCB if weight.SCB is not None else layer.state.SCB
    return weight.data.float() * scales[:, None] / 127


def _drop_frozen(module: nn.Module, state: dict, prefix: str, _) -> None:
    trained = {prefix + name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name in [name for name in state if name.startswith(prefix) and name not in trained]:
        del state[name]


def _fill_frozen(module: nn.Module, state: dict, prefix: str, *_) -> None:
    for path, part in module.named_modules(prefix=prefix.removesuffix(".")):
        kept = {name: buffer for name, buffer in part._buffers.items() if name not in part._non_persistent_buffers_set}
        frozen = {name: p for name, p in part._parameters.items() if p is not None and not p.requires_grad}
        for name, tensor in {**kept, **frozen}.items():
            state.setdefault(f"{path}.{name}" if path else name, tensor)


def _check_backend(kind: Quantization) -> None:
    for package in ("bitsandbytes", "accelerate"):
        if find_spec(package) is None:
            raise ValueError(
                f"quantization is {kind!r}, which needs the package {package}, but it is not installed.\n"
                f"  python -m pip install 'lit-llm[quantization]', or leave `quantization` out."
            )
    from transformers.integrations.bitsandbytes import validate_bnb_backend_availability

    try:
        validate_bnb_backend_availability(raise_exception=True)
    except RuntimeError as error:
        raise ValueError(
            f"quantization is {kind!r}, but the installed bitsandbytes runs on no device of this machine "
            f"(CUDA: {torch.cuda.is_available()}): {error}\n  Leave `quantization` out, or train on a machine with a GPU."
        ) from error
