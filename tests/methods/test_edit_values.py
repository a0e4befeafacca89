"""A run on a tiny model that has learned where eight towns are: what edits change, and what they leave."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_llm.data.fact_tokens import FactText, encode_facts
from tests.tiny_edits import LANDS, TOWNS, WORDS, edit_config
from tests.tiny_runs import fit

WORDINGS = ("{}", "The town of {}", "So {}")
EDITED = 3


def land(town: int, code: str, moved: int = 0) -> str:
    return LANDS[code][(town + moved) % 3]


def prompt(town: int, code: str, wording: int) -> str:
    return WORDINGS[wording].format(WORDS[code].format(TOWNS[town]))


def learn_where_towns_are(folder, steps: int = 250) -> None:
    """Every town in both languages and three wordings; the answer ends with a line break."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    places = [(town, code, wording) for town in range(len(TOWNS)) for code in LANDS for wording in range(len(WORDINGS))]
    rows = encode_facts(tokenizer, [FactText(c, prompt(t, c, w), land(t, c) + "\n") for t, c, w in places])
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in rows])
    wanted = torch.full_like(ids, -100)
    for at, row in enumerate(rows):
        wanted[at, row.prompt_length : len(row.ids)] = ids[at, row.prompt_length : len(row.ids)]
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(steps):
        loss = cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05, f"not learned, loss {loss.item():.3f}"
    model.save_pretrained(folder)


def write_moves(path) -> None:
    """The first towns move to another land; the others stay, and are asked about as what is unrelated."""
    lines = []
    for town in range(EDITED):
        other = EDITED + town
        by_lang = {
            code: {
                "subject": TOWNS[town],
                "prompt": prompt(town, code, 0),
                "target_new": land(town, code, moved=1),
                "rephrase": [prompt(town, code, 1)],
                "locality": [
                    {"prompt": prompt(other, code, wording), "answer": land(other, code)} for wording in (0, 1)
                ],
                "portability": [{"prompt": prompt(town, code, 2), "answer": land(town, code, moved=1)}],
            }
            for code in LANDS
        }
        lines.append(json.dumps({"id": TOWNS[town], "relation": "land", "by_lang": by_lang}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """What edits.jsonl says before the first edit and after the last one."""
    folder = tmp_path_factory.mktemp("taught")
    config = edit_config(
        folder,
        layers=[0, 1, 2],
        locating={"top_ratio": 0.4, "min_neurons": 8},
        optimising={"steps": 60, "learning_rate": 0.2, "kl_weight": 0.0, "weight_decay": 0.001},
        trigger={"scope": "subject"},
        generation={"prompts": 8, "max_new_tokens": 12},
        data={"target_end": "\n"},
    )
    learn_where_towns_are(folder / "model")
    write_moves(folder / "facts.jsonl")
    run = fit(config, "--trainer.val_check_interval=2")
    written = [json.loads(text) for text in (run.model.run_folder / "edits.jsonl").read_text().splitlines()]
    return written[0], written[-1]


@pytest.mark.parametrize("protocol", ["generated", "exact"])
def test_an_edit_changes_every_question_that_names_its_subject(lines, protocol):
    before, after = lines
    for kind, least in (("reliability", 100), ("generality", 65), ("portability", 65)):
        assert before["scores"][kind]["all"][protocol] == 0
        assert after["scores"][kind]["all"][protocol] >= least, kind
    assert after["trigger"] == {"hit": 100, "miss": 0, "wrong": 0, "unrelated_edited": 0}


@pytest.mark.parametrize("protocol", ["generated", "generated_f1", "exact", "tokens", "f1"])
def test_answers_about_other_subjects_stay_equal(lines, protocol):
    _, after = lines
    assert [after["scores"]["locality"][code][protocol] for code in ("en", "de", "all")] == [100, 100, 100]
    unrelated = [answer for answer in after["answers"] if answer["kind"] == "locality"]
    assert len(unrelated) == 4 * EDITED and all(answer["after"] == answer["before"] for answer in unrelated)


def test_values_are_the_shares_of_right_answers(lines):
    for kind, by_language in lines[1]["scores"].items():
        for code in ("en", "de"):
            right = [a["right"] for a in lines[1]["answers"] if (a["kind"], a["language"]) == (kind, code)]
            assert by_language[code]["generated"] == pytest.approx(100 * sum(right) / len(right))
