"""Samples in TensorBoard and in samples.jsonl."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_llm.callbacks.samples import Samples, markdown_table
from lit_llm.callbacks.step_axis import StepAxis
from lit_llm.callbacks.validate_at_start import ValidateAtStart
from lit_llm.evaluation.samples import Sample
from tests.callbacks.small import SmallMethod, trainer_in


def lines_of(folder):
    return [json.loads(line) for line in (folder / "run/version_0/samples.jsonl").read_text().splitlines()]


def texts_of(folder, tag):
    events = EventAccumulator(str(folder / "run/version_0"))
    events.Reload()
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)]


def test_every_validation_appends_its_samples_with_step_and_stage(tmp_path):
    trainer_in(tmp_path, [Samples(), ValidateAtStart()], num_sanity_val_steps=2).fit(SmallMethod())
    lines = lines_of(tmp_path)
    assert [(line["step"], line["stage"]) for line in lines] == [(0, "val"), (3, "val"), (6, "val")]
    assert lines[1] == {
        "step": 3,
        "stage": "val",
        "prompt": "Two | plus\ntwo?",
        "reference": "four",
        "answers": {"student": "<b>3</b>"},
    }


def test_tensorboard_gets_a_table_at_each_step(tmp_path):
    trainer_in(tmp_path, [Samples()], tensorboard=True).fit(SmallMethod())
    texts = texts_of(tmp_path, "samples/val/text_summary")
    assert [step for step, _ in texts] == [3, 6]
    assert "| Two \\| plus<br>two? | four | &lt;b>3&lt;/b> |" in texts[0][1]


def test_the_table_has_a_column_for_everybody_who_answered():
    samples = [Sample("p", "r", {"start": "s", "student": "t"}), Sample("q", "r", {"teacher": "u"})]
    assert markdown_table(samples).splitlines() == [
        "| prompt | reference | start | student | teacher |",
        "| --- | --- | --- | --- | --- |",
        "| p | r | s | t |  |",
        "| q | r |  |  | u |",
    ]


def test_a_resumed_run_writes_no_sample_twice(tmp_path):
    trainer = trainer_in(tmp_path, [Samples(), StepAxis()], max_steps=4)
    trainer.fit(SmallMethod())
    trainer.save_checkpoint(tmp_path / "at4.ckpt")
    for _ in range(2):
        resumed = trainer_in(tmp_path, [Samples(), StepAxis()])
        resumed.fit(SmallMethod(), ckpt_path=tmp_path / "at4.ckpt", weights_only=False)
    assert [line["step"] for line in lines_of(tmp_path)] == [3, 6]


def test_the_samples_of_a_test_stand_at_the_step_of_the_checkpoint(tmp_path):
    trainer = trainer_in(tmp_path, [Samples()])
    trainer.fit(SmallMethod())
    trainer.save_checkpoint(tmp_path / "at6.ckpt")
    trainer_in(tmp_path, [Samples()]).test(SmallMethod(), ckpt_path=tmp_path / "at6.ckpt", weights_only=False)
    last = lines_of(tmp_path)[-1]
    assert (last["step"], last["stage"]) == (6, "test")
