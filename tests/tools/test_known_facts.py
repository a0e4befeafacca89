"""What a model knows, measured in one pass, against what it really writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_llm.data.fact_files import read_requests
from lit_llm.models.language_model import ModelSpec
from tests.data.test_facts import ready
from tests.tiny import tiny_model_folder

ROOT = Path(__file__).parents[2]
FRAME = "Oslo, land: Norway\nRome, land: Italy\n"  # all prompts begin alike, as those about countries do


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import known_facts

    return known_facts


@pytest.fixture
def facts(tmp_path, model_folder):
    """Facts of which the model says some itself: their former answers are what it writes, or begins to write."""
    model = ModelSpec(source=str(model_folder)).load().eval()
    rows = []
    for number in range(12):
        by_lang = {}
        for code in ("en", "de"):
            prompt = f"{FRAME if number < 8 else ''}Town {number} {code} is in"
            (written,) = model.generate([model.tokenizer(prompt)["input_ids"]], max_new_tokens=4)
            answer = model.tokenizer.decode(written)
            if number % 3 == 0 or (number % 3 == 1 and code == "en"):
                answer = " wrong"
            by_lang[code] = {"subject": f"Town {number}", "prompt": prompt, "target_new": "Peru", "target_old": answer}
        rows.append({"id": f"town-{number}", "relation": "in", "by_lang": by_lang})
    path = tmp_path / "towns.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def said(model, row, first_tokens) -> bool:
    """Greedy decoding, token by token, of one prompt alone."""
    ids = list(row.ids[: row.prompt_length])
    wanted = row.ids[row.prompt_length : row.prompt_length + first_tokens]
    for token in wanted:
        (new,) = model.generate([ids], max_new_tokens=1)
        if new[:1] != [token]:
            return False
        ids.append(token)
    return True


@pytest.mark.parametrize(("batch_size", "first_tokens"), [(1, 3), (5, 3), (64, 1), (64, 9)])
def test_one_pass_over_many_facts_says_what_greedy_decoding_says_of_each(
    tool, facts, model_folder, batch_size, first_tokens
):
    model = ModelSpec(source=str(model_folder)).load().eval()
    requests = read_requests(facts, "drop").requests
    known = tool.measure(model, requests, None, first_tokens, batch_size)
    expected = {}
    for request in requests:
        for code, fact in request.edit.by_language.items():
            (row,) = tool.encode_facts(model.tokenizer, [tool.FactText(code, fact.prompt, fact.target_old)])
            if said(model, row, first_tokens):
                expected.setdefault(request.id, []).append(code)
    assert known == expected and known


def test_the_script_writes_a_list_that_the_data_takes(facts, model_folder, tmp_path):
    from lit_llm.data.facts import Facts

    to = tmp_path / "known.json"
    command = [sys.executable, str(ROOT / "tools" / "known_facts.py"), str(model_folder), "--facts", str(facts)]
    done = subprocess.run(
        [*command, "--to", str(to), "--languages", "en", "de"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(to.read_text())
    counted = written["asked_and_known"]["in"]
    assert counted["en"][1] == counted["de"][1] == counted["two or more"][1] == 12
    assert counted["de"][0] == sum("de" in languages for languages in written["known"].values())
    assert f"| de | {counted['de'][0]} of 12 |" in done.stdout
    if twice := [name for name, languages in written["known"].items() if len(languages) == 2]:
        data = ready(Facts(str(facts), known=str(to)))
        assert [request.id for request in data.requests()] == twice


def test_a_file_that_is_not_there_is_told_without_a_trace(model_folder, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "known_facts.py"), str(model_folder), "--facts", "nowhere.jsonl"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--to", str(tmp_path / "x.json")], capture_output=True, text=True, timeout=120, cwd=ROOT, env=env
    )
    assert done.returncode == 1 and done.stderr.startswith("known_facts: No file of facts at nowhere.jsonl")
