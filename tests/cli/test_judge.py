"""`judge` lets models answer, rewards the answers by log-ratios of a judge, and can be stopped anywhere."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_llm import judging
from lit_llm.cli import main
from lit_llm.data.responses import ResponseFile
from lit_llm.evaluation import constraints
from tests.tiny import sentencepiece_tokenizer, tiny_model_folder
from tests.tiny_runs import write_pairs, write_rows


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models, and eight pairs of which two share a prompt and one has no checks."""
    folder = tmp_path_factory.mktemp("judge")
    # wide weights, so that models say different things, and a strong column for the end, so that some answers end
    for seed, name in enumerate(("judge", "start", "a", "b")):
        tiny_model_folder(folder / name, seed=seed, initializer_range=0.5)
    tiny_model_folder(folder / "foreign", tokenizer=sentencepiece_tokenizer(), seed=9, initializer_range=0.5)
    for name in ("a", "foreign"):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        model.lm_head.weight.data[model.config.eos_token_id] *= 3
        model.save_pretrained(folder / name)
    rows = [json.loads(line) for line in write_pairs(folder / "pairs.jsonl", 8).read_text().splitlines()]
    for row in rows:
        row["checks"] += [{"kind": "no_digit"}, {"kind": "min_words", "value": 3}]
    rows[1] |= {key: rows[0][key] for key in ("prompt", "checks")}
    rows[7]["checks"] = []
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def options(folders, to, *more: str) -> list[str]:
    given = [
        "judge",
        "--judge",
        folders / "judge",
        "--judge_start",
        folders / "start",
        "--data",
        folders / "pairs.jsonl",
    ]
    given += ["--answers", f"a={folders / 'a'}", f"same={folders / 'a'}", f"b={folders / 'foreign'}"]
    given += ["--against", "a", "b", "--seeds", "10", "20", "--max_new_tokens", "6", "--template", "plain"]
    return [str(word) for word in [*given, "--batch_size", "3", "--resamples", "50", "--to", to, *more]]


@pytest.fixture(scope="module")
def judged(folders, tmp_path_factory):
    to = tmp_path_factory.mktemp("judged")
    main(options(folders, to))
    return to, json.loads((to / "results.json").read_text())


