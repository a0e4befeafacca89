"""Multiple choice: the likelihoods are those of each answer alone, and the table counts what they say."""

import json
from pathlib import Path

import pytest
import torch

from lit_llm.models.language_model import ModelSpec
from tests.tiny import tiny_model_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import multiple_choice

    return multiple_choice


def test_likelihoods_are_the_sums_over_each_answers_tokens(tool, tmp_path):
    model = ModelSpec(source=str(tiny_model_folder(tmp_path, seed=3))).load().eval()
    questions = [
        tool.Question("en", "The cat sat on the", ("mat", "mountain of hay"), 0),
        tool.Question("tr", "Ev", ("büyük", "küçük ve eski", "yok"), 2),
    ]
    found = tool.log_likelihoods(model, questions, batch_size=2)
    for question, of_answers in zip(questions, found, strict=True):
        start = len(model.tokenizer(question.prompt)["input_ids"])
        for choice, value in zip(question.choices, of_answers, strict=True):
            ids = torch.tensor([model.tokenizer(f"{question.prompt} {choice}")["input_ids"]])
            with torch.no_grad():
                log_probs = model.transformer(ids).logits[0].double().log_softmax(-1)
            wanted = sum(log_probs[at - 1, ids[0, at]].item() for at in range(start, ids.shape[1]))
            assert value == pytest.approx(wanted, abs=1e-4)


def test_the_likeliest_answer_is_given_and_length_is_taken_into_account(tool):
    questions = [tool.Question("en", "a", ("b", "a long answer"), 1), tool.Question("en", "a", ("b", "c"), 0)]
    assert (
        tool.table(questions, [[-2.0, -3.0], [-1.0, -2.0]]).splitlines()[-1] == "| en | 2 | 50.0 ± 69.3 | 100.0 ± 0.0 |"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"language": "en", "prompt": "a", "choices": ["b", "c"]}, "line 1: it lacks 'label'"),
        (
            {"language": "en", "prompt": "a", "choices": ["b", "c"], "label": 2},
            "label is 2, but the answers are 0 to 1",
        ),
        ({"language": "en", "prompt": "a", "choices": ["b", "b"], "label": 0}, "two different ones"),
        ({"language": "en", "prompt": " ", "choices": ["b", "c"], "label": 0}, "is empty"),
        ({"language": "xx", "prompt": "a", "choices": ["b", "c"], "label": 0}, "xx"),
    ],
)
def test_a_line_that_is_no_question_is_named(tool, tmp_path, row, message):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        tool.read_questions(file)


def test_no_questions_are_refused(tool, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no question"):
        tool.read_questions(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tool.read_questions(tmp_path / "nowhere.jsonl")
