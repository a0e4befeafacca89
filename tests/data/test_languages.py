"""Running text in groups of languages: budgets, what is held out, rows, labels for each token, and ranks."""

import gzip
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from lit_llm.data.languages import Languages
from lit_llm.models.language_model import LanguageModel
from tests.tiny import byte_level_tokenizer, sentencepiece_tokenizer, tiny_model_folder

WORDS = {
    "en": "the cat saw a dog and ran",
    "es": "el gato vio un perro",
    "hu": "macska látott egy kutyát és",
    "tr": "kedi",
}


def passage(language: str, number: int) -> str:
    words = WORDS[language].split()
    return " ".join(words[(number * 7 + place) % len(words)] for place in range(5 + number % 9)) + f" {number}."


def write_corpus(folder, language: str, number: int, start: int = 0, name: str | None = None):
    path = folder / (name or f"{language}.txt")
    path.write_text("".join(passage(language, i) + "\n" for i in range(start, start + number)), encoding="utf-8")
    return str(path)


@pytest.fixture
def groups(tmp_path):
    sizes = {"en": 60, "es": 30, "hu": 80, "tr": 40}
    files = {language: write_corpus(tmp_path, language, number) for language, number in sizes.items()}
    return {"old": {"en": files["en"], "es": files["es"]}, "new": {"hu": files["hu"], "tr": files["tr"]}}


def attached(data: Languages, tokenizer=None, rank=0, world_size=1, accumulate=1) -> Languages:
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(student_tokenizer=tokenizer or byte_level_tokenizer()),
        world_size=world_size,
        global_rank=rank,
        accumulate_grad_batches=accumulate,
    )
    data.setup("fit")
    return data


def module(groups, tokenizer=None, rank=0, world_size=1, accumulate=1, **settings) -> Languages:
    options = {"row_length": 32, "batch_size": 2, "eval_batch_size": 3, "validation_tokens": None}
    return attached(Languages(groups, **{**options, **settings}), tokenizer, rank, world_size, accumulate)


def texts_of(data: Languages, split: str) -> dict[str, list[str]]:
    """The text of every language's rows, put together again and divided at the end-of-sequence tokens."""
    tokenizer, found = byte_level_tokenizer(), {}
    rows = data.sets[split]
    for number in range(len(rows)):
        found.setdefault(data.languages[rows.language[number]], []).extend(rows.row(number).ids)
    return {name: tokenizer.decode(ids).split(tokenizer.eos_token) for name, ids in found.items()}


def test_stage_1_trains_on_the_new_languages_and_stage_2_on_all(groups):
    assert set(texts_of(module(groups), "train")) == {"hu", "tr"}
    assert set(texts_of(module(groups, stage=2), "train")) == {"en", "es", "hu", "tr"}
    for stage in (1, 2):
        assert set(texts_of(module(groups, stage=stage), "validation")) == {"en", "es", "hu", "tr"}


def test_documents_stand_whole_one_after_the_other_and_each_ends_with_the_end_of_sequence(groups):
    found = texts_of(module(groups), "train")
    for language, size in (("hu", 80), ("tr", 40)):
        whole = {passage(language, i) for i in range(size)}
        assert len(found[language]) > 0.8 * size
        assert all(text in whole for text in found[language][:-1])  # the last one is cut where the last row ends
        assert any(text.startswith(found[language][-1]) for text in whole)


def test_what_is_held_out_is_not_trained_on_in_any_stage_and_does_not_depend_on_seed_or_company(groups):
    data = module(groups)
    held = {name: set(texts[:-1]) for name, texts in texts_of(data, "validation").items()}
    assert {name: len(texts) for name, texts in held.items()} == {"en": 6, "es": 3, "hu": 8, "tr": 4}
    for settings in ({"stage": 1}, {"stage": 2, "tokens": 9000}):
        trained = texts_of(module(groups, **settings), "train")
        assert not any(held[name] & set(texts) for name, texts in trained.items())
    alone = module({"new": {"hu": groups["new"]["hu"]}}, seed=5)
    assert set(texts_of(alone, "validation")["hu"][:-1]) == held["hu"]
    assert set(texts_of(module(groups, split_seed=1), "validation")["hu"][:-1]) != held["hu"]


