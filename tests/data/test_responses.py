"""Answers on disk: they grow by whole batches, survive a kill, and belong to one set of settings."""

import json

import pytest

from lit_llm.data.responses import ResponseFile, batch_seed, plan_batches

MANIFEST = {"model": "a", "temperature": 0.5}


def answers(*indices: int) -> dict[int, dict]:
    return {index: {"response": f"answer {index}\u2028 é", "finished": True} for index in indices}


def test_what_was_appended_is_found_again(tmp_path):
    file = ResponseFile(tmp_path / "answers.jsonl", MANIFEST)
    file.append(answers(3, 1))
    file.append(answers(2))
    assert ResponseFile(tmp_path / "answers.jsonl", MANIFEST).answers == answers(3, 1, 2)
    assert not file.complete


@pytest.mark.parametrize("lost", [1, 5, 40])
def test_half_a_line_is_dropped_and_written_over(tmp_path, lost):
    file = ResponseFile(tmp_path / "answers.jsonl", MANIFEST)
    file.append(answers(0, 1))
    file.partial.write_bytes(file.partial.read_bytes()[:-lost])
    again = ResponseFile(tmp_path / "answers.jsonl", MANIFEST)
    assert again.answers == answers(0)
    again.append(answers(0, 1))
    assert ResponseFile(tmp_path / "answers.jsonl", MANIFEST).answers == answers(0, 1)


def test_other_settings_are_refused_naming_both_values(tmp_path):
    file = ResponseFile(tmp_path / "answers.jsonl", MANIFEST)
    file.append(answers(0))
    with pytest.raises(ValueError, match=r"temperature: there 0\.5, now 0\.7"):
        ResponseFile(tmp_path / "answers.jsonl", {**MANIFEST, "temperature": 0.7})
    file.finish([{"prompt": "a", "response": "b"}])
    assert not file.partial.exists()
    assert ResponseFile(tmp_path / "answers.jsonl", MANIFEST).complete
    with pytest.raises(ValueError, match="model: there 'a', now 'b'"):
        ResponseFile(tmp_path / "answers.jsonl", {**MANIFEST, "model": "b"})


def test_a_file_that_came_from_elsewhere_is_not_written_over(tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    with pytest.raises(ValueError, match="mine.jsonl was made with other settings"):
        ResponseFile(tmp_path / "mine.jsonl", MANIFEST)
    with pytest.raises(ValueError, match=r"ends in \.jsonl"):
        ResponseFile(tmp_path / "mine.csv", MANIFEST)


def test_batches_hold_every_prompt_once_the_longest_first():
    assert plan_batches([3, 9, 3, 5, 1], 2) == [[1, 3], [0, 2], [4]]


def test_seeds_depend_on_the_run_and_on_the_prompt():
    assert len({batch_seed(run, prompt) for run in range(3) for prompt in range(50)}) == 150
    assert batch_seed(1, 2) == batch_seed(1, 2)
