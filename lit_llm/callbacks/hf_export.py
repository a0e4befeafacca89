"""The trained student as a plain Hugging Face folder, its adapters beside it, at the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

_WORDS = {"model": "The trained model is", "adapters": "The trained adapters are", "edits.safetensors": "The edits are"}


class HfExport(L.Callback):
    """Writes `model/`, `adapters/` or both into the run folder when training ended well: all steps, `max_time` or early stopping.

    A run that was interrupted or failed gets none: its weights may stand in the middle of an optimizer step. Its last
    checkpoint can be exported with the command that is then shown. A run that was killed between its last checkpoint and the
    end has no step left when it goes on, and gets what it lacks. Rank zero writes, the others wait.

    Reads of the method: `exports`, name of a folder or file -> what writes it, atomically and, for a model, checked by
    reloading, `whole_on`, within which rank zero holds all weights, and `run_folder`.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._written = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._folder = pl_module.run_folder  # on every rank: finding the folder may communicate

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module, pl_module.exports)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._written or trainer.global_step == 0:
            return
        missing = {name: save for name, save in pl_module.exports.items() if not (self._folder / name).exists()}
        self._write(trainer, pl_module, missing)

    def _write(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exports: dict[str, Callable[[Path], None]]
    ) -> None:
        self._written = True
        with pl_module.whole_on(trainer.is_global_zero):
            if trainer.is_global_zero:
                for name, save in exports.items():
                    save(self._folder / name)
                    rank_zero_info(f"{_WORDS.get(name, name)} in {self._folder / name}")
        trainer.strategy.barrier("export of the trained model")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        checkpoint = getattr(trainer.checkpoint_callback, "last_model_path", "")
        if checkpoint:
            rank_zero_info(
                "The run did not end well, so no model/ was written. Its last checkpoint becomes one with\n"
                f"  python -m lit_llm export --config {self._folder / 'config.yaml'} --ckpt_path {checkpoint} --to FOLDER"
            )