def test_stage_2_takes_other_text_of_the_new_languages_where_there_is_enough(groups):
    half = {"hu": 640, "tr": 320}
    first = texts_of(module(groups, tokens=half), "train")
    second = texts_of(module(groups, stage=2, tokens={**half, "en": 320, "es": 320}), "train")
    for language in ("hu", "tr"):
        assert len(first[language]) > 5 and not set(first[language][:-1]) & set(second[language][:-1])


def test_empty_and_repeated_lines_are_left_out_and_counted(tmp_path):
    path = tmp_path / "hu.txt"
    path.write_text("".join(f"{passage('hu', i % 20)}\n\n" for i in range(40)))
    data = module({"new": {"hu": str(path)}})
    assert len(data.corpora["hu"].documents) == 20 and data.corpora["hu"].left_out == 60


def test_every_token_carries_its_language_and_group_and_padding_carries_none(groups):
    data = module(groups, stage=2)
    seen = set()
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        for row in range(len(batch.examples)):
            length = int(batch.student.length_B[row])
            language = batch.language_BL[row, 0].item()
            seen.add(data.languages[language])
            assert (batch.language_BL[row, :length] == language).all() and (batch.language_BL[row, length:] == -1).all()
            assert (batch.group_BL[row, :length] == (0 if data.languages[language] in groups["old"] else 1)).all()
            assert (batch.group_BL[row, length:] == -1).all()
        target_language = batch.language_BL.flatten()[batch.student.position_T + 1]
        assert torch.equal(batch.language_T, target_language)
        assert batch.num_tokens == (batch.group_BL >= 0).sum() == batch.student.length_B.sum()
    assert seen == {"en", "es", "hu", "tr"}


def test_rows_are_plain_text_to_the_model_and_all_but_the_first_token_is_predicted(groups):
    data = module(groups)
    batch = next(iter(data.train_dataloader()))
    ids_BL = batch.student.ids_BL
    assert ids_BL.shape == (2, 32) and batch.student.position_ids_RL is None
    assert torch.equal(batch.student.target_T, ids_BL[:, 1:].flatten())
    assert batch.step_tokens == 62


