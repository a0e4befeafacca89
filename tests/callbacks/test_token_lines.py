"""Answers token by token in token_scores.jsonl, and histograms in TensorBoard."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_llm.callbacks.histograms import Histograms
from lit_llm.callbacks.step_axis import StepAxis
from lit_llm.callbacks.token_lines import TokenLines
from lit_llm.callbacks.validate_at_start import ValidateAtStart
from tests.callbacks.small import SmallMethod, trainer_in


def lines_of(folder):
    return [json.loads(line) for line in (folder / "run/version_0/token_scores.jsonl").read_text().splitlines()]


def test_every_validation_appends_its_answers_with_short_numbers(tmp_path):
    trainer_in(tmp_path, [TokenLines(), ValidateAtStart()], num_sanity_val_steps=2).fit(SmallMethod())
    lines = lines_of(tmp_path)
    assert [(line["step"], line["stage"]) for line in lines] == [(0, "val"), (3, "val"), (6, "val")]
    assert lines[1] == {
        "step": 3,
        "stage": "val",
        "prompt": "Two?",
        "tokens": ["fo", "ur"],
        "scores": {"alpha": [0.12346, 2.0], "reward": [-1.0, 3.0]},
    }


def test_a_resumed_run_writes_no_line_twice_and_a_test_adds_its_own(tmp_path):
    trainer = trainer_in(tmp_path, [TokenLines(), StepAxis()], max_steps=4)
    trainer.fit(SmallMethod())
    trainer.save_checkpoint(tmp_path / "at4.ckpt")
    later = {"ckpt_path": tmp_path / "at4.ckpt", "weights_only": False}
    for _ in range(2):
        trainer_in(tmp_path, [TokenLines(), StepAxis()]).fit(SmallMethod(), **later)
    trainer_in(tmp_path, [TokenLines()]).test(SmallMethod(), **later)
    assert [(line["step"], line["stage"]) for line in lines_of(tmp_path)] == [(3, "val"), (6, "val"), (4, "test")]


def test_a_method_that_shows_no_tokens_leaves_no_file(tmp_path):
    class Quiet(SmallMethod):
        def on_validation_epoch_end(self):
            pass

    trainer_in(tmp_path, [TokenLines(), Histograms()], tensorboard=True).fit(Quiet())
    assert not (tmp_path / "run/version_0/token_scores.jsonl").exists()


def test_histograms_stand_at_the_step_of_their_validation_and_empty_ones_are_left_out(tmp_path):
    trainer_in(tmp_path, [Histograms(), ValidateAtStart()], tensorboard=True).fit(SmallMethod())
    events = EventAccumulator(str(tmp_path / "run/version_0"), size_guidance={"histograms": 0})
    events.Reload()
    assert events.Tags()["histograms"] == ["tokens/alpha"]
    found = events.Histograms("tokens/alpha")
    assert [event.step for event in found] == [0, 3, 6]
    value = found[1].histogram_value
    assert (value.min, value.max, value.num) == (3.0, 7.0, 5.0)
