"""Golden values of the metrics for edited facts; they stand in the index itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_llm.evaluation.editing import (
    CounterFact,
    EditMatrix,
    TokenExactMatch,
    TokenF1,
    ngram_entropy,
    normalized,
    token_agreement,
    token_f1,
)


def check_token_f1_em(stored: dict[str, Any], folder: Path) -> None:
    f1, exact = TokenF1(), TokenExactMatch()
    for row in stored["cases"]:
        predicted, target = row["prediction"], row["target"]
        assert token_f1(predicted, target) == pytest.approx(row["f1"], abs=1e-12)
        assert token_f1(predicted, target, "remake_product") == pytest.approx(row["precision_times_recall"], abs=1e-12)
        f1.update([predicted], [target])
        assert exact([predicted], [target]).item() == 100 * row["em"]
    assert round(f1.compute().item(), 2) == stored["mean_f1"]
    assert round(exact.compute().item(), 2) == stored["mean_em"]


def check_normalized_exact_match(stored: list[dict[str, Any]], folder: Path) -> None:
    for row in stored:
        pair = [normalized(row["prediction"]), normalized(row["target"])]
        assert pair == row["normalized"]
        assert (pair[0] == pair[1]) == row["match"]


def check_token_accuracy(stored: dict[str, Any], folder: Path) -> None:
    tensors = load_file(folder / stored["file"])
    starts, lengths = tensors["prompt_len"].tolist(), tensors["target_len"].tolist()
    at = [
        (row, start + offset) for row, (start, n) in enumerate(zip(starts, lengths, strict=True)) for offset in range(n)
    ]
    row_T, position_T = torch.tensor(at).T
    predicted_T = tensors["logits"][row_T, position_T - 1].argmax(-1)
    later_T = tensors["logits_post"][row_T, position_T - 1].argmax(-1)
    found = token_agreement(predicted_T, tensors["labels"][row_T, position_T], row_T, len(starts))
    assert found.tolist() == pytest.approx(stored["per_row"])
    assert (found == 1).tolist() == stored["all_correct"]
    kept = token_agreement(later_T, predicted_T, row_T, len(starts))
    assert kept.tolist() == pytest.approx(stored["locality_pre_post_agreement"])


def check_counterfact(stored: dict[str, Any], folder: Path) -> None:
    metric = CounterFact()
    for kind in ("rewrite", "paraphrase", "neighborhood"):
        for prompts in stored[kind]:
            new, true = (torch.tensor([prompt[name] for prompt in prompts]) for name in ("target_new", "target_true"))
            metric.update(kind, new, true)
    found = metric.compute()
    assert set(found) == {"ES", "PS", "NS", "EM", "PM", "NM", "score"}
    for name, value in found.items():
        assert value.item() == pytest.approx(stored[name], rel=1e-6), name


def check_ngram_entropy(stored: list[dict[str, Any]], folder: Path) -> None:
    for row in stored:
        assert ngram_entropy(row["tokens"]) == pytest.approx(row["value"], abs=1e-12)


def check_edit_matrix(stored: dict[str, Any], folder: Path) -> None:
    languages = [f"l{number}" for number in range(len(stored["matrix"]))]
    metric = EditMatrix(languages)
    for fact in stored["per_fact"]:
        for edited, row in zip(languages, fact, strict=True):
            for asked, score in zip(languages, row, strict=True):
                metric.update(edited, asked, torch.tensor([float(score)]))
    found = metric.compute()
    torch.testing.assert_close(
        found["matrix"][:-1], torch.tensor(stored["matrix"], dtype=torch.float64), atol=1e-6, rtol=0
    )
    for ours, name in (("same_language", "same_language"), ("cross_language", "cross_language")):
        assert found[ours].item() == pytest.approx(stored[name])
    assert found["row_means"].tolist() == pytest.approx(stored["row_means"])
    assert found["column_means"].tolist() == pytest.approx(stored["column_means"])


HANDLERS = {
    "token_f1_em": check_token_f1_em,
    "normalized_exact_match": check_normalized_exact_match,
    "token_accuracy": check_token_accuracy,
    "counterfact": check_counterfact,
    "ngram_entropy": check_ngram_entropy,
    "edit_matrix": check_edit_matrix,
}
