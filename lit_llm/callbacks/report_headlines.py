"""Which metrics the report's result begins with, and in which words."""

from __future__ import annotations

from typing import Literal, NamedTuple

from lit_llm.callbacks.report_data import RunData


class Headline(NamedTuple):
    """One row of the result.

    Attributes:
        name: the metric, without its stage.
        words: for people.
        higher: whether higher is better; None: neither is.
        per_token: counted per token, and so dependent on the tokenizer.
        of: whose number it is: the student's, beside start and teacher; or of frozen models alone.
        implicit: counted from rewards relative to a reference: where the run starts from it, the start has none.
    """

    name: str
    words: str
    higher: bool | None
    per_token: bool = False
    of: Literal["student", "teacher"] = "student"
    implicit: bool = False


_ON_ANSWERS = [
    Headline("loss", "Loss per token", higher=False, per_token=True),
    Headline("accuracy", "Next-token accuracy", higher=True, per_token=True),
    Headline("reward", "Share of the prompt's checks that generated answers keep", higher=True),
    Headline("rouge_l", "ROUGE-L of generated answers", higher=True),
    Headline("agreement", "Agreement with the teacher", higher=True),
]
_ON_FACTS = [
    Headline("reliability", "Edited questions answered as edited, percent", higher=True),
    Headline("generality", "The same worded anew, percent", higher=True),
    Headline("locality", "Unrelated questions answered as before, percent", higher=True),
    Headline("portability", "Questions one step further, percent", higher=True),
    Headline("loss", "Loss of new answers per token", higher=False, per_token=True),
]
_ON_PAIRS = [
    Headline("reward", "Share of the prompt's checks that generated answers keep", higher=True),
    Headline("loss", "Loss", higher=False),
    Headline("reward_accuracy", "Pairs in the data's order: reward of the policy", higher=True, implicit=True),
    Headline("label_accuracy", "Answers on their label's side of the baseline", higher=True, implicit=True),
    Headline("dpo_reward_accuracy", "Pairs in the data's order: reward of the DPO model", higher=True, of="teacher"),
    Headline(
        "contrastive_reward_accuracy",
        "Pairs in the data's order: contrastive reward",
        higher=True,
        of="teacher",
    ),
    Headline("kl_dpo", "KL to the DPO model, per token", higher=None),
    Headline("kl_start", "KL to the start, per token", higher=None),
    Headline("agreement", "Agreement with the teacher, combined where there are two", higher=True),
    Headline("rouge_l", "ROUGE-L of generated answers", higher=True),
]


def headlines(run: RunData) -> list[Headline]:
    """The rows for this kind of run; what was not logged is left out by who draws them."""
    if run.edits:
        return _ON_FACTS
    if not run.on_pairs:
        return _ON_ANSWERS
    if run.argument("reverse"):  # it learns to order the pairs the other way round
        return [row._replace(higher=False if row.implicit else None) for row in _ON_PAIRS]
    return _ON_PAIRS
