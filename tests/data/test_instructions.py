"""From rows of text to batches: templates, limits, counts and both tokenisations."""

import gzip
import json
from types import SimpleNamespace

import datasets
import pytest
import torch

from lit_llm.data.instructions import Instructions
from lit_llm.data.minimum_edit import nearest_tokens
from lit_llm.data.rows import load_rows
from lit_llm.data.templates import render_prompt
from lit_llm.data.tokenized import Encoding, tokenize_rows
from lit_llm.data.vocabulary import token_spellings
from tests.tiny import byte_level_tokenizer, sentencepiece_tokenizer

ROWS = [{"prompt": f"Say number {i}.", "response": f"The number is {i}, naïve 世界."} for i in range(10)]
RULES = Encoding("plain", None, "auto", "answers", 64, 32, "keep_end", "cut", "bytes")


def encoding(**changes) -> Encoding:
    from dataclasses import replace

    return replace(RULES, **changes)


def tokenized(rows, rules=RULES, teacher=None, student=None):
    table = datasets.Dataset.from_list(rows)
    return tokenize_rows(table, rules, student or byte_level_tokenizer(), teacher, workers=0, name="rows")


def data_module(tmp_path, teacher=None, world_size=1, alignments=("bytes", "released"), **settings) -> Instructions:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    options = {"template": "plain", "max_length": 64, "max_prompt_length": 32, "batch_size": 2}
    data = Instructions(**{"train": str(path), "validation": str(path), "test": None, **options, **settings})
    tokenizers = {"student_tokenizer": byte_level_tokenizer(), "teacher_tokenizer": teacher}
    method = SimpleNamespace(**tokenizers, alignments=alignments)
    data.trainer = SimpleNamespace(
        lightning_module=method,
        world_size=world_size,
        global_rank=0,
        accumulate_grad_batches=1,
        state=SimpleNamespace(fn=SimpleNamespace(value="fit")),
    )
    data.setup("fit")
    return data


def test_the_answer_and_its_end_are_supervised_and_the_prompt_is_not():
    tokenizer, examples = byte_level_tokenizer(), tokenized(ROWS)
    row = examples[3]
    prompt, answer = row["student_ids"][: row["student_prompt"]], row["student_ids"][row["student_prompt"] :]
    assert tokenizer.decode(prompt) == "Say number 3.\n"
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]) == ROWS[3]["response"]
    assert row["num_supervised"] == len(answer)


def test_supervising_everything_counts_all_but_the_first_token():
    row = tokenized(ROWS, encoding(supervise="all"))[0]
    assert row["student_prompt"] == 0 and row["num_supervised"] == len(row["student_ids"]) - 1


def test_a_long_prompt_keeps_its_end_and_is_counted():
    examples = tokenized(ROWS, encoding(max_prompt_length=3))
    whole = tokenized(ROWS)
    assert examples[0]["student_prompt_ids"] == whole[0]["student_prompt_ids"][-3:]
    assert examples.summary.prompts_cut == 10


def test_a_cut_answer_has_no_end_token_and_is_counted():
    examples = tokenized(ROWS, encoding(max_length=20, max_prompt_length=10))
    assert examples.summary.answers_cut == 10
    assert all(examples[i]["student_ids"][-1] != byte_level_tokenizer().eos_token_id for i in range(10))


def test_long_examples_can_be_dropped_instead():
    rows = [*ROWS, {"prompt": "Say it.", "response": "long " * 60}]
    summary = tokenized(rows, encoding(long_answers="drop")).summary
    assert summary.examples == 10 and summary.dropped == {"answer too long": 1}


def test_empty_answers_are_dropped_with_a_reason():
    summary = tokenized([*ROWS, {"prompt": "a", "response": "  "}, {"prompt": "", "response": "b"}]).summary
    assert summary.dropped == {"empty answer": 1, "empty prompt": 1}
    assert "dropped: 1 (empty answer), 1 (empty prompt)" in summary.text("rows")


def test_the_summary_counts_tokens_of_what_is_kept():
    examples = tokenized(ROWS)
    assert examples.summary.tokens == sum(len(examples[i]["student_ids"]) for i in range(10))
    assert examples.summary.supervised == sum(examples.supervised)


def test_two_tokenizers_give_two_tokenisations_of_the_same_answer_and_its_pairs():
    student, teacher = byte_level_tokenizer(), sentencepiece_tokenizer()
    examples = tokenized(ROWS, teacher=teacher)
    row = examples[1]
    answers = [row["student_ids"][row["student_prompt"] :], row["teacher_ids"][row["teacher_prompt"] :]]
    assert teacher.decode(answers[1], skip_special_tokens=True) == ROWS[1]["response"]
    assert len(row["pair_student"]) == row["num_pairs"] > 3
    for ours, theirs in zip(row["pair_student"][:-1], row["pair_teacher"][:-1], strict=True):
        texts = student.decode([answers[0][ours]]), teacher.convert_ids_to_tokens(answers[1][theirs])
        assert texts[0].strip() == texts[1].replace("▁", " ").strip() or texts[1].startswith("<0x")
    assert row["pair_student"][-1] == len(answers[0]) - 1 and row["pair_teacher"][-1] == len(answers[1]) - 1


