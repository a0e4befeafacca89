"""Models without dropout that still count as being in training."""

from __future__ import annotations

from torch import nn


def turn_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0.

    Unlike `eval()`, this leaves what else depends on the mode as it is, such as gradient checkpointing.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # transformers hands these to functional attention
        for name in ("attention_dropout", "attn_pdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
