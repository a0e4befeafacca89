"""From rows of preference data to batches of pairs: shapes of rows, refusals, limits, totals and resume."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch

from lit_llm.data.preference_pairs import PairEncoding, encode_turns, tokenize_pairs
from lit_llm.data.preference_rows import UnusableRow, read_pair
from lit_llm.data.preferences import Preferences
from tests.tiny import byte_level_tokenizer, sentencepiece_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<sys>Be kind.</sys>\n{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
RULES = PairEncoding("plain", None, "auto", 96, 48, "keep_end", "cut")
ROWS = [
    {"prompt": f"Say number {i}.", "chosen": f"The number is {i}, my friend.", "rejected": "No. " * (1 + 4 * (i % 4))}
    for i in range(11)
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def chat_tokenizer():
    tokenizer = sentencepiece_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encoding(**changes):
    from dataclasses import replace

    return replace(RULES, **changes)


def tokenized(rows, rules=RULES, tokenizer=None, bad_rows="refuse"):
    table = datasets.Dataset.from_list(rows)
    return tokenize_pairs(table, rules, tokenizer or byte_level_tokenizer(), bad_rows=bad_rows, workers=0, name="pairs")


def data_module(tmp_path, rows=ROWS, rank=0, world_size=1, accumulate=1, **settings):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    options = {"template": "plain", "max_length": 96, "max_prompt_length": 48, "batch_size": 2}
    data = Preferences(**{"train": str(path), "validation": str(path), "test": None, **options, **settings})
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(student_tokenizer=byte_level_tokenizer(), teacher_tokenizer=None),
        world_size=world_size,
        global_rank=rank,
        accumulate_grad_batches=accumulate,
        state=SimpleNamespace(fn=SimpleNamespace(value="fit")),
    )
    data.setup("fit")
    return data


# --- shapes of rows


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
        {"prompt": "Hi", "chosen": [user("Hi"), assistant("Yes")], "rejected": [user("Hi"), assistant("No")]},
        {"chosen": [user("Hi"), assistant("Yes")], "rejected": [user("Hi"), assistant("No")]},
        {"prompt": [user("Hi")], "chosen": [assistant("Yes")], "rejected": [assistant("No")]},
        {"prompt": "Hi", "chosen": [assistant("Yes")], "rejected": [assistant("No")]},
        {"prompt": [user("Hi")], "chosen": "Yes", "rejected": "No"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
    ],
)
def test_every_shape_of_one_question_gives_the_same_pair(row):
    pair = read_pair(row)
    assert (pair.turns, pair.chosen, pair.rejected) == ([user("Hi")], "Yes", "No")


def test_conversations_keep_their_turns_and_their_system_message():
    turns = [system("Be brief."), user("Hi"), assistant("Hello"), user("Who?")]
    row = {"chosen": [*turns, assistant("Me.")], "rejected": [*turns, assistant("You.")]}
    assert read_pair(row).turns == turns
    tokenizer = chat_tokenizer()
    text = tokenized([row], encoding(template="chat"), tokenizer)[0]["prompt_text"]
    assert text == "<s><system>Be brief.</>\n<user>Hi</>\n<assistant>Hello</>\n<user>Who?</>\n<assistant>"


def test_a_transcript_of_several_turns_is_read_as_a_conversation():
    before = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Who?\n\nAssistant:"
    pair = read_pair({"chosen": f"{before} Me.", "rejected": f"{before} You."})
    assert pair.turns == [user("Hi"), assistant("Hello"), user("Who?")] and pair.chosen == "Me."


def test_shared_turns_win_over_the_prompt_column():
    chosen, rejected = ([user("Full question"), assistant(answer)] for answer in ("Yes", "No"))
    assert read_pair({"prompt": "id-17", "chosen": chosen, "rejected": rejected}).turns == [user("Full question")]


def test_prompt_and_answers_read_as_they_were_written():
    tokenizer, pairs = byte_level_tokenizer(), tokenized(ROWS)
    row = pairs[3]
    assert tokenizer.decode(row["student_prompt_ids"]) == "Say number 3.\n"
    for side in ("chosen", "rejected"):
        assert row[f"{side}_ids"][-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row[f"{side}_ids"][:-1]) == ROWS[3][side] == row[f"{side}_text"]


def test_scores_and_checks_travel_with_their_row():
    checks = [[{"kind": "max_words", "value": 3}, {"kind": "include", "words": ["a", "b"]}], None]
    rows = [{**row, "score_chosen": 2, "score_rejected": -0.5, "checks": c} for row, c in zip(ROWS[:2], checks)]
    pairs = tokenized(rows)
    assert (pairs[0]["score_chosen"], pairs[0]["score_rejected"]) == (2.0, -0.5)
    assert pairs.prompt(0).checks == checks[0] and pairs.prompt(1).checks is None
    assert tokenized(ROWS)[0]["score_chosen"] is None
    assert pairs.prompt(0).references == [ROWS[0]["chosen"]] and pairs.prompt(0).teacher_ids is None


# --- refusals


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "same", "rejected": "same "}, "identical answers"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "an empty answer"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "an empty answer"),
        ({"prompt": " ", "chosen": "b", "rejected": "c"}, "an empty prompt"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "an empty prompt"),
        ({"chosen": "b", "rejected": "c"}, "no prompt"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("A"), assistant("c")]},
            "different turns before the answers",
        ),
        ({"chosen": [user("a")], "rejected": [user("a")]}, "a last turn that is not the assistant's"),
        (
            {"prompt": [user("a"), assistant("b")], "chosen": "c", "rejected": "d"},
            "a prompt that does not end with the user's turn",
        ),
        (
            {"chosen": [{"from": "gpt", "value": "b"}], "rejected": [assistant("c")]},
            "messages without role and content",
        ),
    ],
)
def test_a_row_that_makes_no_pair_says_why(row, reason):
    with pytest.raises(UnusableRow) as raised:
        read_pair(row)
    assert str(raised.value) == reason


BAD = [*ROWS[:3], {**ROWS[3], "rejected": ROWS[3]["chosen"]}, {**ROWS[4], "chosen": ""}, {**ROWS[5], "chosen": ""}]


def test_bad_rows_are_refused_with_reason_rows_number_and_next_step():
    with pytest.raises(ValueError) as raised:
        tokenized(BAD)
    told = str(raised.value)
    assert (
        "3 of the 6 rows of pairs make no pair: 1 with identical answers (row 3); 2 with an empty answer (row 4, 5)"
        in told
    )
    assert "Row 3 begins: 'Say number 3.'" in told and "data.bad_rows: drop" in told


def test_bad_rows_may_be_dropped_and_are_counted():
    pairs = tokenized(BAD, bad_rows="drop")
    assert len(pairs) == 3 and pairs.summary.dropped == {"identical answers": 1, "an empty answer": 2}
    assert "dropped: 1 with identical answers, 2 with an empty answer" in pairs.summary.text("pairs")


def test_nothing_left_is_an_error_with_the_reasons():
    with pytest.raises(
        ValueError, match="No usable pair is left of the 2 rows of pairs: 2 dropped with an empty answer"
    ):
        tokenized(BAD[4:], bad_rows="drop")


def test_a_conversation_without_a_chat_template_is_refused_with_the_setting():
    turns = [user("Hi"), assistant("Hello"), user("Who?")]
    row = {"chosen": [*turns, assistant("Me.")], "rejected": [*turns, assistant("You.")]}
    with pytest.raises(ValueError, match="conversation of 3 turns.*data.template is 'alpaca'.*Set data.template: chat"):
        tokenized([row], encoding(template="alpaca"))


def test_two_system_messages_are_refused_with_both():
    row = {"prompt": [system("Be brief."), user("Hi")], "chosen": "Yes", "rejected": "No"}
    with pytest.raises(ValueError, match="data.system is 'Be long.', but a row has .* 'Be brief.'"):
        tokenized([row], encoding(template="chat", system="Be long."), chat_tokenizer())


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"data.max_prompt_length \(64\).*data.max_length \(64\)"):
        Preferences(max_length=64, max_prompt_length=64)
    with pytest.raises(ValueError, match="data.batch_size is 0"):
        Preferences(batch_size=0)


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path):
    data = data_module(tmp_path)
    data.trainer.lightning_module.teacher_tokenizer = sentencepiece_tokenizer()
    with pytest.raises(ValueError, match="another tokenizer"):
        data.train_dataloader()


def test_a_shipped_part_that_does_not_exist_is_refused_with_those_that_do(tmp_path):
    with pytest.raises(ValueError, match="demo-preferences:judge"):
        data_module(tmp_path, train="demo-preferences:other")


# --- limits


def test_a_long_prompt_keeps_the_header_and_its_end():
    tokenizer = chat_tokenizer()
    rules = encoding(template="chat", max_prompt_length=60)
    question = "word " * 60 + "Why?"
    text, ids, cut = encode_turns(tokenizer, rules, [user(question)])
    read = tokenizer.decode(ids)
    assert cut and len(ids) == 60 and ids.count(tokenizer.bos_token_id) == 1
    assert read.startswith(("<s><sys>Be kind.</sys>\n<user>", "<s> <sys>Be kind.</sys>\n<user>"))
    assert read.endswith("Why?</>\n<assistant>") and question in text


def test_a_long_conversation_loses_its_oldest_turns_whole():
    tokenizer = chat_tokenizer()
    turns = [system("Be brief."), user("word " * 30), assistant("well " * 30), user("And now?")]
    _, ids, cut = encode_turns(tokenizer, encoding(template="chat", max_prompt_length=60), turns)
    _, short, whole = encode_turns(tokenizer, encoding(template="chat", max_prompt_length=60), [turns[0], turns[3]])
    assert cut and not whole and ids == short
    _, ids, _ = encode_turns(tokenizer, encoding(template="chat", max_prompt_length=60), [*turns[:3], user("so " * 80)])
    read = tokenizer.decode(ids)
    assert len(ids) == 60 and "Be brief." in read and "word" not in read and read.endswith("so </>\n<assistant>")


def test_the_cut_of_an_alpaca_prompt_keeps_the_words_around_the_instruction():
    tokenizer = byte_level_tokenizer()
    whole = encode_turns(tokenizer, encoding(template="alpaca", max_prompt_length=999), [user("x " * 90 + "end")])[1]
    _, ids, cut = encode_turns(tokenizer, encoding(template="alpaca", max_prompt_length=120), [user("x " * 90 + "end")])
    read = tokenizer.decode(ids)
    assert cut and len(whole) > 120 == len(ids)
    assert read.startswith("Below is an instruction") and "### Instruction:\nx" in read.replace("\n ", "\n")
    assert read.endswith("end\n\n### Response:\n")


def test_a_limit_that_the_template_fills_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="data.max_prompt_length is 12, but the template's own words.* take .* tokens"):
        encode_turns(chat_tokenizer(), encoding(template="chat", max_prompt_length=12), [user("word " * 50)])


@pytest.mark.parametrize(("rule", "left"), [("keep_end", 11), ("drop", 10)])
def test_long_prompts_are_cut_or_dropped_and_counted(rule, left):
    rows = [{**ROWS[0], "prompt": "long " * 60}, *ROWS[1:]]
    summary = tokenized(rows, encoding(long_prompts=rule)).summary
    assert summary.pairs == left
    assert (summary.prompts_cut, summary.dropped) == (
        (1, {}) if rule == "keep_end" else (0, {"a prompt that is too long": 1})
    )


def test_long_prompts_may_be_refused_whatever_happens_to_bad_rows():
    rows = [*BAD, {**ROWS[6], "prompt": "long " * 60}]
    with pytest.raises(ValueError, match=r"1 of the 7 rows .* 1 with a prompt that is too long \(row 6\)(.|\n)*\(48\)"):
        tokenized(rows, encoding(long_prompts="refuse"), bad_rows="drop")


@pytest.mark.parametrize(("rule", "ends"), [("cut", False), ("cut_with_eos", True)])
def test_a_long_answer_is_cut_with_or_without_an_end(rule, ends):
    tokenizer = byte_level_tokenizer()
    rows = [{**ROWS[0], "chosen": "long " * 60}]
    pairs = tokenized(rows, encoding(long_answers=rule, max_length=64))
    assert len(pairs[0]["student_prompt_ids"]) + len(pairs[0]["chosen_ids"]) == 64
    assert (pairs[0]["chosen_ids"][-1] == tokenizer.eos_token_id) == ends
    assert pairs[0]["rejected_ids"][-1] == tokenizer.eos_token_id and pairs.summary.answers_cut == 1


def test_pairs_with_a_long_answer_can_be_dropped_and_answers_equal_when_cut_always_are():
    rows = [*ROWS, {**ROWS[0], "rejected": "long " * 60}]
    assert tokenized(rows, encoding(long_answers="drop")).summary.dropped == {"an answer that is too long": 1}
    rows = [*ROWS, {**ROWS[0], "chosen": "long " * 60 + "a", "rejected": "long " * 60 + "b"}]
    assert tokenized(rows).summary.dropped == {"answers that are equal when cut": 1}


def test_the_summary_counts_both_sides():
    pairs = tokenized(ROWS)
    counts = [[len(pairs[i][f"{side}_ids"]) for i in range(len(pairs))] for side in ("chosen", "rejected")]
    summary = pairs.summary
    assert (summary.chosen_tokens, summary.rejected_tokens) == tuple(map(sum, counts))
    assert summary.chosen_longer == sum(a > b for a, b in zip(*counts, strict=True))
    assert f"{summary.chosen_tokens / 11:.1f} and {summary.rejected_tokens / 11:.1f}" in summary.text("pairs")


# --- batches


def test_every_answer_token_is_supervised_from_the_first_to_the_end(tmp_path):
    data = data_module(tmp_path)
    batch = next(iter(data.train_dataloader()))
    for side, tokens in (("chosen", batch.chosen), ("rejected", batch.rejected)):
        flat, width = tokens.ids_BL.flatten(), tokens.ids_BL.shape[1]
        for number, example in enumerate(batch.examples):
            row = data.sets["train"][example]
            here = tokens.sequence_T == number
            answer, prompt = row[f"{side}_ids"], row["student_prompt_ids"]
            assert tokens.target_T[here].tolist() == answer
            assert answer[-1] == byte_level_tokenizer().eos_token_id
            places = tokens.position_T[here] - number * width
            assert places.tolist() == list(range(len(prompt) - 1, len(prompt) + len(answer) - 1))
            assert flat[tokens.position_T[here]].tolist() == [prompt[-1], *answer[:-1]]
            assert tokens.length_B[number] == len(prompt) + len(answer)
    assert batch.num_tokens == batch.chosen.length_B.sum() + batch.rejected.length_B.sum()


def test_swapping_exchanges_the_sides_with_their_totals_and_twice_is_nothing(tmp_path):
    data = data_module(tmp_path, accumulate=2)
    data.reference["train"] = torch.arange(22.0).view(11, 2)
    batch = next(iter(data.train_dataloader()))
    other = batch.swapped()
    assert other.chosen is batch.rejected and other.rejected is batch.chosen
    assert (other.step_tokens, other.step_rejected_tokens) == (batch.step_rejected_tokens, batch.step_tokens)
    assert batch.step_tokens != batch.step_rejected_tokens
    assert torch.equal(other.reference_B2, batch.reference_B2[:, [1, 0]])
    assert torch.equal(other.swapped().reference_B2, batch.reference_B2) and other.swapped().chosen is batch.chosen


def test_stored_log_probabilities_follow_their_pairs(tmp_path):
    data = data_module(tmp_path)
    assert next(iter(data.train_dataloader())).reference_B2 is None
    data.reference["train"] = torch.arange(22.0).view(11, 2)
    for batch in data.train_dataloader():
        assert batch.reference_B2[:, 0].tolist() == [2.0 * example for example in batch.examples]
    assert next(iter(data.val_dataloader())).reference_B2 is None
    data.reference["train"] = torch.zeros(10, 2)
    with pytest.raises(ValueError, match=r"shape \(10, 2\).*\(11, 2\) is needed"):
        next(iter(data.train_dataloader()))


def test_a_batch_moves_as_a_whole(tmp_path):
    data = data_module(tmp_path)
    data.reference["train"] = torch.zeros(11, 2)
    moved = next(iter(data.train_dataloader())).to("meta")
    assert {moved.chosen.ids_BL.device.type, moved.rejected.target_T.device.type, moved.reference_B2.device.type} == {
        "meta"
    }


def test_splits_over_accumulation_and_ranks_give_the_same_totals(tmp_path):
    def steps(world_size, accumulate, batch_size):
        ranks = [
            list(
                data_module(
                    tmp_path,
                    ROWS[:8],
                    rank=r,
                    world_size=world_size,
                    accumulate=accumulate,
                    batch_size=batch_size,
                    bucket=1,
                ).train_dataloader()
            )
            for r in range(world_size)
        ]
        found = []
        for start in range(0, len(ranks[0]), accumulate):
            micro = [batch for batches in ranks for batch in batches[start : start + accumulate]]
            totals = {(b.step_pairs, b.step_tokens, b.step_rejected_tokens) for b in micro}
            assert len(totals) == 1
            pairs, tokens, rejected = totals.pop()
            assert pairs == sum(len(b.examples) for b in micro)
            assert tokens == sum(b.chosen.num_supervised for b in micro)
            assert rejected == sum(b.rejected.num_supervised for b in micro)
            found.append((sorted(i for b in micro for i in b.examples), pairs, tokens, rejected))
        return found

    whole = steps(world_size=1, accumulate=1, batch_size=4)
    assert len(whole) == 2
    assert steps(world_size=1, accumulate=2, batch_size=2) == whole
    assert steps(world_size=2, accumulate=1, batch_size=2) == whole
    assert steps(world_size=2, accumulate=2, batch_size=1) == whole


def test_a_stopped_epoch_goes_on_with_the_same_pairs(tmp_path):
    def loader():
        return data_module(tmp_path, accumulate=2).train_dataloader()

    whole = [batch.examples for batch in loader()]
    first = loader()
    begun = iter(first)
    seen = [next(begun).examples for _ in range(3)]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert seen + [batch.examples for batch in second] == whole and len(whole) == 5


def test_another_seed_gives_another_order_and_workers_the_same_batches(tmp_path):
    ours = list(data_module(tmp_path).train_dataloader())
    theirs = list(data_module(tmp_path, num_workers=1).train_dataloader())
    assert all(torch.equal(a.rejected.ids_BL, b.rejected.ids_BL) for a, b in zip(ours, theirs, strict=True))
    assert [b.examples for b in ours] != [b.examples for b in data_module(tmp_path, seed=1).train_dataloader()]


def test_validation_goes_through_all_pairs_once_and_prompts_keep_the_order_of_the_file(tmp_path):
    data = data_module(tmp_path, eval_batch_size=3)
    assert sorted(i for batch in data.val_dataloader() for i in batch.examples) == list(range(11))
    assert [prompt.text for prompt in data.prompts("validation", 2)] == ["Say number 0.\n", "Say number 1.\n"]
    assert data.prompts("test") == []


def test_what_samples_answers_finds_the_coming_micro_batches_and_their_prompts(tmp_path):
    data = data_module(tmp_path, accumulate=2)
    data.trainer.train_dataloader = data.train_dataloader()
    batches = list(data.trainer.train_dataloader)
    coming = data.upcoming(batches[1].examples, steps=2)
    assert [[micro.examples for micro in step] for step in coming] == [
        [batches[1].examples],
        [batches[2].examples, batches[3].examples],
    ]
    row = data.sets["train"][coming[0][0].examples[0]]
    assert row["student_prompt_ids"] and row["teacher_prompt_ids"] == []


def test_too_few_pairs_for_a_micro_batch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="11 usable examples, fewer than one micro-batch"):
        data_module(tmp_path, batch_size=12).train_dataloader()


def test_a_last_step_that_some_processes_would_not_make_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"11 usable .* last of them are 1 for 2 processes.*\n.*1 examples more or 1 less"
    ):
        data_module(tmp_path, batch_size=5, world_size=2, drop_last=False).train_dataloader()
    data_module(tmp_path, batch_size=4, world_size=2, drop_last=False).train_dataloader()  # 3 are left, for 2 processes


def test_all_pairs_take_part_where_none_is_dropped(tmp_path):
    loader = data_module(tmp_path, drop_last=False).train_dataloader()
    assert sorted(i for batch in loader for i in batch.examples) == list(range(11))