def test_isolated_documents_do_not_see_each_other_nor_predict_each_other(groups, tmp_path):
    data = module(groups, isolate_documents=True)
    tokenizer = byte_level_tokenizer()
    batch = next(iter(data.train_dataloader()))
    flat = batch.student.ids_BL.flatten()
    assert (flat == tokenizer.eos_token_id).sum() >= 2
    assert not (flat[batch.student.position_T] == tokenizer.eos_token_id).any()
    assert batch.step_tokens == batch.student.num_supervised
    folder = tiny_model_folder(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    model = LanguageModel(AutoModelForCausalLM.from_pretrained(folder), tokenizer).eval()
    row = data.sets["train"].row(batch.examples[0])
    cuts = [0, *(start for start in row.starts if start), len(row.ids)]
    with torch.no_grad():
        whole_LD = model.hidden_grid(batch.student)[0]
        for first, last in zip(cuts, cuts[1:]):
            alone = model.transformer.base_model(torch.tensor([row.ids[first:last]])).last_hidden_state[0]
            torch.testing.assert_close(whole_LD[first:last], alone, rtol=1e-4, atol=1e-5)
        plain = next(iter(module(groups).train_dataloader()))
        assert model.hidden(plain.student).shape == (62, 32)


@pytest.mark.parametrize("isolate", [False, True])
def test_a_tokenizer_that_begins_texts_begins_documents_and_never_has_to_predict_it(groups, isolate):
    from tokenizers import processors

    tokenizer = sentencepiece_tokenizer()
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    data = module(groups, tokenizer, isolate_documents=isolate)
    for batch in data.train_dataloader():
        ends = batch.student.ids_BL == tokenizer.eos_token_id
        assert (batch.student.ids_BL[:, 1:][ends[:, :-1]] == begin).all()
        assert not (batch.student.target_T == begin).any()
        assert batch.step_tokens == batch.student.num_supervised
    never = module(groups, tokenizer, begin="never")
    assert not any((batch.student.ids_BL == begin).any() for batch in never.train_dataloader())


def test_ranks_and_accumulation_divide_the_same_steps_and_know_their_totals(groups):
    whole = list(module(groups, stage=2, batch_size=4, accumulate=2).train_dataloader())
    ranks = [
        list(module(groups, stage=2, batch_size=2, rank=rank, world_size=2, accumulate=2).train_dataloader())
        for rank in (0, 1)
    ]
    assert len(whole) == len(ranks[0]) == len(ranks[1]) > 4
    for micro, left, right in zip(whole, *ranks, strict=True):
        assert set(micro.examples) == {*left.examples, *right.examples}
        assert micro.step_tokens == left.step_tokens == right.step_tokens
        assert micro.step_group_tokens == left.step_group_tokens == right.step_group_tokens
    for first, second in zip(whole[::2], whole[1::2], strict=False):
        counted = [sum((batch.group_BL == group).sum().item() for batch in (first, second)) for group in (0, 1)]
        assert first.step_group_tokens == second.step_group_tokens == tuple(counted)
        assert first.step_tokens == first.student.num_supervised + second.student.num_supervised


def test_a_resumed_loader_goes_on_with_the_same_batches(groups):
    whole = [batch.student.ids_BL for batch in module(groups).train_dataloader()]
    loader = module(groups).train_dataloader()
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    resumed = module(groups).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    rest = [batch.student.ids_BL for batch in resumed]
    assert len(rest) == len(whole) - 3 and all(torch.equal(a, b) for a, b in zip(whole[3:], rest, strict=True))


def test_workers_build_the_same_batches(groups):
    ours, theirs = (list(module(groups, num_workers=number).train_dataloader()) for number in (0, 2))
    assert all(torch.equal(a.student.ids_BL, b.student.ids_BL) for a, b in zip(ours, theirs, strict=True))
    assert all(torch.equal(a.language_BL, b.language_BL) for a, b in zip(ours, theirs, strict=True))


def test_another_seed_changes_the_order_of_rows_and_not_the_rows(groups):
    ones, others = (
        [
            tuple(row.tolist())
            for batch in module(groups, seed=seed, batch_size=1).train_dataloader()
            for row in batch.student.ids_BL
        ]
        for seed in (0, 1)
    )
    assert ones != others and sorted(ones) == sorted(others)


def test_evaluation_covers_every_held_out_token_once_and_its_last_row_may_be_shorter(groups):
    data = module(groups)
    rows = {}
    for batch in data.val_dataloader():
        for row, length in zip(batch.student.ids_BL, batch.student.length_B, strict=True):
            rows.setdefault(len(rows), row[:length].tolist())
    counted = sum(map(len, rows.values()))
    held = [corpus.lengths[documents].sum() for corpus, documents in data._evaluated["validation"].values()]
    assert sum(held) - 4 <= counted <= sum(held)  # a single token left over cannot be predicted
    limited = module(groups, validation_tokens=40)
    assert all(stream.total == 40 for stream in limited.sets["validation"].streams.values())


def test_a_language_may_go_through_its_text_again_in_another_order(groups):
    data = module(groups, tokens={"hu": 320, "tr": 3840})
    texts = texts_of(data, "train")["tr"]
    available = {passage("tr", i) for i in range(40)} - set(texts_of(data, "validation")["tr"])
    assert len(available) == 36
    assert set(texts[:36]) == set(texts[36:72]) == available and texts[:36] != texts[36:72]


def test_validation_and_test_may_have_files_of_their_own(groups, tmp_path):
    named = write_corpus(tmp_path, "hu", 9, start=500, name="held.txt")
    test = {language: write_corpus(tmp_path, language, 5, 900, f"test_{language}.txt") for language in WORDS}
    data = module(groups, validation={"hu": named}, test=test)
    assert set(texts_of(data, "validation")["hu"][:-1]) == {passage("hu", i) for i in range(500, 509)}
    assert len(data._training["hu"]) == 80 and len(data._training["tr"]) == 36
    assert set(texts_of(data, "test")["tr"][:-1]) == {passage("tr", i) for i in range(900, 905)}
    assert module(groups).test_dataloader() == [] and len(list(data.test_dataloader())) > 0


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "parquet", "folder"])
def test_text_is_read_from(kind, tmp_path):
    lines = [passage("hu", i) for i in range(30)]
    table, path = datasets.Dataset.from_dict({"content": lines, "id": list(range(30))}), tmp_path / f"hu.{kind}"
    if kind.startswith("txt"):
        content = "\n".join(lines).encode()
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    elif kind.startswith("jsonl"):
        content = "\n".join(json.dumps({"content": line, "id": i}) for i, line in enumerate(lines)).encode()
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(path)
    data = module({"new": {"hu": str(path)}}, columns=None if kind.startswith("txt") else {"text": "content"})
    found = {*texts_of(data, "train")["hu"], *texts_of(data, "validation")["hu"]}
    assert len(found & set(lines)) >= 28


