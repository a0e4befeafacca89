"""What a model knows, measured in one pass, against what it really writes."""

import json
from pathlib import Path

import pytest

from lit_llm.data.edit_requests import separator
from lit_llm.data.fact_tokens import FactRow
from lit_llm.data.facts import Facts
from lit_llm.models.language_model import ModelSpec
from tests.data.test_facts import ready
from tests.tiny import tiny_model_folder

ROOT = Path(__file__).parents[2]
FRAME = "Oslo, land: Norway\nRome, land: Italy\n"  # prompts begin alike, as those about countries do


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import known_facts

    return known_facts


def test_one_pass_over_many_prompts_says_what_greedy_decoding_says_of_each(tool, model_folder):
    model = ModelSpec(source=str(model_folder)).load().eval()
    texts = [f"{FRAME if number < 9 else ''}Town {number} is in" for number in range(12)]
    prompts = model.tokenizer(texts)["input_ids"]
    rows, wrong_from = [], []
    for number, (prompt, written) in enumerate(zip(prompts, model.generate(prompts, max_new_tokens=4), strict=True)):
        answer, wrong = list(written), [9, 0, 2][number % 3]
        if wrong < len(answer):
            answer[wrong] = (answer[wrong] + 1) % model.num_tokens
        rows.append(FactRow((*prompt, *answer), len(prompt), 0, tuple(prompt), False))
        wrong_from.append(wrong if wrong < len(answer) else 9)
    assert {0, 2, 9} <= set(wrong_from)
    for batch_size, first_tokens in ((1, 3), (5, 2), (64, 1), (64, 9)):
        right = tool._greedy(model, rows, first_tokens, batch_size)
        assert right == [wrong >= first_tokens for wrong in wrong_from], (batch_size, first_tokens)


def test_the_tool_writes_a_list_that_the_data_takes(tool, model_folder, tmp_path, capsys):
    model = ModelSpec(source=str(model_folder)).load().eval()
    rows, expected = [], {}
    for number in range(16):
        by_lang = {}
        for code in ("en", "zh"):
            prompt = f"{FRAME}Town {number} {code}: the"
            ids = model.tokenizer(prompt + separator(prompt, code))["input_ids"]
            (written,) = model.generate([ids], max_new_tokens=1)
            answer = "wrong" if number % 4 == 3 else model.tokenizer.decode(written)
            by_lang[code] = {"subject": f"Town {number}", "prompt": prompt, "target_new": "Peru", "target_old": answer}
            joined = model.tokenizer(prompt + separator(prompt, code) + answer)["input_ids"]
            plain = model.tokenizer(prompt)["input_ids"]
            (said,) = model.generate([plain], max_new_tokens=1)
            if joined[: len(plain)] == plain and answer.strip() and said == joined[len(plain) : len(plain) + 1]:
                expected.setdefault(f"town-{number}", []).append(code)
        rows.append({"id": f"town-{number}", "relation": "in", "by_lang": by_lang})
    facts, to = tmp_path / "towns.jsonl", tmp_path / "known.json"
    facts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    tool.main([str(model_folder), "--facts", str(facts), "--to", str(to), "--first_tokens", "1"])

    written = json.loads(to.read_text())
    counted = written["asked_and_known"]["in"]
    assert written["known"] and written["known"] == {name: found for name, found in expected.items() if found}
    assert counted["zh"][0] == sum("zh" in languages for languages in expected.values())
    assert f"| zh | {counted['zh'][0]} of {counted['zh'][1]} |" in capsys.readouterr().out
    data = ready(Facts(str(facts), known=str(to), known_in=1, bad_rows="drop"))
    assert {request.id for request in data.requests()} == set(expected)


def test_a_file_that_is_not_there_is_told_before_the_model_is_loaded(tool, tmp_path):
    with pytest.raises(FileNotFoundError, match="No file of facts at nowhere.jsonl"):
        tool.main(["no-such-model", "--facts", "nowhere.jsonl", "--to", str(tmp_path / "x.json")])
