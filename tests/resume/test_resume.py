"""A run that died continues as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.tiny_runs import METHODS, assert_identical, fit, tiny_config, weights

# in the middle of an epoch for all; before the first validation and across an epoch's border for some
EARLY_AND_LATE = [(method, step) for method in ("kd", "dskd_cross", "kd_sampled", "align_sampled") for step in (1, 6)]


@pytest.mark.parametrize(("method", "step"), [*((method, 3) for method in METHODS), *EARLY_AND_LATE])
def test_resuming_after_a_crash_gives_the_same_weights(tmp_path, method, step):
    unbroken = fit(tiny_config(tmp_path / "unbroken", method))
    config = tiny_config(tmp_path / "broken", method)
    with pytest.raises(RuntimeError, match="died on purpose"):
        fit(config, "--trainer.callbacks+=tests.tiny_runs.DieAt", f"--trainer.callbacks.step={step}")

    resumed = fit(config, "--ckpt_path", "last")

    assert resumed.trainer.global_step == 8
    assert_identical(weights(resumed), weights(unbroken))


def test_resuming_inside_an_accumulation_and_at_an_epoch_border_gives_the_same_weights(tmp_path):
    # 24 rows, batches of 4, 2 batches a step: 3 steps an epoch
    unbroken = fit(tiny_config(tmp_path / "unbroken", "dskd", accumulate_grad_batches=2))
    config = tiny_config(tmp_path / "broken", "dskd", accumulate_grad_batches=2)
    with pytest.raises(RuntimeError, match="died on purpose"):
        fit(config, "--trainer.callbacks+=tests.tiny_runs.DieAt", "--trainer.callbacks.step=3")

    assert_identical(weights(fit(config, "--ckpt_path", "last")), weights(unbroken))


def test_a_process_killed_at_a_random_moment_resumes_to_the_same_weights(tmp_path):
    unbroken = fit(tiny_config(tmp_path / "unbroken", "kd", max_steps=40))
    config = tiny_config(tmp_path / "broken", "kd", max_steps=40)
    last = tmp_path / "broken" / "runs" / "kd" / "version_0" / "checkpoints" / "last.ckpt"
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_llm", "fit", "--config", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # sums depend on it
    )
    for _ in range(1200):
        if last.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    time.sleep(random.random())
    process.send_signal(signal.SIGKILL)
    process.wait()

    resumed = fit(config, "--ckpt_path", "last")

    assert resumed.trainer.global_step == 40
    assert_identical(weights(resumed), weights(unbroken))


def test_a_resumed_run_continues_its_own_folder_and_metrics(tmp_path):
    config = tiny_config(tmp_path, "sft")
    with pytest.raises(RuntimeError, match="died on purpose"):
        fit(config, "--trainer.callbacks+=tests.tiny_runs.DieAt", "--trainer.callbacks.step=5")
    resumed = fit(config, "--ckpt_path", "last")

    folder = tmp_path / "runs" / "sft" / "version_0"
    assert resumed.model.run_folder == folder
    assert [path.name for path in (tmp_path / "runs" / "sft").iterdir()] == ["version_0"]
    header, *rows = (folder / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("train/loss")
    assert sum(1 for row in rows if row.split(",")[column]) == 8
