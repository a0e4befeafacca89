"""Figures of the report for runs on preference pairs: rewards, divergences, and one against the other."""

from __future__ import annotations

from lit_llm.callbacks.report_chart import Level, Series, line_chart, point_chart
from lit_llm.callbacks.report_data import RunData

_COLOURS = [f"var(--c{i})" for i in range(1, 9)]
_KL = [
    ("val/sampled_kl_start_of_answer", "KL to the start"),
    ("val/sampled_kl_dpo_of_answer", "KL to the DPO model"),
]
_REWARDS = [
    ("val/sampled_expected_reward_of_answer", "expected reward"),
    ("val/reward", "share of checks kept"),
]
_PAIRS = {
    "reward_{}": "policy",
    "dpo_reward_{}": "DPO model",
    "contrastive_reward_{}": "contrastive: DPO model against the other",
}


def preference_figures(run: RunData) -> list[str]:
    """Figures of what was logged; empty strings for the rest, nothing for runs without pairs."""
    if not run.on_pairs:
        return []
    order = {f"val/{name.format('accuracy')}": words for name, words in _PAIRS.items()}
    margins = {f"val/{name.format('margin')}": words for name, words in _PAIRS.items()}
    divergences = {"val/kl_dpo": "to the DPO model", "val/kl_other": "to the other", "val/kl_start": "to the start"}
    alpha = {"val/alpha": "mean", "val/alpha_p50": "median", "val/alpha_p95": "95th percentile"}
    advantage = {
        "val/expected_advantage": "chosen answers",
        "val/sampled_expected_advantage": "the policy's own answers",
    }
    to_teacher = {"val/kl_chosen": "on chosen answers", "val/kl_rejected": "on rejected answers"}
    labelled = {"val/good_reward": "good", "val/bad_reward": "bad"}
    entropies = {"val/entropy": run.role("student"), "val/teacher_entropy": "combined teacher"}
    rewards = {"train/reward_margin": "margin", "train/chosen_reward": "chosen", "train/rejected_reward": "rejected"}
    return [
        *kl_against_reward(run),
        _checks(run),
        _figure(run, "Validation pairs in the order of the data", order, without_start=run.starts_at_reference),
        _figure(run, "Reward margin of validation pairs", margins),
        _figure(run, "Rewards of labelled answers, validation", labelled),
        _figure(run, "Expected advantage per token, validation", advantage),
        _figure(run, "KL to the teacher per token, validation", to_teacher),
        _figure(run, "KL per token, validation", divergences),
        _figure(run, "Coefficient of the combination, validation", alpha),
        _figure(run, "Entropy, validation", entropies),
        _figure(run, "Tokens of sampled answers", {"val/sampled_tokens": "mean"}),
        _figure(run, "Rewards in training", rewards, noisy=True),
        _figure(run, "KL of the heaviest token times its weight", {"train/max_beta_kl": "heaviest token"}, noisy=True),
    ]


def kl_against_reward(run: RunData) -> list[str]:
    """What an answer gained against what it left: one figure for each reward that was logged, a point a validation."""
    x_name, x_words = next(((name, words) for name, words in _KL if run.curve(name)), ("", ""))
    divergence = dict(run.curve(x_name))
    figures = []
    for y_name, y_words in _REWARDS:
        points = [(divergence[step], value, f"{step:,}") for step, value in run.curve(y_name) if step in divergence]
        if points:
            words = (f"{x_words}, per answer", y_words)
            note = f"Across: {words[0]} of sampled answers. Upwards: {words[1]}. One point a validation, with its step."
            figures.append(point_chart(f"KL against reward: {y_words}", points, words, note))
    return figures


def _checks(run: RunData) -> str:
    curve = run.curve("val/reward")
    if not curve:
        return ""
    levels = [(run.role("teacher"), run.last("val/teacher_reward"), "var(--teacher)")]
    levels.append(("start", run.at_start("val/reward"), "var(--start)"))
    return line_chart(
        "Share of checks that generated answers keep",
        [Series(run.role("student"), curve, "var(--student)")],
        [Level(name, value, colour) for name, value, colour in levels if value is not None],
    )


def _figure(run: RunData, title: str, metrics: dict[str, str], noisy: bool = False, without_start: bool = False) -> str:
    """Curves of the metrics that were logged, in words; `without_start` leaves step 0 out."""
    curves = {name: [point for point in run.curve(name) if point[0] or not without_start] for name in metrics}
    logged = [name for name, curve in curves.items() if curve]
    series = [Series(metrics[n], curves[n], colour, noisy) for n, colour in zip(logged, _COLOURS, strict=False)]
    return line_chart(title, series) if series else ""