def test_a_language_may_have_several_sources(tmp_path):
    first = write_corpus(tmp_path, "hu", 20)
    second = tmp_path / "more.jsonl"
    second.write_text("\n".join(json.dumps({"text": passage("hu", i)}) for i in range(20, 40)))
    assert len(module({"new": {"hu": [first, str(second)]}}).corpora["hu"].documents) == 40


def test_the_part_of_a_data_set_is_named_behind_it(tmp_path):
    lines = [passage("hu", i) for i in range(30)]
    parts = {"train": lines[:10], "small": lines[10:]}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in parts.items()}
    ).save_to_disk(tmp_path / "both")
    assert len(module({"new": {"hu": f"hub:{tmp_path / 'both'}@small"}}).corpora["hu"].documents) == 20


def test_tokens_are_found_again_in_the_cache_and_made_anew_when_the_file_changes(tmp_path, monkeypatch):
    path = write_corpus(tmp_path, "hu", 30)
    module({"new": {"hu": path}})
    calls = []
    monkeypatch.setattr("lit_llm.data.corpora.DocumentEncoder.__call__", lambda self, row: calls.append(row) or 1 / 0)
    module({"new": {"hu": path}}, seed=3, split_seed=2)
    assert not calls
    write_corpus(tmp_path, "hu", 30, start=1)
    with pytest.raises(ZeroDivisionError):
        module({"new": {"hu": path}})


def test_documents_can_be_read_for_other_purposes_up_to_a_number_of_tokens(groups):
    data = module(groups)
    few, all_of_them = list(data.documents("en", 50)), list(data.documents("en", 10**6))
    assert sum(map(len, few)) >= 50 > sum(map(len, few[:-1]))
    assert len(all_of_them) == 54 and not any(byte_level_tokenizer().eos_token_id in ids for ids in all_of_them)


def test_prompts_are_beginnings_of_held_out_text_with_what_follows_the_languages_in_turn(groups):
    data = module(groups)
    prompts = data.prompts("validation", 6)
    held = texts_of(data, "validation")
    assert [any((p.text + p.references[0]) in held[name] for p in prompts) for name in held] == [True] * 4
    assert len(prompts) == 6 and data.prompts("test") == []


