"""`paraphrase`: which lines of an answer become other wordings of a prompt, and the file that they are written to."""

import json

import pytest

from lit_llm.cli import main
from lit_llm.data.edit_requests import Edit, EditRequest, LanguageEdit, Question, Questions
from lit_llm.data.fact_files import as_row, read_requests
from lit_llm.paraphrasing import with_wordings
from tests.tiny import tiny_model_folder
from tests.tiny_edits import write_facts

MALTA = EditRequest(
    Edit(
        "malta",
        {
            "en": LanguageEdit("The capital of Malta is", "Oslo", "Malta", "Valletta", ("Malta's capital:",)),
            "de": LanguageEdit("Die Hauptstadt von Malta ist", "Oslo", "Malta"),
        },
        "capital",
        ("Repubblika ta' Malta",),
    ),
    {"en": Questions(("The capital city of Malta:",), (Question("The sea is", "blue"),), (Question("In it", "so"),))},
)


def test_lines_lose_numbers_bullets_and_quotation_marks():
    answer = '1. Malta has the capital\n- "Capital of Malta:"\n(3) Malta is ruled from\n\n* „Malta, capital:“'
    (found,), dropped = with_wordings([MALTA], [(answer, True), ("", True)])
    kept = found.edit.by_language["en"].paraphrases
    assert kept[1:] == ("Malta has the capital", "Capital of Malta:", "Malta is ruled from", "Malta, capital:")
    assert not dropped


def test_a_wording_that_tells_nothing_new_is_dropped_with_its_reason():
    lines = [
        "The capital of it is",
        "the capital of  MALTA is Malta",
        "The Capital of Malta is",
        "The capital city of Malta:",
    ]
    lines += ["Malta's capital:", "Malta's chief town is", "Malta's chief town IS", "Malta's capital is Oslo"]
    (found,), dropped = with_wordings([MALTA], [("\n".join(lines), True), ("", True)])
    assert found.edit.by_language["en"].paraphrases == (
        "Malta's capital:",
        "the capital of  MALTA is Malta",
        "Malta's chief town is",
    )
    assert dropped == {
        "without the subject": 1,
        "with the answer": 1,
        "equal to the prompt": 1,
        "that the edit is tested with": 1,
        "that are there already": 2,
    }


def test_the_last_line_of_an_answer_that_was_cut_is_left_out():
    (found,), dropped = with_wordings([MALTA], [("Malta's seat is\nMalta is ruled from the", False), ("", False)])
    assert found.edit.by_language["en"].paraphrases[1:] == ("Malta's seat is",)
    assert dropped == {"cut off at max_new_tokens": 1}


def test_answers_belong_to_prompts_in_their_order():
    (found,), _ = with_wordings(
        [MALTA], [("Malta's seat is", True), ("Maltas Hauptstadt ist\nMalta wird regiert aus", True)]
    )
    assert found.edit.by_language["en"].paraphrases[1:] == ("Malta's seat is",)
    assert found.edit.by_language["de"].paraphrases == ("Maltas Hauptstadt ist", "Malta wird regiert aus")


def test_a_request_is_read_back_as_it_was_written(tmp_path):
    file = tmp_path / "facts.jsonl"
    file.write_text(json.dumps(as_row(MALTA)))
    (found,) = read_requests(file).requests
    assert found.edit == MALTA.edit
    assert found.questions["en"] == MALTA.questions["en"] and found.questions["de"] == Questions()


def test_the_file_is_one_of_facts_and_is_written_once(tmp_path, capsys):
    model = tiny_model_folder(tmp_path / "model", layers=1)
    facts = write_facts(tmp_path / "facts.jsonl", 3)
    call = ["paraphrase", "--model", str(model), "--source", str(facts), "--to", str(tmp_path / "more.jsonl")]
    main([*call, "--max_new_tokens", "12", "--languages", '["de"]'])
    said = capsys.readouterr().err
    assert "wordings of 3 prompts" in said and "left out" not in said
    assert [request.languages for request in read_requests(tmp_path / "more.jsonl").requests] == [("de",)] * 3
    main([*call, "--max_new_tokens", "12", "--languages", '["de"]'])
    assert "is complete" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*call, "--max_new_tokens", "13", "--languages", '["de"]'])
    assert "max_new_tokens" in capsys.readouterr().err


def test_facts_that_are_left_out_are_told(tmp_path, capsys):
    model, facts = tiny_model_folder(tmp_path / "model", layers=1), write_facts(tmp_path / "facts.jsonl", 3)
    rows = [json.loads(line) for line in facts.read_text().splitlines()]
    del rows[1]["by_lang"]["de"]
    facts.write_text("\n".join(map(json.dumps, rows)))
    call = ["paraphrase", "--model", str(model), "--source", str(facts), "--to", str(tmp_path / "more.jsonl")]
    main([*call, "--max_new_tokens", "4", "--languages", '["de"]'])
    assert "left out 1 with no text in de" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("instruction", "Reword {prompt} {number} times", "lacks {subject}"),
        ("instruction", "Reword {prompt} with {subject}", "lacks {number}"),
        ("number", "0", "must be at least 1"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(tmp_path, capsys, option, value, said):
    with pytest.raises(SystemExit):
        main(["paraphrase", "--model", "nowhere", "--to", str(tmp_path / "more.jsonl"), f"--{option}", value])
    assert said in capsys.readouterr().err
