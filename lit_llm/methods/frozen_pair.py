"""What the frozen models of AlignDistil say: run live, read from a store, or kept since the last validation.

Shapes: T supervised tokens of the chosen answers, P those of all answers (chosen, then rejected), D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_llm.data.batch import PreferenceBatch, TokenBatch
from lit_llm.losses.token_log_probs import token_log_probs
from lit_llm.methods.preference import hidden_of_pairs

_KEPT_BYTES = 512 * 2**20


class HeldOut(NamedTuple):
    """Of a batch of held-out pairs; nothing of it changes while the policy is trained.

    Attributes:
        hidden: name of the model -> (T, D) hidden states.
        log_probs: name of the model -> (P,) log-probabilities of the tokens.
    """

    hidden: dict[str, Tensor]
    log_probs: dict[str, Tensor]


class FrozenPair:
    """The DPO model, the other one and, where it is watched, the start of the policy.

    Held-out values are computed once per run: log-probabilities always, hidden states up to 512 MiB, beyond which the
    models are run again at each validation.

    Args:
        method: an `AlignDistil`; read are `teacher`, `other`, `frozen_start`, `stores`, `loss_chunk` and `device`.
    """

    def __init__(self, method) -> None:
        self.method = method
        self._hidden: dict[tuple, dict[str, Tensor]] = {}
        self._log_probs: dict[tuple, dict[str, Tensor]] = {}

    @torch.no_grad()
    def hidden(self, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
        """(T, D) hidden states of both, run on any tokens."""
        return self.method.teacher.hidden(tokens), self.method.other.hidden(tokens)

    def of_chosen(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """(T, D) of the chosen answers of a training batch."""
        if batch.dpo_hidden is None:
            return self.hidden(batch.chosen)
        return self._stored(batch, "dpo"), self._stored(batch, "other")

    @torch.no_grad()
    def of_pairs(self, batch: PreferenceBatch, stage: str) -> HeldOut:
        """What there is of a held-out batch, computed where it was not before."""
        key, tokens = (stage, batch.examples), batch.chosen.num_supervised
        known = self._hidden.get(key)
        if known is not None:
            hidden = {name: value.to(self.method.device) for name, value in known.items()}
            return HeldOut(hidden, self._log_probs[key])
        whole = self._of_all_answers(batch)
        if key not in self._log_probs:
            models = {"dpo": self.method.teacher, "other": self.method.other}
            target_P = torch.cat([batch.chosen.target_T, batch.rejected.target_T])
            self._log_probs[key] = {
                name: token_log_probs(whole[name], model.head, target_P, chunk_size=self.method.loss_chunk)
                for name, model in models.items()
            }
        hidden = {name: hidden_PD[:tokens] for name, hidden_PD in whole.items()}
        self._keep(key, hidden)
        return HeldOut(hidden, self._log_probs[key])

    def _of_all_answers(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        method = self.method
        live = {"dpo": method.teacher, "other": method.other}
        if batch.dpo_hidden is not None:
            whole = {name: self._stored(batch, name) for name in live}
        else:
            whole = {name: hidden_of_pairs(model, batch) for name, model in live.items()}
        if method.frozen_start is not None:
            whole["start"] = method.frozen_start.model.hidden(batch.chosen)
        return whole

    def _keep(self, key: tuple, hidden: dict[str, Tensor]) -> None:
        kept = sum(tensor.nbytes for values in self._hidden.values() for tensor in values.values())
        if kept + sum(tensor.nbytes for tensor in hidden.values()) <= _KEPT_BYTES:
            self._hidden[key] = {name: value.cpu().clone() for name, value in hidden.items()}

    def _stored(self, batch: PreferenceBatch, name: str) -> Tensor:
        return getattr(batch, f"{name}_hidden").to(self.method.stores[name].hidden_dtype)
