"""Scores of questions about edited facts: a protocol for each way of asking, none mixed with another."""

from __future__ import annotations

from lit_llm.methods.edit_scores import EditScores, Question


def question(fact: str, *, exact: bool, said: str | None) -> Question:
    predicted = (1,) if exact else (2,)
    texts = {"prompt": f"{fact} is in", "answer": "Peru", "said": said, "wanted_said": "Peru", "said_before": "Chad"}
    return Question(fact, "reliability", "en", **texts, predicted=predicted, wanted=(1,), nll=1.0)


def test_a_matrix_holds_one_protocol_and_counts_only_questions_asked_by_it():
    scores = EditScores(["en"], ["reliability"])
    scores.add([question("a", exact=True, said="Chad"), question("b", exact=True, said=None)])
    scores.add_crossed("en", [question("a", exact=False, said="Peru."), question("b", exact=True, said=None)])
    matrices = scores.report()["matrices"]["reliability"]
    assert matrices["exact"]["values"] == [[50.0], [100.0]]
    assert matrices["generated"]["values"] == [[100.0], [0.0]]


def test_answers_are_right_by_what_was_written():
    scores = EditScores(["en"])
    scores.add([question("a", exact=True, said="Chad"), question("b", exact=False, said="peru")])
    assert [answer["right"] for answer in scores.report()["answers"]] == [False, True]