def test_what_each_language_has_is_printed(groups):
    data = module(groups, stage=2)
    text = data._statistics({"hu": 3, "tr": 2, "en": 1, "es": 1})
    line = next(line for line in text.splitlines() if line.split()[:2] == ["hu", "new"])
    numbers = line.split()[2:]
    assert numbers[0] == "80" and numbers[5] == "96"
    corpus = data.corpora["hu"]
    assert float(numbers[3]) == pytest.approx(corpus.num_tokens / corpus.num_bytes, abs=1e-3)
    assert corpus.num_bytes == sum(len(passage("hu", i).encode()) for i in range(80))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"groups": {"old": {"en": "a.txt"}, "new": {"en": "b.txt"}}}, "'en' is in the groups 'old' and 'new'"),
        ({"groups": {"old": {}, "new": {"en": "b.txt"}}}, "every group a language"),
        ({"groups": {"new": {"hu": "a.txt"}}, "stage": 2}, "data.stage is 2.*one group"),
        ({"old_share": 0.5}, "data.old_share is 0.5, but data.stage is 1"),
        ({"stage": 2, "old_share": 1.0}, "data.old_share is 1.0"),
        ({"stage": 2, "old_share": 0.2, "tokens": {"hu": 5}}, r"data.old_share \(0.2\) has nothing to decide"),
        ({"temperature": 2.0, "tokens": {"hu": 5}}, r"data.temperature \(2.0\) has nothing to decide"),
        ({"temperature": 0.0}, "data.temperature is 0.0"),
        ({"tokens": 0}, "data.tokens is 0"),
        ({"row_length": 1}, "data.row_length is 1"),
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"validation_share": 1.0}, "data.validation_share is 1.0"),
        ({"validation": {"sw": "a.txt"}}, "data.validation names sw, but data.groups has en, es, fr, hu, tr"),
        ({"test": {"hu": "a.txt"}}, "data.test has no source for en, es, fr, tr"),
        ({"columns": {"prompt": "a"}}, "the one column that is read is `text`"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Languages(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokens": {"hu": 100}}, "data.tokens gives numbers for hu, but this stage trains on hu, tr"),
        ({"tokens": {"hu": 64, "tr": 64, "en": 64}}, "this stage trains on hu, tr"),
        (
            {"tokens": {"hu": 64, "tr": 31}},
            "'tr' would have 31 training tokens, less than one row of data.row_length 32",
        ),
        ({"tokens": 9999, "repeat": False}, "'hu' is to have .* but its text has .* data.repeat is false"),
        ({"batch_size": 999}, "fewer than one micro-batch"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused_with_both_values(groups, settings, words):
    with pytest.raises(ValueError, match=words):
        module(groups, **settings).train_dataloader()


def test_more_processes_than_rows_to_evaluate_are_refused(groups):
    with pytest.raises(ValueError, match=r"data.validation has \d+ usable examples for 9999 processes"):
        module(groups, world_size=9999).val_dataloader()


def test_without_repetition_a_language_that_has_enough_is_taken_as_it_is(groups):
    assert len(module(groups, repeat=False).sets["train"]) > 10


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.txt", None, "No text of 'hu' at .*absent.txt"),
        ("empty.txt", "", "'hu' holds no text: .* is empty"),
        ("blank.txt", "\n \n\n", "'hu' holds no text"),
        ("other.jsonl", '{"body": "Egy."}\n', "has no column 'text'; it has: body"),
        ("number.jsonl", '{"text": 3}\n', "'text' of .*number.jsonl .'hu'. holds .*int64.*not text"),
        ("one.txt", "Egy mondat.\n", "'hu' has 1 document.s.: with 1 held out none is left"),
    ],
)
def test_corpora_that_are_none_are_refused(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        module({"new": {"hu": str(tmp_path / name)}})


def test_with_three_groups_the_newest_is_added_and_all_others_are_replayed(groups, tmp_path):
    files = {**groups["old"], **groups["new"]}
    three = {"first": {"en": files["en"]}, "second": {"hu": files["hu"]}, "third": {"tr": files["tr"]}}
    assert set(texts_of(module(three), "train")) == {"tr"}
    data = module(three, stage=2, tokens=6400, old_share=0.25)
    tokens = [int(counts.sum()) for counts in data.sets["train"].group_tokens]
    assert (tokens[0] + tokens[1]) / sum(tokens) == pytest.approx(0.25, abs=0.01)
    batches = list(data.train_dataloader())
    assert {group for batch in batches for group in batch.group_BL.unique().tolist()} == {0, 1, 2}
    assert all(len(batch.step_group_tokens) == 3 for batch in batches)


def test_the_test_command_without_test_text_is_refused(groups):
    data = Languages(groups)
    with pytest.raises(ValueError, match="data.test is not set"):
        data.setup("test")


def test_the_set_of_rows_counts_what_its_batches_hold(groups):
    for isolate in (False, True):
        data = module(groups, stage=2, isolate_documents=isolate)
        rows = data.sets["train"]
        batches = data._batches("train")
        from lit_llm.data.step_sampler import MicroBatch

        for number in range(len(rows)):
            assert batches[MicroBatch((number,), 0, 0)].student.num_supervised == rows.supervised[number]
        assert np.array_equal(sum(rows.group_tokens), rows.lengths)
