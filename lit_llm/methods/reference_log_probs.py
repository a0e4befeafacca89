"""Log-probabilities of whole answers under the model that training starts from: two numbers a pair, asked once.

They are kept in the cache under a hash of weights, precision and tokens, so that a second run on the same pairs (reverse
DPO, another beta) finds them; and in the checkpoint, so that a run which is resumed needs neither cache nor model.

Shapes: N pairs of a part.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import load, save
from torch import Tensor

from lit_llm.models.generation import evaluating
from lit_llm.models.language_model import LanguageModel
from lit_llm.models.sharding import gathered
from lit_llm.models.shared_base import AdaptedBase
from lit_llm.models.weights import state_digest
from lit_llm.storage import cache_folder, write_atomically

_COLUMNS = ("student_prompt_ids", "chosen_ids", "rejected_ids")
_FORMAT = 1
_TELL_SECONDS = 10


class ReferenceLogProbs:
    """Fills `datamodule.reference`.

    Args:
        method: a `PreferenceMethod`; read are `student`, `reference_spec`, `answer_log_probs` and the trainer.
    """

    def __init__(self, method) -> None:
        self.method = method
        self.parts: dict[str, Tensor] = {}
        self._trained = False

    def fill(self, parts: Sequence[str]) -> None:
        """Find or compute the log-probabilities of those parts of the data that are given, and hand them to the data.

        Raises:
            ValueError: the checkpoint that is resumed belongs to other pairs.
        """
        data = self.method.trainer.datamodule
        wanted = {part: examples for part, examples in data.sets.items() if part in parts}
        for part, examples in wanted.items():
            if part in self.parts and len(self.parts[part]) != len(examples):
                raise ValueError(
                    f"The checkpoint was written with {len(self.parts[part])} pairs in {part}, but the data has "
                    f"{len(examples)}. Resume with the data of its run folder, or start anew without --ckpt_path."
                )
        missing = [part for part in wanted if part not in self.parts]
        if missing:
            with gathered(self.method):
                model = self._model()
                weights = _weights_digest(model)
                for part in missing:
                    self.parts[part] = self._of_part(part, model, weights)
        data.reference.update({part: self.parts[part] for part in wanted})

    def state(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return self.parts

    def load_state(self, parts: dict[str, Tensor]) -> None:
        self.parts, self._trained = parts, True

    def _model(self) -> LanguageModel:
        """The reference itself: the policy where it has not been trained yet, its base, else another copy."""
        method = self.method
        if method.reference_spec is None and method.student.base is not None:
            return AdaptedBase(method.student)
        spec = method.reference_spec or (method.student_spec if self._trained else None)
        if spec is None:
            return method.student
        if spec.source is None:
            raise ValueError(
                "The checkpoint knows nothing of these pairs, and the policy started at random (student.config), so the "
                "reference cannot be built again. Set model.reference, or use the data of the run."
            )
        return spec.load().to(method.device)

    def _of_part(self, part: str, model: LanguageModel, weights: str) -> Tensor:
        trainer = self.method.trainer
        examples = trainer.datamodule.sets[part]
        key = json.dumps([_FORMAT, weights, str(trainer.precision), tokens_digest(examples.table)])
        file = cache_folder() / "reference_log_probs" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        found = trainer.strategy.broadcast(file.is_file())
        if not found:
            values_N2 = self._computed(part, model)
            if trainer.is_global_zero:
                write_atomically(file, save({"log_probs_N2": values_N2}))
            trainer.strategy.barrier("reference log-probabilities written")
            rank_zero_info(f"Log-probabilities of {len(examples):,} pairs ({part}) under the reference: {file.name}")
            return values_N2
        return load(file.read_bytes())["log_probs_N2"]

    @torch.no_grad()
    def _computed(self, part: str, model: LanguageModel) -> Tensor:
        """(N, 2), each rank a share."""
        method, data = self.method, self.method.trainer.datamodule
        values_N2, done, told = torch.zeros(len(data.sets[part]), 2), 0, time.monotonic()
        with evaluating(model), method.trainer.precision_plugin.forward_context():
            for batch in data.evaluation_loader(part):
                sums_2B = method.answer_log_probs(model, batch.to(method.device))
                values_N2[list(batch.examples)] = sums_2B.T.float().cpu()
                done += len(batch.examples) * method.trainer.world_size
                if time.monotonic() - told > _TELL_SECONDS:
                    told = time.monotonic()
                    rank_zero_info(f"Reference log-probabilities of {part}: {done:,} of {len(values_N2):,} pairs")
        return method.trainer.strategy.reduce(values_N2.to(method.device), reduce_op="sum").cpu()


def tokens_digest(table) -> str:
    """sha256 of the tokens of a table of pairs, in order."""
    digest = hashlib.sha256()
    for batch in table.with_format("arrow").iter(batch_size=1000):
        for name in _COLUMNS:
            column = batch[name].combine_chunks()
            digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def _weights_digest(model: LanguageModel) -> str:
    """Of the model without its adapters, which add nothing at the start."""
    return state_digest(model.model, leave_out="lora_")
