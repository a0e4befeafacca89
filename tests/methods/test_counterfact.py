"""CounterFact's scores in a run: likelihoods of new and former answers, before any edit and after."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_edits import edit_config
from tests.tiny_runs import fit

OLD = {"en": "Chad", "de": "Irak"}


def with_former_answers(path, languages=("en", "de")) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for code in languages:
            text = row["by_lang"][code]
            text["target_old"] = OLD[code] if text["target_new"] != OLD[code] else "Togo"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counterfact")
    config = edit_config(folder, data={"counterfact": True}, single=True)
    rows = with_former_answers(folder / "facts.jsonl")
    cli = fit(config)
    lines = [json.loads(line) for line in (cli.model.run_folder / "edits.jsonl").read_text().splitlines()]
    return folder, rows, cli, lines


def test_scores_before_any_edit_are_those_of_the_plain_model(run):
    folder, rows, _, lines = run
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval().double()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    @torch.no_grad()
    def nll(prompt: str, answer: str) -> float:
        before, ids = (tokenizer(text, return_tensors="pt")["input_ids"][0] for text in (prompt, f"{prompt} {answer}"))
        log_prob = model(input_ids=ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        return -log_prob[len(before) - 1 :].mean().item()

    for code in ("en", "de"):
        wins = {"ES": [], "PS": [], "NS": [], "EM": []}
        for row in rows:
            text = row["by_lang"][code]
            new, old = nll(text["prompt"], text["target_new"]), nll(text["prompt"], text["target_old"])
            wins["ES"].append(new < old)
            wins["EM"].append(torch.tensor([-new, -old]).exp().diff().neg().item())
            (rephrased,), (other,) = text["rephrase"], text["locality"]
            wins["PS"].append(nll(rephrased, text["target_new"]) < nll(rephrased, text["target_old"]))
            wins["NS"].append(nll(other["prompt"], other["answer"]) < nll(other["prompt"], text["target_new"]))
        for name, values in wins.items():
            expected = 100 * sum(values) / len(values)
            assert lines[0]["counterfact"][code][name] == pytest.approx(expected, abs=1e-3), name


def test_edits_make_new_answers_likelier_than_former_ones_and_leave_neighbours(run):
    _, _, cli, lines = run
    before, after = lines[0]["counterfact"]["all"], lines[-1]["counterfact"]["all"]
    assert after["ES"] == 100 > before["ES"] and after["EM"] > before["EM"]
    assert after["NS"] == before["NS"] and after["NM"] == pytest.approx(before["NM"], abs=1e-4)
    assert cli.trainer.callback_metrics["val/counterfact_ES"] == 100
    assert "CounterFact" in (cli.model.run_folder / "report.html").read_text()


def test_other_scores_do_not_count_the_rivals(run, tmp_path):
    _, _, _, lines = run
    config = edit_config(tmp_path, single=True)
    with_former_answers(tmp_path / "facts.jsonl")
    without = fit(config).model.run_folder / "edits.jsonl"
    plain = json.loads(without.read_text().splitlines()[-1])
    assert plain["scores"] == lines[-1]["scores"] and plain["counterfact"] == {}
    ours, theirs = (sorted(map(json.dumps, line["answers"])) for line in (plain, lines[-1]))
    assert ours == theirs


def test_facts_without_a_former_answer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no request has a target_old"):
        fit(edit_config(tmp_path, data={"counterfact": True}))


def test_languages_without_a_former_answer_are_left_out(tmp_path):
    config = edit_config(tmp_path, data={"counterfact": True})
    with_former_answers(tmp_path / "facts.jsonl", languages=("de",))
    folder = fit(config).model.run_folder
    assert set(json.loads((folder / "edits.jsonl").read_text().splitlines()[-1])["counterfact"]) == {"de", "all"}