def lines_of(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def log_prob(folder, prompt: str, answer: list[int]) -> float:
    """Of an answer, by transformers alone, one sequence at a time, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    logits = AutoModelForCausalLM.from_pretrained(folder).double()(torch.tensor([ids + answer])).logits[0]
    log_p = logits[:, : len(tokenizer)].log_softmax(-1)
    return sum(log_p[len(ids) + i - 1, token].item() for i, token in enumerate(answer))


def test_the_reward_is_beta_times_the_log_ratio_of_the_answers_own_tokens(folders, judged):
    to, results = judged
    tokenizer = AutoTokenizer.from_pretrained(folders / "judge")
    rewards, tokens, unfinished = [], 0, 0
    for seed in (10, 20):
        answers = lines_of(to / "answers" / f"b.seed{seed}.jsonl")
        assert len(answers) == 7
        for answer in answers:
            ids = tokenizer(answer["response"], add_special_tokens=False)["input_ids"]
            tokens += len(ids)
            ids += [tokenizer.eos_token_id] if answer["finished"] else []
            unfinished += not answer["finished"]
            prompt = answer["prompt"]
            rewards.append(0.1 * (log_prob(folders / "judge", prompt, ids) - log_prob(folders / "start", prompt, ids)))
    found = results["models"]["b"]
    assert found["rewards"]["judge"]["value"] == pytest.approx(sum(rewards) / 14, abs=1e-4)
    assert 0 < unfinished < 14 and found["unfinished"] == pytest.approx(unfinished / 14)
    assert found["tokens"]["value"] == pytest.approx(tokens / 14)
    assert (found["answers"], found["prompts"]) == (14, 7)


def test_the_ground_truth_is_the_share_of_checks_over_the_prompts_that_have_some(folders, judged):
    to, results = judged
    rows = {row["prompt"]: row for row in map(json.loads, (folders / "pairs.jsonl").read_text().splitlines())}
    found = [
        constraints.reward(answer["response"], checks)
        for seed in (10, 20)
        for answer in lines_of(to / "answers" / f"a.seed{seed}.jsonl")
        if (checks := rows[answer["prompt"].strip()]["checks"])
    ]
    assert len(found) == 12 and len(set(found)) > 1
    assert results["models"]["a"]["rewards"]["checks"]["value"] == pytest.approx(sum(found) / 12)


def test_a_model_ties_with_itself_and_others_mirror_each_other(judged):
    models = judged[1]["models"]
    for reward in ("judge", "checks"):
        for kind in ("win_rate", "length_controlled"):
            assert models["same"]["against"]["a"][reward][kind] == {"value": 0.5, "low": 0.5, "high": 0.5}
            ours, theirs = models["a"]["against"]["b"][reward][kind], models["b"]["against"]["a"][reward][kind]
            assert ours["value"] == pytest.approx(1 - theirs["value"])
    assert set(models["a"]["against"]) == {"b"} and set(models["same"]["against"]) == {"a", "b"}


def test_the_judges_accuracy_is_that_of_its_log_ratios_on_the_pairs(folders, judged):
    tokenizer = AutoTokenizer.from_pretrained(folders / "judge")
    right = []
    for row in map(json.loads, (folders / "pairs.jsonl").read_text().splitlines()):
        ratios = []
        for side in ("chosen", "rejected"):
            ids = [*tokenizer(row[side], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            prompt = row["prompt"] + "\n"
            ratios.append(log_prob(folders / "judge", prompt, ids) - log_prob(folders / "start", prompt, ids))
        right.append(ratios[0] > ratios[1])
    assert judged[1]["judge_accuracy"]["value"] == pytest.approx(sum(right) / 8)
    assert judged[1]["judge_accuracy"]["pairs"] == 8


def test_a_table_is_printed_and_kept_and_a_second_call_computes_nothing(folders, judged, capsys, monkeypatch):
    to, _ = judged
    table, results = (to / "table.md").read_text(), (to / "results.json").read_bytes()
    monkeypatch.setattr(judging, "answer_prompts", None)
    monkeypatch.setattr(judging, "answer_all", None)
    main(options(folders, to))
    assert capsys.readouterr().out == table and (to / "results.json").read_bytes() == results
    assert "| model | judge reward | ground-truth reward | tokens | unfinished |" in table
    assert "| same | a | 50.0% [50.0%, 50.0%]" in table and "| a | a |" not in table
    assert not list(to.rglob("*.partial"))


@pytest.mark.parametrize("batches", [1, 10, 18])  # of the first model's answers, of the second's, of rewards
def test_a_stopped_call_goes_on_and_says_the_same(folders, judged, tmp_path, monkeypatch, batches):
    append, calls = ResponseFile.append, []

    def dying(self, answers):
        if len(calls) == batches:
            raise KeyboardInterrupt
        calls.append(answers)
        append(self, answers)

    monkeypatch.setattr(ResponseFile, "append", dying)
    with pytest.raises(KeyboardInterrupt):
        main(options(folders, tmp_path))
    assert not (tmp_path / "results.json").exists()
    monkeypatch.undo()
    main(options(folders, tmp_path))
    assert (tmp_path / "table.md").read_bytes() == (judged[0] / "table.md").read_bytes()


def test_another_model_joins_without_new_answers_of_the_others(folders, judged, tmp_path, monkeypatch):
    to, first = shutil.copytree(judged[0], tmp_path / "judged"), judged[1]
    answered = []
    answer_prompts = judging.answer_prompts
    monkeypatch.setattr(
        judging, "answer_prompts", lambda file, *rest: (answered.append(file.path.name), answer_prompts(file, *rest))
    )
    given = options(folders, to)
    given.insert(given.index("--against"), f"new={folders / 'b'}")
    main(given)
    assert answered == ["new.seed10.jsonl", "new.seed20.jsonl"]
    again = json.loads((to / "results.json").read_text())["models"]
    assert set(again) == {"a", "same", "b", "new"} and again["a"] == first["models"]["a"]


def test_answers_without_checks_are_judged_by_the_judge_alone(folders, tmp_path):
    rows = [json.loads(line) for line in (folders / "pairs.jsonl").read_text().splitlines()]
    data = tmp_path / "plain.jsonl"
    data.write_text("\n".join(json.dumps({k: v for k, v in row.items() if k != "checks"}) for row in rows) + "\n")
    main(options(folders, tmp_path / "out", "--data", str(data), "--limit", "3"))
    assert "ground-truth" not in (tmp_path / "out" / "table.md").read_text()


REFUSED = [
    (["--against", "dpo"], ["'dpo'", "--answers has a, same, b", "Add dpo=MODEL"]),
    (["--judge_start", "FOLDER/foreign"], ["FOLDER/judge has another tokenizer", "FOLDER/foreign", "--judge_start"]),
    (["--judge_start", "FOLDER/judge"], ["has the weights of --judge_start", "every reward would be 0", "judge.yaml"]),
    (["--data", "FOLDER/rows.jsonl"], ["'chosen'", "prompt, response", "--columns", "demo-preferences:test"]),
    (["--answers", "FOLDER/a"], ["FOLDER/a", "NAME=MODEL"]),
    (["--answers", "a=FOLDER/a", "a=FOLDER/b"], ["'a' twice", "FOLDER/a and", "FOLDER/b"]),
    (["--seeds", "1", "1"], ["--seeds has 1, 1"]),
    (["--temperature", "0"], ["--temperature is 0", "10, 20", "one seed"]),
    (["--beta", "0"], ["--beta is 0"]),
    (["--to", "FOLDER/pairs.jsonl"], ["--to is FOLDER/pairs.jsonl", "is a file"]),
]


@pytest.mark.parametrize(("more", "words"), REFUSED, ids=lambda value: value[0] if value[0].startswith("--") else "")
def test_what_cannot_be_judged_is_refused_by_name_with_a_way_out(folders, tmp_path, capfd, more, words, monkeypatch):
    write_rows(folders / "rows.jsonl", 3)
    monkeypatch.setattr(judging, "answer_prompts", lambda *rest: None)
    monkeypatch.setattr(judging, "_answers", lambda *rest: None)  # what is wrong with the judge shows after the answers
    with pytest.raises(SystemExit) as stop:
        main(options(folders, tmp_path / "out", *(word.replace("FOLDER", str(folders)) for word in more)))
    assert stop.value.code == 1
    text = capfd.readouterr().err
    for word in words:
        assert word.replace("FOLDER", str(folders)) in text
    assert not (tmp_path / "out" / "results.json").exists()


def test_another_judge_under_the_same_name_is_refused_by_its_weights(folders, judged, capfd):
    with pytest.raises(SystemExit):
        main(options(folders, judged[0], "--judge", str(folders / "b")))
    assert "judge_hash: there '" in capfd.readouterr().err