def test_tokenised_rows_are_found_again_in_the_cache_and_made_anew_for_other_limits(monkeypatch):
    tokenized(ROWS)
    calls = []
    monkeypatch.setattr("lit_llm.data.tokenized.RowEncoder.__call__", lambda self, row: calls.append(row) or 1 / 0)
    tokenized(ROWS)
    assert not calls
    with pytest.raises(ZeroDivisionError):
        tokenized(ROWS, encoding(max_length=63))


def test_alpaca_prompts_have_the_published_wording():
    text = render_prompt(None, "alpaca", "Add.", "1 and 2")
    assert text.startswith(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
    )
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n")
    assert "### Input" not in render_prompt(None, "alpaca", "Add.")


def test_a_tokenizer_that_begins_texts_begins_prompts_once():
    from tokenizers import processors

    tokenizer = sentencepiece_tokenizer()
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    ids = tokenized(ROWS, student=tokenizer)[0]["student_ids"]
    assert ids[0] == begin and ids.count(begin) == 1
    assert begin not in tokenized(ROWS, encoding(begin="never"), student=tokenizer)[0]["student_ids"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "csv", "folder"])
def test_rows_are_read_from(kind, tmp_path):
    table, path = datasets.Dataset.from_list(ROWS), tmp_path / f"rows.{kind}"
    if kind == "folder":
        table.save_to_disk(path)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        getattr(table, f"to_{kind}")(path)
    assert list(load_rows(str(path), {}, ("prompt", "response"))) == ROWS


def test_a_part_of_a_saved_data_set_can_be_named(tmp_path):
    parts = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "small": datasets.Dataset.from_list(ROWS[:2])}
    )
    parts.save_to_disk(tmp_path / "both")
    assert len(load_rows(f"{tmp_path / 'both'}@small", {}, ("prompt",))) == 2
    with pytest.raises(ValueError, match="train, small"):
        load_rows(f"{tmp_path / 'both'}@other", {}, ("prompt",))


def test_columns_are_renamed_and_may_replace_others(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "a", "output": "b", "prompt": "old"}))
    rows = load_rows(str(path), {"prompt": "instruction", "response": "output"}, ("prompt", "response"))
    assert rows[0] == {"prompt": "a", "response": "b"}


def test_the_shipped_set_is_found_by_name():
    assert len(load_rows("demo:train", {}, ("prompt", "response"))) > 500
    with pytest.raises(ValueError, match="demo:validation"):
        load_rows("demo:other", {}, ("prompt",))


def test_a_batch_of_two_tokenizers_points_at_equal_texts(tmp_path):
    teacher = sentencepiece_tokenizer()
    batch = next(iter(data_module(tmp_path, teacher).train_dataloader()))
    assert batch.step_pairs == len(batch.pair_student_A) == len(batch.pair_teacher_A)
    assert batch.step_tokens == batch.student.num_supervised
    ends = [
        (batch.student.target_T[i].item(), batch.teacher.target_T[j].item())
        for i, j in zip(batch.pair_student_A, batch.pair_teacher_A, strict=True)
    ]
    assert ends.count((byte_level_tokenizer().eos_token_id, teacher.eos_token_id)) == 2


def test_evaluation_goes_through_all_examples_once_in_batches_of_similar_length(tmp_path):
    loader = data_module(tmp_path, eval_batch_size=3).val_dataloader()
    for _ in range(2):
        assert sorted(i for batch in loader for i in batch.examples) == list(range(10))


def test_workers_build_the_same_batches(tmp_path):
    ours = list(data_module(tmp_path).train_dataloader())
    theirs = list(data_module(tmp_path, num_workers=2).train_dataloader())
    assert all(torch.equal(a.student.ids_BL, b.student.ids_BL) for a, b in zip(ours, theirs, strict=True))


def test_prompts_for_generation_carry_all_references(tmp_path):
    rows = [{"prompt": "Say.", "response": ["one", "two"]}]
    path = tmp_path / "references.jsonl"
    path.write_text(json.dumps(rows[0]))
    data = data_module(tmp_path, validation=str(path))
    prompt = data.prompts("validation")[0]
    assert prompt.references == ["one", "two"] and prompt.teacher_ids is None
    assert byte_level_tokenizer().decode(prompt.student_ids) == "Say.\n"
    assert data.prompts("test") == []


