"""Answers that the student samples: what is supervised, how they are counted, and that runs can be repeated."""

from __future__ import annotations

import pytest
import torch

from lit_llm.data.rollouts import Rollout, RolloutBatches
from lit_llm.losses.divergence import Divergence
from lit_llm.methods.on_policy import OnPolicy, Rollouts
from tests.reference import distillation as reference
from tests.tiny import byte_level_tokenizer, sentencepiece_tokenizer
from tests.tiny_runs import fit, tiny_config


def test_everything_up_to_the_first_end_of_sequence_is_supervised():
    tokenizer = byte_level_tokenizer()
    answer = tokenizer("Paris.")["input_ids"]
    finished, cut = Rollout(tuple(answer), True), Rollout(tuple(answer), False)
    batch = RolloutBatches(tokenizer, None)([[5, 6, 7], [8, 9]], [[], []], [finished, cut])

    eos = tokenizer.eos_token_id
    assert batch.student.target_T[batch.student.sequence_T == 0].tolist() == [*answer, eos]
    assert batch.student.target_T[batch.student.sequence_T == 1].tolist() == answer
    assert batch.student.length_B.tolist() == [3 + len(answer) + 1, 2 + len(answer)]
    assert batch.step_tokens == batch.step_pairs == 2 * len(answer) + 1


def test_an_answer_that_is_the_end_of_sequence_alone_is_supervised():
    tokenizer = byte_level_tokenizer()  # pads with the end of sequence, which must not hide it
    batch = RolloutBatches(tokenizer, None)([[5]], [[]], [Rollout((), True)])
    assert batch.student.target_T.tolist() == [tokenizer.eos_token_id]


@pytest.mark.parametrize("text", ["The capital of France is Paris.", "Café naïve, 你好\n  two spaces", "🙂"])
def test_the_teacher_reads_the_same_bytes_in_its_own_tokens(text):
    student, teacher = byte_level_tokenizer(), sentencepiece_tokenizer()
    rollout = Rollout(tuple(student(text)["input_ids"]), True)
    batch = RolloutBatches(student, teacher)([[5, 6]], [[7, 8, 9]], [rollout])

    assert teacher.decode(batch.teacher.target_T[:-1]).strip() == text.strip()
    assert batch.teacher.target_T[-1] == teacher.eos_token_id
    pairs = list(zip(batch.pair_student_A.tolist(), batch.pair_teacher_A.tolist(), strict=True))
    assert (batch.student.num_supervised - 1, batch.teacher.num_supervised - 1) in pairs
    for ours, theirs in pairs[:-1]:
        spelled = student.decode(batch.student.target_T[ours : ours + 1])
        assert spelled.strip() == teacher.decode(batch.teacher.target_T[theirs : theirs + 1]).strip()


def test_a_character_cut_in_half_pairs_nothing_after_it():
    student, teacher = byte_level_tokenizer(), sentencepiece_tokenizer()
    ids = student("a 你")["input_ids"][:-1]
    batch = RolloutBatches(student, teacher)([[5]], [[7]], [Rollout(tuple(ids), False)])
    last_whole = len(student("a")["input_ids"])
    assert all(row < last_whole + 1 for row in batch.pair_student_A.tolist())


def test_the_loss_on_sampled_answers_is_the_formula(tmp_path):
    cli = fit(tiny_config(tmp_path, "kd_sampled", dropout=0.0, max_steps=1), "--model.init_args.on_policy.updates=1")
    method, data = cli.model.double(), cli.datamodule
    batch = next(iter(data.train_dataloader()))
    method.rollouts.settings.student_fraction = 1.0
    compared = method.rollouts.compared(batch)
    assert compared.sampled and compared.tokens == compared.batch.student.num_supervised
    prompt = data.sets["train"][batch.examples[0]]["student_prompt_ids"]
    assert compared.batch.student.ids_BL[0, : len(prompt)].tolist() == prompt

    student, teacher = method.student, method.teacher
    sampled = compared.batch.student
    rows = [
        module(input_ids=sampled.ids_BL).logits.flatten(0, 1)[sampled.position_T]
        for module in (student.model, teacher.model)
    ]
    expected = sum(
        reference.divergence(q, p.detach(), "forward_kl", temperature=2.0) for q, p in zip(*rows, strict=True)
    )
    found = method.loss(compared.batch, method.teacher_hidden(compared.batch), ce_weight=0.0, kd_weight=1.0)
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-6, atol=1e-9)
    assert isinstance(method.divergence, Divergence)


