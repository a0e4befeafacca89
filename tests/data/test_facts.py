"""The data module of facts: batches to edit, batches to ask, and nothing of the test in the first."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lit_llm.data.batch import TokenBatch
from lit_llm.data.edit_batch import KINDS, EditBatch, QuestionBatch
from lit_llm.data.edit_requests import Edit
from lit_llm.data.encoded_facts import FactEncoding, encode_edits
from lit_llm.data.facts import Facts, read_known
from lit_llm.data.planned_data import PlannedData
from tests.tiny import byte_level_tokenizer, sentencepiece_tokenizer

CITIES = ["Oslo", "Rome", "Lima", "Cairo", "Delhi"]
SECRET = "zebra"  # stands in every text of the test, and in no other


def request(number: int, **english) -> dict:
    city = CITIES[number % len(CITIES)]
    entry = {
        "subject": city,
        "prompt": f"{city} {number} is in",
        "target_new": "Peru or so",
        "target_old": "Chad",
        "paraphrases": [f"The town of {city} {number} is in"],
        "rephrase": [f"The {SECRET} asks where {city} {number} is: in"],
        "locality": [{"prompt": f"A {SECRET} eats", "answer": "grass"}],
        "portability": [{"prompt": f"The {SECRET} in {city} {number} speaks", "answer": "Spanish"}],
    }
    chinese = {
        "subject": "城",
        "prompt": f"城{number}在",
        "target_new": "秘鲁",
        "rephrase": [f"{SECRET}问城{number}在哪"],
    }
    return {"id": f"fact-{number}", "relation": "in", "by_lang": {"en": entry | english, "zh": chinese}}


@pytest.fixture
def source(tmp_path):
    return written(tmp_path, [request(number) for number in range(7)])


def written(tmp_path, rows) -> str:
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def ready(data: Facts, *stages: str, tokenizer=None) -> Facts:
    method = SimpleNamespace(student_tokenizer=tokenizer or byte_level_tokenizer())
    data.trainer = SimpleNamespace(
        lightning_module=method, global_rank=0, world_size=1, accumulate_grad_batches=1, state=None
    )
    for stage in stages or ("fit",):
        data.setup(stage)
    return data


def everything_in(value, tokenizer) -> str:
    """All texts that an object holds, its token ids decoded."""
    if isinstance(value, str):
        return value
    if isinstance(value, TokenBatch):
        return " ".join(tokenizer.decode(row) for row in value.ids_BL.tolist()) + tokenizer.decode(
            value.target_T.tolist()
        )
    if dataclasses.is_dataclass(value):
        return " ".join(everything_in(getattr(value, field.name), tokenizer) for field in dataclasses.fields(value))
    if isinstance(value, dict):
        return " ".join(everything_in(part, tokenizer) for pair in value.items() for part in pair)
    if isinstance(value, (tuple, list)):
        return " ".join(everything_in(part, tokenizer) for part in value)
    assert isinstance(value, (int, float, Tensor, type(None))), type(value)
    return ""


def test_nothing_of_the_questions_is_in_what_is_edited(source):
    data = ready(Facts(source, batch_size=2))
    tokenizer = byte_level_tokenizer()
    assert SECRET in everything_in(data.requests(), tokenizer)
    assert SECRET in everything_in(next(iter(data.val_dataloader())), tokenizer)
    assert SECRET not in everything_in([vars(data.sets["train"])["facts"]], tokenizer)
    batches = list(data.train_dataloader())
    assert len(batches) == 4
    for batch in batches:
        assert isinstance(batch, EditBatch) and "town" in everything_in(batch, tokenizer)
        assert SECRET not in everything_in(batch, tokenizer)


def test_requests_cannot_be_encoded_for_editing_with_their_questions(source):
    data = ready(Facts(source))
    with pytest.raises(AttributeError):
        encode_edits(data.requests(), FactEncoding(), byte_level_tokenizer())
    assert all(isinstance(fact.edit, Edit) for fact in data.sets["train"].facts)


@pytest.mark.parametrize("make_tokenizer", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_a_batch_of_edits_points_at_subjects_and_targets(source, make_tokenizer):
    tokenizer = make_tokenizer()
    batch = next(iter(ready(Facts(source, batch_size=3, seed=4), tokenizer=tokenizer).train_dataloader()))
    rows = batch.rows
    assert batch.languages == ("en", "zh") and rows.ids_BL.shape[0] == len(batch.found) == 3 * 3
    for row in range(len(rows.ids_BL)):
        edit, language = batch.edits[batch.fact_R[row]], batch.languages[batch.language_R[row]]
        given = edit.by_language[language]
        paraphrase = int(batch.paraphrase_R[row])
        prompt = given.prompt if paraphrase == 0 else given.paraphrases[paraphrase - 1]
        ids, length, end = rows.ids_BL[row], int(batch.prompt_length_R[row]), int(rows.length_B[row])
        separator = "" if language == "zh" else " "
        assert tokenizer.decode(ids[:end]) == prompt + separator + given.target_new
        assert given.subject in tokenizer.decode(ids[: batch.lookup_R[row] + 1])
        assert given.subject not in tokenizer.decode(ids[: batch.lookup_R[row]])
        target_T = rows.target_T[rows.sequence_T == row]
        assert target_T.tolist() == ids[length:end].tolist()
        position_T = rows.position_T[rows.sequence_T == row] - row * rows.ids_BL.shape[1]
        assert position_T.tolist() == list(range(length - 1, end - 1))
    plain = (batch.paraphrase_R == 0).nonzero()[:, 0]
    assert batch.step_tokens == sum(int((rows.sequence_T == row).sum()) for row in plain)
    for row in range(len(batch.essence_fact_S)):
        edit, language = batch.edits[batch.essence_fact_S[row]], batch.languages[batch.essence_language_S[row]]
        text = tokenizer.decode(batch.essence.ids_BL[row, : batch.essence_lookup_S[row] + 1])
        assert text.endswith(edit.by_language[language].subject)
    assert batch.essence.num_supervised == 0
    moved = batch.to("cpu")
    assert torch.equal(moved.lookup_R, batch.lookup_R) and moved.edits is batch.edits


def test_a_batch_of_questions_knows_what_each_tests(source):
    data = ready(Facts(source, eval_batch_size=2))
    batch = next(iter(data.val_dataloader()))
    tokenizer = byte_level_tokenizer()
    assert isinstance(batch, QuestionBatch) and len(batch.ids) == 2
    assert torch.bincount(batch.kind_R).tolist() == [4, 4, 2, 2]
    for row, (prompt, answer) in enumerate(zip(batch.prompts, batch.answers, strict=True)):
        kind, language = KINDS[batch.kind_R[row]], batch.languages[batch.language_R[row]]
        separator = "" if language == "zh" else " "
        end = int(batch.rows.length_B[row])
        assert tokenizer.decode(batch.rows.ids_BL[row, :end]) == prompt + separator + answer
        assert tokenizer.decode(list(batch.prompt_ids[row])) == prompt
        assert (kind == "locality") == (batch.lookup_R[row] == -1)
        assert (kind == "reliability") == (SECRET not in prompt)
        assert -1 <= batch.lookup_R[row] < batch.prompt_length_R[row]


def test_validation_and_test_ask_about_every_edited_fact_once(source):
    data = ready(Facts(source, eval_batch_size=3, limit=5), "fit", "test")
    for loader in (data.val_dataloader(), data.test_dataloader()):
        ids = [name for batch in loader for name in batch.ids]
        assert sorted(ids) == [f"fact-{number}" for number in range(5)]
    edited = [edit.id for batch in data.train_dataloader() for edit in batch.edits]
    assert sorted(edited) == sorted(ids)
    (prompt,) = data.prompts("validation", 1)
    assert prompt.text == "Oslo 0 is in" and prompt.references == ["Peru or so"]


def test_parts_have_no_request_in_common_and_all_of_them_together(source):
    parts = [[request.id for request in ready(Facts(source, part=[number, 3])).requests()] for number in range(3)]
    assert parts[1] == ["fact-1", "fact-4"] and sorted(sum(parts, [])) == [f"fact-{number}" for number in range(7)]
    assert len(ready(Facts(source, part=[0, 3], limit=2)).requests()) == 2
    with pytest.raises(ValueError, match=r"\[8, 9\].*only 7"):
        ready(Facts(source, part=[8, 9]))
    for wrong in ([3, 3], [1], [-1, 2]):
        with pytest.raises(ValueError, match=r"data\.part is .*\[0, 3\]"):
            Facts(source, part=wrong)


def test_the_seed_orders_the_edits_and_nothing_else(source):
    orders = [
        [edit.id for batch in ready(Facts(source, seed=seed)).train_dataloader() for edit in batch.edits]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])


def test_languages_are_chosen_in_order_and_requests_without_them_are_dropped(tmp_path):
    rows = [request(number) for number in range(3)]
    del rows[1]["by_lang"]["zh"]
    data = ready(Facts(written(tmp_path, rows), languages=["zh", "en"]))
    assert [r.id for r in data.requests()] == ["fact-0", "fact-2"]
    assert data.sets["train"].languages == ("zh", "en")
    assert data.sets["train"].summary.dropped == {"no text in zh": 1}
    with pytest.raises(ValueError, match="No request .* is in de, fr; they are in en, zh. Correct data.languages"):
        ready(Facts(written(tmp_path, rows), languages=["en", "de", "fr"]))


def test_aliases_of_languages_that_are_not_chosen_still_find_the_subject(tmp_path):
    row = request(0)
    row["by_lang"]["zh"]["prompt"] = "Oslo在"
    data = ready(Facts(written(tmp_path, [row]), languages=["zh"]))
    assert data.sets["train"].facts[0].rows[0].how == "alias_exact"


def test_only_facts_that_a_model_knows_in_enough_languages_are_kept(source, tmp_path):
    known = tmp_path / "known.json"
    listed = {"fact-1": ["en", "zh"], "fact-2": ["en"], "fact-3": ["en", "de"], "fact-4": ["zh", "en", "de"]}
    known.write_text(json.dumps({"model_hash": "abc", "known": listed}))
    data = ready(Facts(source, known=str(known)))
    assert [r.id for r in data.requests()] == ["fact-1", "fact-4"] and data.known_list["model_hash"] == "abc"
    assert data.sets["train"].summary.dropped == {"a fact that the model knows in fewer than 2 languages": 5}
    assert len(ready(Facts(source, known=str(known), known_in=1)).requests()) == 4
    with pytest.raises(ValueError, match="No request .* is left.*lower known_in"):
        ready(Facts(source, known=str(known), known_in=3))
    known.write_text(json.dumps({"model_hash": "abc", "known": {"capital-DE": ["en"]}}))
    with pytest.raises(ValueError, match="capital-DE.*fact-0.*no id in common"):
        ready(Facts(source, known=str(known)))
    known.write_text("[]")
    with pytest.raises(ValueError, match="lacks model_hash or known"):
        ready(Facts(source, known=str(known)))
    with pytest.raises(FileNotFoundError, match="No list of known facts at nowhere.*tools/known_facts.py"):
        ready(Facts(source, known="nowhere"))


def test_the_summary_counts_how_subjects_were_found_and_what_is_odd(tmp_path):
    rows = [
        request(0),
        request(1, subject="Roma"),  # similar to Rome
        request(2, subject="Nowhere"),
        request(3, rephrase=["Cairo 3 is in"]),
    ]
    data = ready(Facts(written(tmp_path, rows)))
    summary = data.sets["train"].summary
    assert summary.found["en"] == {"exact": 2, "fuzzy": 1, "none": 1} and summary.found["zh"] == {"exact": 4}
    text = summary.text("facts")
    assert "4 requests in en, zh" in text and "exact 75.0%, fuzzy 12.5%, none 12.5% (none: en 25%" in text
    missing = data.sets["train"].facts[2].rows[0]
    assert missing.how == "none" and missing.tokens.lookup == missing.tokens.prompt_length - 1
    assert data.sets["validation"].summary.repeated == 1
    assert "12% of generality repeats the prompt itself" in data.sets["validation"].summary.text("validation")


def test_a_subject_that_is_not_in_its_prompt_can_be_refused_or_dropped(tmp_path):
    path = written(tmp_path, [request(0), request(2, subject="Nowhere")])
    with pytest.raises(ValueError, match="1 requests of .* with a subject that no prompt names: fact-2 [(]en[)]"):
        ready(Facts(path, missing_subjects="refuse"))
    dropped = ready(Facts(path, missing_subjects="drop"))
    assert [r.id for r in dropped.requests()] == ["fact-0"]
    assert dropped.sets["train"].summary.dropped == {"a subject that no prompt names": 1}


def test_a_target_of_several_tokens_is_refused_where_a_method_can_write_one(tmp_path):
    rows = [request(0, target_new="P"), request(1)]
    for row in rows:
        del row["by_lang"]["zh"]
    path = written(tmp_path, rows)
    with pytest.raises(ValueError, match="1 requests of .* with a target of more than 2 tokens: fact-1 [(]en[)]"):
        ready(Facts(path, max_target_tokens=2))
    data = ready(Facts(path, max_target_tokens=2, bad_rows="drop"))
    assert [r.id for r in data.requests()] == ["fact-0"]


def test_what_is_put_around_prompts_moves_the_subject_and_is_not_searched(tmp_path):
    row = request(0, subject="is in")  # the frame holds it, too
    data = ready(Facts(written(tmp_path, [row]), prompt_format="It is in: {} Answer is in:", locality_prefix="nq: "))
    batch, tokenizer = next(iter(data.train_dataloader())), byte_level_tokenizer()
    assert tokenizer.decode(batch.rows.ids_BL[0, : batch.lookup_R[0] + 1]) == "It is in: Oslo 0 is in"
    questions = next(iter(data.val_dataloader()))
    local = questions.prompts[questions.kind_R.tolist().index(KINDS.index("locality"))]
    assert local == f"It is in: nq: A {SECRET} eats Answer is in:"
    with pytest.raises(ValueError, match="data.prompt_format is 'Q:'; it needs one {}"):
        Facts(prompt_format="Q:")


def test_braces_in_a_prompt_are_text(tmp_path):
    row = request(0, prompt="Oslo {} {0} {subject} is in")
    batch = next(iter(ready(Facts(written(tmp_path, [row]), languages=["en"])).train_dataloader()))
    assert byte_level_tokenizer().decode(batch.rows.ids_BL[0]).startswith("Oslo {} {0} {subject} is in Peru")


def test_what_ends_an_answer_is_edited_in_and_not_asked_for(source):
    tokenizer = byte_level_tokenizer()
    data = ready(Facts(source, languages=["en"], target_end="\n"), tokenizer=tokenizer)
    plain = ready(Facts(source, languages=["en"]), tokenizer=tokenizer)
    edited, without = (next(iter(made.train_dataloader())) for made in (data, plain))
    for row, length, other in zip(edited.rows.ids_BL, edited.rows.length_B, without.rows.ids_BL, strict=True):
        text = tokenizer.decode(row[:length])
        assert text.endswith("\n") and tokenizer.decode(other).startswith(text[:-1])
    assert not any("\n" in answer for answer in next(iter(data.val_dataloader())).answers)


def test_the_separator_can_be_that_of_published_code(source):
    tokenizer = byte_level_tokenizer()
    for rule, text in {"auto": "在秘", "space": "在 秘", "none": "在秘"}.items():
        batch = next(iter(ready(Facts(source, languages=["zh"], target_separator=rule)).train_dataloader()))
        assert text in tokenizer.decode(batch.rows.ids_BL[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"languages": ["en", "cz"]}, "'cz' is not a language code.*Is it cs"),
        ({"languages": ["en", "de", "en"]}, "names a language twice: en, de, en"),
        ({"limit": 0}, "data.limit is 0"),
        ({"known_in": 0}, "data.known_in is 0"),
        ({"known_in": 3}, "data.known_in is 3, but data.known is not set"),
        ({"max_target_tokens": 0}, "data.max_target_tokens is 0"),
        ({"batch_size": 0}, "data.batch_size is 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Facts(**settings)


def test_it_is_a_planned_data_module_and_resumes_inside_an_epoch(source):
    data = ready(Facts(source, batch_size=2))
    assert isinstance(data, PlannedData)
    loader = data.train_dataloader()
    seen = iter(loader)
    first = [next(seen).examples for _ in range(2)]
    state = loader.state_dict()
    rest = [batch.examples for batch in seen]
    again = data.train_dataloader()
    again.load_state_dict(state)
    assert [batch.examples for batch in again] == rest and sorted(sum([*first, *rest], ())) == list(range(7))


def test_the_packaged_list_of_known_facts_is_read_and_another_is_not_found():
    found = read_known("facts:gemma3-270m")
    assert len(found["known"]) > 100 and all(len(languages) >= 2 for languages in found["known"].values())
    with pytest.raises(FileNotFoundError, match="facts:nothing"):
        read_known("facts:nothing")