def test_packed_rows_hold_both_readings_of_their_examples_within_the_limit(tmp_path):
    data = data_module(tmp_path, sentencepiece_tokenizer(), pack_to=128, batch_size=2)
    batches, seen = list(data.train_dataloader()), []
    for batch in batches:
        seen += batch.examples
        assert len(batch.student.ids_BL) == len(batch.teacher.ids_BL) <= 2
        for side, name in ((batch.student, "student_ids"), (batch.teacher, "teacher_ids")):
            assert side.ids_BL.shape[1] <= 128
            texts = [data.sets["train"][example][name] for example in batch.examples]
            assert side.length_B.tolist() == [len(text) for text in texts]
            starts = (side.position_ids_RL == 0).flatten().nonzero().squeeze(1)
            firsts = side.ids_BL.flatten()[starts][: len(texts)].tolist()
            assert firsts[0] == texts[0][0]
            assert side.target_T.tolist() == [
                token
                for text, example in zip(texts, batch.examples, strict=True)
                for token in text[data.sets["train"][example][name.replace("_ids", "_prompt")] :]
            ]
        assert max(len(batch.student.length_B) / len(batch.student.ids_BL), 1) > 1
    assert sorted(seen) == list(range(10)) and len(batches) == len(data.train_dataloader())


def test_a_budget_of_tokens_bounds_both_padded_grids(tmp_path):
    teacher = sentencepiece_tokenizer()
    data = data_module(tmp_path, teacher, batch_size=None, batch_tokens=200)
    batches = list(data.train_dataloader())
    assert sorted(i for batch in batches for i in batch.examples) == list(range(10))
    assert max(max(b.student.ids_BL.numel(), b.teacher.ids_BL.numel()) for b in batches) <= 200
    assert {batch.step_pairs for batch in batches} == {len(batch.pair_student_A) for batch in batches}


def test_an_example_beyond_the_budget_is_refused_with_both_values(tmp_path):
    for name in ("batch_tokens", "pack_to"):
        data = data_module(tmp_path, **{"batch_size": None, name: 20})
        longest = max(data.sets["train"].longer_lengths)
        with pytest.raises(ValueError, match=f"data.{name} is 20, but example .* has {longest} tokens"):
            data.train_dataloader()


def test_evaluation_is_never_packed(tmp_path):
    data = data_module(tmp_path, pack_to=128)
    assert all(batch.student.position_ids_RL is None for batch in data.val_dataloader())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 4, "batch_tokens": 256}, r"data.batch_size \(4\) and data.batch_tokens \(256\)"),
        ({"pack_to": 512, "batch_tokens": 256}, r"data.pack_to \(512\).*data.batch_tokens \(256\)"),
        ({"batch_tokens": 0}, "data.batch_tokens is 0"),
        ({"pack_to": -1}, "data.pack_to is -1"),
    ],
)
def test_sizes_of_batches_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Instructions(**settings)


def test_eight_examples_are_a_micro_batch_unless_something_else_is_said():
    assert Instructions().batch_size == 8 and Instructions(pack_to=512).batch_size == 8
    assert Instructions(batch_tokens=512).batch_size is None


@pytest.mark.parametrize("alignment", ["kth", "minimum_edit", "groups"])
def test_pairs_are_made_as_the_method_asks(tmp_path, alignment):
    teacher = sentencepiece_tokenizer()
    batch = next(iter(data_module(tmp_path, teacher, alignments=(alignment,)).train_dataloader()))
    ours, theirs = batch.student, batch.teacher
    counts = [torch.bincount(side.sequence_T) for side in (ours, theirs)]
    starts = [count.cumsum(0) - count for count in counts]
    if alignment == "kth":
        assert len(batch.pair_student_A) == torch.minimum(*counts).sum()
        sequence_A = ours.sequence_T[batch.pair_student_A]
        places = [
            rows - start[sequence_A]
            for rows, start in zip((batch.pair_student_A, batch.pair_teacher_A), starts, strict=True)
        ]
        assert torch.equal(*places)
    if alignment == "minimum_edit":
        assert batch.step_pairs == len(batch.pair_student_A) > 4
        nearest_W = nearest_tokens(token_spellings(byte_level_tokenizer()), token_spellings(teacher))
        inputs = [side.ids_BL.flatten()[side.position_T] for side in (ours, theirs)]
        assert torch.equal(inputs[0][batch.pair_student_A], nearest_W[inputs[1][batch.pair_teacher_A]])
    if alignment == "groups":
        assert batch.step_pairs == batch.pieces_student_A.sum() == ours.num_supervised
        assert batch.pieces_teacher_A.sum() == theirs.num_supervised
        assert torch.equal(batch.pair_teacher_A[1:], batch.pair_teacher_A[:-1] + batch.pieces_teacher_A[:-1])
    else:
        assert batch.pieces_student_A is None
    assert torch.equal(ours.sequence_T[batch.pair_student_A], theirs.sequence_T[batch.pair_teacher_A])


def test_a_pairing_that_a_method_does_not_know_is_refused_with_both(tmp_path):
    with pytest.raises(ValueError, match="data.alignment is 'bytes', but SimpleNamespace pairs tokens by 'kth'"):
        data_module(tmp_path, sentencepiece_tokenizer(), alignments=("kth",), alignment="bytes")
