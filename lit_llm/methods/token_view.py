"""What an evaluation keeps of single tokens: values for histograms, and the scores of the first answers.

Shapes: B sequences, T supervised tokens.
"""

from __future__ import annotations

import math

import lightning as L
import torch
from torch import Tensor

from lit_llm.data.batch import TokenBatch
from lit_llm.evaluation.token_scores import TokenScores, token_pieces

_MOST_VALUES = 20_000  # of a histogram, all processes together


class TokenView:
    """Gathers values of tokens over the batches of one evaluation.

    Args:
        names: of the values that are kept for histograms.
        answers: how many answers are kept token by token: those of the part's first examples, as in the samples.
    """

    def __init__(self, names: tuple[str, ...], answers: int) -> None:
        self.wanted = answers
        self._values: dict[str, list[Tensor]] = {name: [] for name in names}
        self._answers: dict[int, TokenScores] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Keep one batch's values of its tokens, (T,) each."""
        for name, value_T in values.items():
            self._values[name].append(value_T.detach())

    def add_answers(self, examples: tuple[int, ...], tokens: TokenBatch, tokenizer, scores: dict[str, Tensor]) -> None:
        """Keep the wanted answers of a batch with the scores of their tokens, (T,) each.

        Args:
            examples: index of each sequence in its part.
            tokens: the sequences, all of their answers supervised.
            tokenizer: that wrote them.
            scores: by name.
        """
        for row, example in enumerate(examples):
            of_row_T = tokens.sequence_T == row
            if example >= self.wanted or not of_row_T.any():
                continue
            first = tokens.position_T[of_row_T][0] - row * tokens.ids_BL.shape[1]
            prompt = tokens.ids_BL[row, : first + 1].tolist()
            self._answers[example] = TokenScores(
                tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False),
                token_pieces(tokenizer, tokens.target_T[of_row_T].tolist()),
                {name: tuple(value_T[of_row_T].tolist()) for name, value_T in scores.items()},
            )

    def answers(self, method: L.LightningModule) -> list[TokenScores]:
        """The answers that all processes kept, in the order of the data. Every process must call it."""
        kept = [self._answers]
        if method.trainer.world_size > 1:
            kept = [None] * method.trainer.world_size
            torch.distributed.all_gather_object(kept, self._answers)
        merged = {example: answer for answers in kept for example, answer in answers.items()}
        return [merged[example] for example in sorted(merged)]

    def histograms(self, method: L.LightningModule) -> dict[str, Tensor]:
        """Finite values of all processes, evenly thinned to about 20,000. Every process must call it."""
        return {name: self._gathered(pieces, method) for name, pieces in self._values.items()}

    def _gathered(self, pieces: list[Tensor], method: L.LightningModule) -> Tensor:
        value_T = torch.cat([torch.zeros(0, device=method.device), *pieces])
        trainer = method.trainer
        total = trainer.strategy.reduce(torch.tensor(len(value_T), device=method.device), reduce_op="sum")
        value_T = value_T[:: max(1, math.ceil(int(total) / _MOST_VALUES))]
        if trainer.world_size > 1:  # one length for all, filled with what is dropped below
            padded = value_T.new_full((_MOST_VALUES + 1,), torch.nan)
            padded[: len(value_T)] = value_T
            value_T = method.all_gather(padded).flatten()
        return value_T[value_T.isfinite()].cpu()