def test_all_micro_batches_of_a_step_are_divided_by_what_is_compared_in_the_step(tmp_path):
    config = tiny_config(tmp_path, "kd_sampled", max_steps=1, accumulate_grad_batches=3)
    cli = fit(config, "--model.init_args.on_policy.updates=2")
    method, loader = cli.model, cli.datamodule.train_dataloader()
    method.rollouts.window.clear()
    compared = [method.rollouts.compared(batch) for batch in loader]
    assert len(compared) == 6 and {one.sampled for one in compared} == {True, False}
    for step in (compared[:3], compared[3:]):
        assert {one.tokens for one in step} == {sum(one.batch.student.num_supervised for one in step)}


def test_measuring_alone_trains_as_without_it(tmp_path):
    plain = fit(tiny_config(tmp_path / "plain", "kd"))
    measured = fit(tiny_config(tmp_path / "measured", "kd_sampled"), "--model.init_args.on_policy.student_fraction=0")
    for ours, theirs in zip(plain.model.parameters(), measured.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    metrics = measured.trainer.callback_metrics
    assert metrics["val/sampled_reverse_kl"] > 0 and metrics["val/sampled_tokens"] >= 1


def test_sampling_begins_with_its_epoch(tmp_path):
    # 24 rows, batches of 4: 6 steps an epoch
    cli = fit(
        tiny_config(tmp_path, "kd_sampled", max_steps=8),
        *("--model.init_args.on_policy.start_epoch=1", "--model.init_args.on_policy.student_fraction=1"),
    )
    lines = (cli.model.run_folder / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/on_policy")
    values = [row.split(",")[column] for row in lines[1:]]
    assert [float(value) for value in values if value] == [0.0] * 6 + [1.0] * 2


def test_sampling_leaves_the_generators_alone(tmp_path):
    cli = fit(tiny_config(tmp_path, "kd_sampled", max_steps=1))
    method = cli.model
    before = torch.get_rng_state()
    Rollouts(OnPolicy(), method)._sample([[1, 2, 3]], seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_cross_model_attention_refuses_sampled_answers(tmp_path):
    config = tiny_config(tmp_path, "dskd_cross_cma")
    with pytest.raises(ValueError, match="model.on_policy is set, but projectors.across_tokenizers is 'cma'"):
        fit(config, "--model.init_args.on_policy.student_fraction=0.5")


@pytest.mark.parametrize(("name", "value"), [("student_fraction", 1.5), ("updates", 0), ("batch_size", 0)])
def test_settings_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ValueError, match=f"on_policy.{name} is {value}"):
        OnPolicy(**{name: value})


@pytest.mark.parametrize("name", ["kd_sampled", "dskd_cross_sampled", "align_sampled", "adpa_sampled"])
def test_coins_that_fall_differently_in_each_process_are_refused_where_weights_are_divided(tmp_path, name):
    method = fit(
        tiny_config(tmp_path, name), "--trainer.max_steps=1", "--model.init_args.on_policy.student_fraction=0.5"
    ).model
    method.check_divided(weights=False, frozen=False, norms=False)
    with pytest.raises(ValueError, match="student_fraction is 0.5"):
        method.check_divided(weights=True, frozen=False, norms=False)
    method.rollouts.settings.student_fraction = 1.0
    method.check_divided(weights=True, frozen=False, norms=False)
