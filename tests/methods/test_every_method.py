"""What holds for every method: what should train moves, what is frozen stays, splitting a batch changes nothing."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.processes import fit_in_two_processes
from tests.tiny_runs import METHODS, assert_same_logs, fit, largest_gap, last_weights, tiny_config

# the published masked means are over a micro-batch; this switch makes them independent of how a batch is split, and
# greedy answers to all prompts do not depend on it either
SPLITTABLE = {method: [] for method in METHODS} | {
    "dskd": ["--model.init_args.projectors.masked_mean=labelled"],
    "dskd_cross": ["--model.init_args.projectors.masked_mean=labelled"],
    "kd_sampled": (
        SAME_ANSWERS := [
            f"--model.init_args.on_policy.{setting}" for setting in ("student_fraction=1", "temperature=0")
        ]
    ),
    "dskd_sampled": SAME_ANSWERS,
    "dskd_cross_sampled": ["--model.init_args.projectors.masked_mean=labelled", *SAME_ANSWERS],
    "align_sampled": SAME_ANSWERS,
    "adpa_sampled": SAME_ANSWERS,
}


def state(module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_student_and_the_projectors_move_and_the_teacher_does_not(tmp_path, method):
    config = tiny_config(tmp_path, method, max_steps=3)
    before = load_file(tmp_path / "student" / "model.safetensors")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").state_dict()

    cli = fit(config)

    trained = {name: p for name, p in cli.model.named_parameters()}
    student = {name.removeprefix("student.model."): p for name, p in trained.items() if name.startswith("student.")}
    still = [name for name, value in before.items() if name in student and torch.equal(student[name].data, value)]
    assert len(student) > 10 and not still
    if cli.model.teacher is not None:
        assert largest_gap(cli.model.teacher.model.state_dict(), teacher) == 0
        assert all(p.grad is None for p in cli.model.teacher.parameters())
    projectors = [name for name in trained if not name.startswith("student.")]
    assert bool(projectors) == method.startswith("dskd")
    fresh = fit(config, "--trainer.max_steps=1", "--run.version=fresh")
    for name in projectors:
        assert not torch.equal(dict(fresh.model.named_parameters())[name], trained[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_holds_the_student_and_nothing_of_the_teacher(tmp_path, method):
    cli = fit(tiny_config(tmp_path, method, max_steps=1))
    checkpoint = torch.load(tmp_path / "runs" / method / "version_0/checkpoints/last.ckpt", weights_only=False)

    names = set(checkpoint["state_dict"])
    assert names == set(cli.model.state_dict())
    assert all(name.split(".")[0] in ("student", "t2s", "s2t", "attention") for name in names)
    optimized = sum(len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"])
    assert optimized == len(list(cli.model.parameters()))


# the scales of cross-model attention are published as those of a micro-batch, so it is not among these
@pytest.mark.parametrize("method", [method for method in METHODS if method != "dskd_cross_cma"])
def test_splitting_a_batch_into_accumulation_steps_does_not_change_the_weights(tmp_path, method):
    def trained(batch_size: int, accumulate: int):
        config = tiny_config(
            tmp_path / f"{batch_size}", method, dropout=0.0, max_steps=3, accumulate_grad_batches=accumulate
        )
        options = [
            f"--data.init_args.batch_size={batch_size}",
            "--data.init_args.bucket=1",
            "--trainer.precision=64-true",
        ]
        options += [
            "--trainer.limit_val_batches=0",
            "--trainer.val_check_interval=null",
            "--checkpoint.every_n_train_steps=3",
        ]
        options += ["--model.init_args.student.dtype=float32", *SPLITTABLE[method]]
        return state(fit(config, *options).model)

    whole = trained(8, 1)
    for batch_size, accumulate in ((4, 2), (2, 4)):
        assert largest_gap(trained(batch_size, accumulate), whole) < 1e-6


@pytest.mark.parametrize(
    "method", ["kd", "dskd", "dskd_cross", "uld_cross", "mined_cross", "shared_cross", "gold_cross_hybrid"]
)
def test_twenty_steps_bring_the_student_closer_to_the_data(tmp_path, method):
    config = tiny_config(tmp_path, method, max_steps=24, val_check_interval=24)
    untrained = fit(config, "--trainer.max_steps=1", "--trainer.val_check_interval=1", "--run.version=start")
    trained = fit(config)
    assert trained.trainer.callback_metrics["val/loss"] < untrained.trainer.callback_metrics["val/loss"] - 0.3


# KTO's baseline has a test of its own, LayerMoE too; CMA's published scales are a micro-batch's
OVER_PROCESSES = [method for method in METHODS if method not in ("kto", "dskd_cross_cma")]
IN_PARTS = ["--data.init_args.bucket=1", "--trainer.limit_val_batches=0", "--trainer.precision=64-true"]
WHOLE, HALVES = "--data.init_args.batch_size=4", "--data.init_args.batch_size=2"


@pytest.mark.parametrize("method", OVER_PROCESSES)
def test_two_processes_train_the_same_weights_as_one_and_log_the_same_numbers(tmp_path, method):
    options = [*IN_PARTS, *SPLITTABLE[method]]
    fit(tiny_config(tmp_path / "one", method, dropout=0.0, max_steps=3), WHOLE, *options)
    done = fit_in_two_processes(tiny_config(tmp_path / "two", method, dropout=0.0, max_steps=3), HALVES, *options)
    assert done.returncode == 0, done.stderr[-2000:]

    one, two = (tmp_path / which / "runs" / method / "version_0" for which in ("one", "two"))
    assert largest_gap(last_weights(one), last_weights(two)) < 1e-6
    assert_same_logs(one, two)


@pytest.mark.parametrize("method", ["dskd", "align"])
@pytest.mark.parametrize("more_later", [True, False], ids=["one, then two", "two, then one"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, method, more_later):
    options = [*IN_PARTS, *SPLITTABLE[method]]
    unbroken = fit(tiny_config(tmp_path / "unbroken", method, dropout=0.0, max_steps=5), WHOLE, *options)
    config = tiny_config(tmp_path / "broken", method, dropout=0.0, max_steps=5)
    dies = ("--trainer.callbacks+=tests.tiny_runs.DieAt", "--trainer.callbacks.step=2")
    if more_later:
        with pytest.raises(RuntimeError, match="died on purpose"):
            fit(config, WHOLE, *options, *dies)
        done = fit_in_two_processes(config, HALVES, *options, "--ckpt_path=last")
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        assert "died on purpose" in fit_in_two_processes(config, HALVES, *options, *dies).stderr
        fit(config, WHOLE, *options, "--ckpt_path=last")
    resumed = tmp_path / "broken" / "runs" / method / "version_0"
    assert largest_gap(last_weights(unbroken.model.run_folder), last_weights(resumed)) < 1e-6


def test_gradients_are_clipped_under_mixed_precision_too(tmp_path):
    config = tiny_config(tmp_path, "dskd", max_steps=1)
    options = (
        "--trainer.precision=bf16-mixed",
        "--model.init_args.optimization={lr: 1.0e-2, eps: 1.0, weight_decay: 0.0}",
    )

    free = fit(config, *options)
    clipped = fit(config, *options, "--trainer.gradient_clip_val=1.0e-3", "--run.version=clipped")

    before = load_file(tmp_path / "student" / "model.safetensors")
    moved = [
        max(
            (p.data - before[name]).abs().max()
            for name, p in cli.model.student.model.named_parameters()
            if name in before
        )
        for cli in (free, clipped)
    ]
    assert 0 < moved[1] < 1e-2 * moved[0]  # a large eps makes AdamW's step as large as the gradient


def test_a_run_leaves_a_plain_model_folder_that_answers_like_the_student(tmp_path):
    cli = fit(tiny_config(tmp_path, "dskd", max_steps=2))
    folder = cli.model.run_folder

    reloaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    for name, value in reloaded.state_dict().items():
        assert torch.equal(value, cli.model.student.model.state_dict()[name])
    for file in ("config.yaml", "metrics.csv", "report.html", "samples.jsonl", "environment.json"):
        assert (folder / file).is_file(), file
    assert list(folder.glob("events.out.tfevents*"))
