"""Which positions the AlignDistil code of the authors counts, for comparing with it only: each mask is one position off.

Shapes: B rows, L positions, A positions from the last one of the prompts on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_llm.data.batch import TokenBatch, collate_tokens


def rows_of(ids_BL: Tensor, attention_BL: Tensor, prompt_lengths: list[int]) -> tuple[TokenBatch, Tensor]:
    """The batch that lit_llm makes of padded rows, and its supervised positions in the padded grid, (B, L) bool.

    Args:
        ids_BL: padded on either side.
        attention_BL: 1 at real tokens.
        prompt_lengths: real prompt tokens of each row.
    """
    ids = [row[real.bool()].tolist() for row, real in zip(ids_BL, attention_BL, strict=True)]
    batch = collate_tokens(ids, prompt_lengths, pad_id=0)
    width = batch.ids_BL.shape[1]
    first_B = attention_BL.argmax(-1)
    column_T = batch.position_T % width + first_B[batch.sequence_T]
    mask_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
    mask_BL[batch.sequence_T, column_T] = True
    return batch, mask_BL


def unshifted(attention_BL: Tensor, prompt_lengths: Tensor) -> Tensor:
    """The released off-policy trainer: positions of answer tokens instead of those that predict them."""
    return attention_BL.bool() & (torch.arange(attention_BL.shape[1]) >= prompt_lengths[:, None])


def enforced_end(ids_BL: Tensor, pad_id: int, eos_id: int) -> tuple[Tensor, Tensor]:
    """The released sampler: an end of sequence behind, or in a full row instead of, the last ordinary token.

    Returns:
        Ids, and 1 from the first ordinary token to that end.
    """
    ordinary_BL = ids_BL.ne(eos_id) & ids_BL.ne(pad_id)
    column_L = torch.arange(ids_BL.shape[1])
    last_B = ordinary_BL.long().mul(column_L).amax(-1)
    end_B1 = (last_B + 1).clamp(max=ids_BL.shape[1] - 1)[:, None]
    first_B1 = ordinary_BL.long().argmax(-1, keepdim=True)
    attention_BL = (column_L >= first_B1) & (column_L <= end_B1)
    return ids_BL.scatter(1, end_B1, eos_id), attention_BL.long()


def actions(ids_BL: Tensor, input_length: int, pad_id: int, eos_id: int) -> Tensor:
    """The released action mask: predictions made at ordinary tokens, and always the first one, (B, A)."""
    state_BA = ids_BL[:, input_length - 1 : -1]
    mask_BA = state_BA.ne(eos_id) & state_BA.ne(pad_id)
    mask_BA[:, 0] = True
    return mask_BA


def released_on_policy(attention_BL: Tensor, input_length: int) -> Tensor:
    """The released on-policy trainer: without the first answer token, with the position of the end of sequence."""
    column_L = torch.arange(attention_BL.shape[1])
    return attention_BL.bool() & (column_L >= input_length) & (column_L < attention_BL.shape[1] - 1)
