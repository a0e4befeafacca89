"""What strategies that divide weights share: how they evaluate."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lit_llm.data.step_sampler import batches_here
from lit_llm.models.sharding import gathered


class WholeEvaluation:
    """Before a strategy of Lightning's among the bases: gathers the module for each evaluation, and lets it go after it.

    Processes may then have different numbers of batches and tokens. Frozen models that are divided stay so: processes take turns.

    Args:
        args: of the strategy.
        divide_frozen: whether frozen models are divided.
        settings: of the strategy.
    """

    def __init__(self, *args: Any, divide_frozen: bool, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.divide_frozen, self._frozen = divide_frozen, None
        self._whole = ExitStack()

    def divide_frozen_models(self, mesh) -> None:
        """Once, when the models are built and have their types; does nothing unless it is asked for.

        Args:
            mesh: of all processes.

        Raises:
            ValueError: it cannot be done (see `DividedFrozen`).
        """
        if not self.divide_frozen or self._frozen is not None:
            return
        from lit_llm.models.divided_frozen import DividedFrozen

        self._frozen = DividedFrozen(self.lightning_module, mesh)

    def validation_step(self, *args: Any) -> Any:
        """Without what a strategy puts around a module, which would wait for the other processes."""
        with self.precision_plugin.val_step_context():
            return self._evaluated(self.lightning_module.validation_step, args)

    def test_step(self, *args: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self._evaluated(self.lightning_module.test_step, args)

    def predict_step(self, *args: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self.lightning_module.predict_step(*args)

    def on_validation_start(self) -> None:
        self._begin()

    def on_validation_end(self) -> None:
        self._whole.close()

    def on_test_start(self) -> None:
        self._begin()

    def on_test_end(self) -> None:
        self._whole.close()

    def on_predict_start(self) -> None:
        self._gather()

    def on_predict_end(self) -> None:
        self._whole.close()

    def _begin(self) -> None:
        self._gather()
        if self._frozen is not None:
            loop = self.lightning_module.trainer._evaluation_loop
            loaders = loop._combined_loader.flattened
            self._frozen.take_turns(
                sum(min(most, batches_here(loader)) for most, loader in zip(loop.max_batches, loaders, strict=True))
            )

    def _gather(self) -> None:
        self._whole.enter_context(gathered(self.lightning_module))

    def _evaluated(self, step, args: tuple) -> Any:
        result = step(*args)
        if self._frozen is not None:
            self._frozen.batch_done()
        return result

    def teardown(self) -> None:
        self._whole.pop_all()  # after an error not all processes get here
        super().teardown()
