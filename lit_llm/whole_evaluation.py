"""What strategies that divide weights share: every process holds all of them while a model is evaluated."""

from __future__ import annotations

from contextlib import ExitStack

from lit_llm.models.sharding import gathered


class WholeEvaluation:
    """Before a strategy of Lightning's among the bases: gathers the module for each evaluation, and lets it go after it.

    Processes may then have different numbers of batches and tokens.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._whole = ExitStack()

    def on_validation_start(self) -> None:
        self._gather()

    def on_validation_end(self) -> None:
        self._whole.close()

    def on_test_start(self) -> None:
        self._gather()

    def on_test_end(self) -> None:
        self._whole.close()

    def on_predict_start(self) -> None:
        self._gather()

    def on_predict_end(self) -> None:
        self._whole.close()

    def _gather(self) -> None:
        self._whole.enter_context(gathered(self.lightning_module))

    def teardown(self) -> None:
        self._whole.pop_all()  # after an error not all processes get here
        super().teardown()
