"""Answers with labels: shapes of rows, refusals, the answer to another prompt beside each, batches."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from lit_llm.data.labelled_answers import LabelledAnswers, read_label
from lit_llm.data.preference_rows import UnusableRow
from tests.tiny import byte_level_tokenizer

ROWS = [
    {"prompt": f"Say number {i // 2}.", "answer": f"It is {i}." + " Yes." * (i % 4), "label": i % 3 != 0}
    for i in range(10)
]


def data_module(tmp_path, rows=ROWS, **settings) -> LabelledAnswers:
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    options = {"template": "plain", "max_length": 64, "max_prompt_length": 32, "batch_size": 2, "test": None}
    data = LabelledAnswers(**{"train": str(path), "validation": str(path), **options, **settings})
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(student_tokenizer=byte_level_tokenizer(), teacher_tokenizer=None),
        world_size=1,
        global_rank=0,
        accumulate_grad_batches=1,
        state=SimpleNamespace(fn=SimpleNamespace(value="fit")),
    )
    data.setup("fit")
    return data


def test_rows_are_read_as_they_were_written_and_keep_their_labels(tmp_path):
    part, tokenizer = data_module(tmp_path).sets["train"], byte_level_tokenizer()
    assert part.good == [row["label"] for row in ROWS]
    for row, example in zip(ROWS, part, strict=True):
        assert tokenizer.decode(example["chosen_ids"][:-1]) == row["answer"]
        assert example["chosen_ids"][-1] == tokenizer.eos_token_id
        assert tokenizer.decode(example["student_prompt_ids"]) == row["prompt"] + "\n"
    assert "10 answers, 6 good and 4 bad" in part.summary.text("train")


def test_beside_every_answer_stands_one_to_another_prompt(tmp_path):
    part = data_module(tmp_path).sets["train"]
    answers = {row["answer"]: row["prompt"] for row in ROWS}
    for row, example in zip(ROWS, part, strict=True):
        assert answers[example["rejected_text"]] != row["prompt"]
    assert len({example["rejected_text"] for example in part}) > len(part) // 3


def test_an_answer_to_another_prompt_is_cut_where_it_does_not_fit(tmp_path):
    rows = [
        {"prompt": "A rather long prompt, number one.", "answer": "Yes.", "label": True},
        {"prompt": "Two.", "answer": "No, " * 10, "label": False},
    ]
    for limit in (64, 40):
        part = data_module(tmp_path, rows, max_length=limit, max_prompt_length=32).sets["train"]
        long = part[0]
        assert long["num_prompt"] + long["num_rejected"] <= limit and long["num_rejected"] == len(long["rejected_ids"])
        assert long["num_longer"] == long["num_prompt"] + max(long["num_chosen"], long["num_rejected"])
    assert long["num_prompt"] + long["num_rejected"] == 40


@pytest.mark.parametrize(
    ("label", "good"), [(True, True), (False, False), ("good", True), ("Bad ", False), (1, True), (0, False)]
)
def test_labels_are_words_or_booleans(label, good):
    assert read_label(label) is good


@pytest.mark.parametrize("label", ["fine", None, 2, 0.5, ["good"]])
def test_other_labels_are_refused(label):
    with pytest.raises(UnusableRow, match="a label that is neither good nor bad"):
        read_label(label)


def test_bad_rows_are_refused_by_number_or_dropped_and_counted(tmp_path):
    rows = [{**row, "label": "good"} for row in ROWS[:6]]
    rows[2]["label"], rows[4]["answer"] = "so so", " "
    with pytest.raises(
        ValueError, match=r"2 of the 6 rows .* make no labelled answer: 1 with an empty answer \(row 4\)"
    ):
        data_module(tmp_path, rows)
    part = data_module(tmp_path, rows, bad_rows="drop").sets["train"]
    assert len(part) == 4 and "1 with a label that is neither good nor bad" in part.summary.text("train")


def test_answers_to_a_single_prompt_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no answer to another prompt than 'Say"):
        data_module(tmp_path, ROWS[:2])


def test_rows_without_label_or_pair_are_refused_with_what_was_found(tmp_path):
    with pytest.raises(ValueError, match="has no column 'label'; it has: prompt, answer"):
        data_module(tmp_path, [{"prompt": "a", "answer": "b"}])


def test_columns_have_the_names_that_the_file_gives_them(tmp_path):
    rows = [{"prompt": r["prompt"], "completion": r["answer"], "label": r["label"]} for r in ROWS]
    part = data_module(tmp_path, rows, columns={"answer": "completion"}).sets["train"]
    assert part.good == [row["label"] for row in ROWS]


def test_conversations_bring_their_own_prompt(tmp_path):
    rows = []
    for row in ROWS:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
        rows.append({"answer": turns, "label": row["label"]})
    ours, theirs = (data_module(tmp_path, given).sets["train"] for given in (rows, ROWS))
    assert [example["chosen_ids"] for example in ours] == [example["chosen_ids"] for example in theirs]
    assert [example["student_prompt_ids"] for example in ours] == [e["student_prompt_ids"] for e in theirs]


def test_pairs_give_the_chosen_answers_as_good_and_the_rejected_ones_as_bad(tmp_path):
    rows = [{"prompt": f"Say {i}.", "chosen": f"{i}, sir.", "rejected": f"Not {i}.", "checks": None} for i in range(5)]
    part = data_module(tmp_path, rows).sets["train"]
    assert part.good == [True] * 5 + [False] * 5
    assert [example["chosen_text"] for example in part] == [r["chosen"] for r in rows] + [r["rejected"] for r in rows]
    for example in part:
        assert example["prompt_text"].split()[1].strip(".\n") not in example["rejected_text"]


def test_batches_carry_labels_totals_and_what_the_reference_said(tmp_path):
    data = data_module(tmp_path)
    data.reference["train"] = torch.arange(20.0).view(10, 2)
    for batch in data.train_dataloader():
        good = [ROWS[example]["label"] for example in batch.examples]
        assert batch.good_B.tolist() == good and batch.num_good == sum(good) and batch.step_pairs == 2
        assert batch.reference_B2.tolist() == [[2.0 * example, 2.0 * example + 1] for example in batch.examples]
        assert batch.to("cpu").good_B.dtype == torch.bool


def test_every_prompt_is_answered_once_with_a_good_answer_as_reference(tmp_path):
    prompts = data_module(tmp_path).prompts("validation")
    assert [prompt.text for prompt in prompts] == [f"Say number {i}.\n" for i in range(5)]
    good = {row["answer"] for row in ROWS if row["label"]}
    assert all(prompt.references[0] in good for prompt in prompts)
    assert len(data_module(tmp_path).prompts("validation", 2)) == 2
