"""KTO: its loss by hand with the baseline of a whole step, that nothing depends on splits, and what it learns."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_llm.methods import KTO
from lit_llm.models.language_model import ModelSpec
from lit_llm.training_cli import TrainingCLI
from tests.methods.test_every_method import state
from tests.processes import fit_in_two_processes
from tests.tiny import byte_level_tokenizer, tiny_model_folder
from tests.tiny_runs import assert_same_logs, fit, largest_gap, tiny_config, write_pairs

ONE_STEP = ("--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.val_check_interval=null")


def metrics(cli) -> dict[str, float]:
    return {name: value.item() for name, value in cli.trainer.callback_metrics.items()}


def with_bad_reference(folder, **settings) -> tuple:
    """A config whose reference finds every answer less likely than the policy does, so that z_0 is far above 0."""
    config = tiny_config(folder, "kto", dropout=0.0, **settings)
    reference = tiny_model_folder(
        folder / "reference", tokenizer=byte_level_tokenizer(), hidden_size=32, layers=2, seed=7, initializer_range=0.5
    )
    return config, (f"--model.init_args.reference.source={reference}", "--trainer.precision=64-true")


def log_ratio(folder, prompt: list[int], answer: list[int]) -> float:
    """log policy(answer) - log reference(answer) by plain models in float64."""
    sums = []
    for name in ("student", "reference"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64).eval()
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        sums.append(logits.log_softmax(-1)[range(len(answer)), answer].sum().item())
    return sums[0] - sums[1]


@torch.no_grad()
def test_the_loss_is_that_of_the_paper_with_the_baseline_of_the_whole_step(tmp_path):
    config, options = with_bad_reference(tmp_path, accumulate_grad_batches=3)
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.7, "beta": 0.03}
    cli = fit(config, *ONE_STEP, *options, *(f"--model.init_args.{name}={value}" for name, value in weights.items()))

    part = cli.datamodule.sets["train"]
    step = [part[example] for micro in cli.datamodule._training_sampler(part).plan(0)[:3] for example in micro.examples]
    assert len(step) == 12
    own, others = (
        [log_ratio(tmp_path, row["student_prompt_ids"], row[f"{side}_ids"]) for row in step]
        for side in ("chosen", "rejected")
    )
    baseline = max(0.0, sum(others) / len(others))
    losses = []
    for row, ratio in zip(step, own, strict=True):
        sign, weight = (1, 1.2) if row["good"] else (-1, 0.7)
        losses.append(weight * (1 - 1 / (1 + math.exp(-sign * 0.03 * (ratio - baseline)))))
    assert baseline > 1
    assert metrics(cli)["train/baseline"] == pytest.approx(baseline, rel=1e-5)
    assert metrics(cli)["train/loss"] == pytest.approx(sum(losses) / 12, rel=1e-5)
    batches = list(cli.datamodule.train_dataloader())
    assert [batch.step_pairs for batch in batches[:3]] == [12, 12, 12]


def test_splitting_a_batch_changes_nothing_where_the_baseline_is_above_zero(tmp_path):
    def trained(batch_size: int, accumulate: int):
        config, options = with_bad_reference(
            tmp_path / str(batch_size), max_steps=3, accumulate_grad_batches=accumulate
        )
        quiet = ("--trainer.limit_val_batches=0", "--trainer.val_check_interval=null")
        sizes = (f"--data.init_args.batch_size={batch_size}", "--data.init_args.bucket=1")
        return fit(config, *options, *quiet, *sizes, "--model.init_args.beta=0.03")

    whole, split = trained(8, 1), trained(2, 4)
    assert metrics(whole)["train/baseline"] > 1
    assert metrics(split)["train/baseline"] == pytest.approx(metrics(whole)["train/baseline"], abs=1e-6)
    assert largest_gap(state(split.model), state(whole.model)) < 1e-6


def test_two_processes_have_one_baseline(tmp_path):
    quiet = ("--trainer.limit_val_batches=0", "--trainer.val_check_interval=null", "--data.init_args.bucket=1")
    config, options = with_bad_reference(tmp_path / "one", max_steps=3)
    fit(config, *options, *quiet, "--data.init_args.batch_size=4", "--model.init_args.beta=0.03")
    config, options = with_bad_reference(tmp_path / "two", max_steps=3)
    quiet += ("--data.init_args.batch_size=2", "--model.init_args.beta=0.03")
    done = fit_in_two_processes(config, *options, *quiet)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (tmp_path / which / "runs/kto/version_0" for which in ("one", "two"))
    files = [run / "checkpoints/last.ckpt" for run in (one, two)]
    ours, theirs = (torch.load(file, weights_only=False)["state_dict"] for file in files)
    assert largest_gap(ours, theirs) < 1e-6
    assert_same_logs(one, two)


def test_good_answers_become_more_likely_and_bad_ones_less(tmp_path):
    config = tiny_config(tmp_path, "kto", max_steps=24, val_check_interval=24)
    found = metrics(fit(config, "--model.init_args.beta=0.3"))
    assert found["val/label_accuracy"] > 0.7
    assert found["val/good_reward"] > found["val/bad_reward"] + 0.5


def test_the_policy_starts_as_its_own_reference(tmp_path):
    found = metrics(fit(tiny_config(tmp_path, "kto", dropout=0.3), *ONE_STEP))
    assert found["train/loss"] == pytest.approx(0.5, abs=1e-4)
    assert found["train/baseline"] == pytest.approx(0, abs=1e-4)


def test_a_pair_gives_a_good_and_a_bad_answer(tmp_path):
    config = tiny_config(tmp_path, "kto", max_steps=24, val_check_interval=24)
    for part, number in (("train", 24), ("validation", 4)):
        write_pairs(tmp_path / f"{part}.jsonl", number)
    cli = fit(config, "--model.init_args.beta=0.3")
    part = cli.datamodule.sets["train"]
    assert len(part) == 48 and sum(part.good) == 24
    assert metrics(cli)["val/label_accuracy"] > 0.7
    assert len(cli.datamodule.prompts("validation")) == 4


def test_validation_does_not_depend_on_its_batches(tmp_path):
    found = []
    for size in (1, 4):
        config, options = with_bad_reference(tmp_path / str(size), max_steps=2, val_check_interval=2)
        found.append(metrics(fit(config, *options, f"--data.init_args.eval_batch_size={size}")))
    names = ("loss", "baseline", "good_reward", "bad_reward", "label_accuracy")
    assert found[0]["val/baseline"] > 1
    for name in names:
        assert found[0][f"val/{name}"] == pytest.approx(found[1][f"val/{name}"], rel=1e-6), name


def test_a_checkpoint_can_be_tested_on_other_answers(tmp_path):
    config = tiny_config(tmp_path, "kto", max_steps=2)
    fit(config)
    cli = TrainingCLI.run(["test", "--config", str(config), "--ckpt_path", "last"])
    assert {"test/loss", "test/label_accuracy", "test/good_reward"} <= cli.trainer.callback_metrics.keys()


@pytest.mark.parametrize("name", ["beta", "desirable_weight", "undesirable_weight"])
def test_settings_that_make_no_sense_are_refused(name):
    with pytest.raises(ValueError, match=f"model.{name} is 0"):
        KTO(ModelSpec(source="x"), **{name: 0})
