"""Callbacks: what a run tells, keeps and guards, one per file. They know methods by the attributes that they name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning import Callback

    from lit_llm.callbacks.nan_guard import NonFinite


def default_callbacks(
    progress_bar: bool = True, stage: str = "fit", non_finite: NonFinite | None = None
) -> list[Callback]:
    """The callbacks of an ordinary run, in the order in which they must be called.

    Args:
        progress_bar: include `Progress`.
        stage: the command: `fit`, `validate`, `test`; others get none of them but `Progress`.
        non_finite: what becomes of a step whose loss is no number.
    """
    from lit_llm.callbacks.edit_lines import EditLines
    from lit_llm.callbacks.hf_export import HfExport
    from lit_llm.callbacks.histograms import Histograms
    from lit_llm.callbacks.language_lines import LanguageLines
    from lit_llm.callbacks.metrics_csv import ContinueMetrics
    from lit_llm.callbacks.nan_guard import NanGuard
    from lit_llm.callbacks.progress import Progress
    from lit_llm.callbacks.report import Report
    from lit_llm.callbacks.run_record import RunRecord
    from lit_llm.callbacks.samples import Samples
    from lit_llm.callbacks.step_axis import StepAxis
    from lit_llm.callbacks.stop_on_signal import StopOnSignal
    from lit_llm.callbacks.throughput import Throughput
    from lit_llm.callbacks.token_lines import TokenLines
    from lit_llm.callbacks.validate_at_start import ValidateAtStart

    shown = [Progress()] if progress_bar and stage in ("fit", "validate", "test", "predict") else []
    if stage in ("validate", "test"):
        return [*shown, StepAxis(), RunRecord(), Samples(), TokenLines(), LanguageLines(), EditLines(), Report()]
    if stage != "fit":
        return shown
    # Progress shows what Throughput measured; Report reads what all others wrote; a stop comes after both; the validation
    # before the first step wants everybody else to have started.
    lines = [Samples(), TokenLines(), LanguageLines(), EditLines()]
    recorded = [StepAxis(), ContinueMetrics(), RunRecord(), *lines, Histograms()]
    guards = [NanGuard(non_finite=non_finite)]
    return [*guards, Throughput(), *shown, *recorded, HfExport(), Report(), StopOnSignal(), ValidateAtStart()]
