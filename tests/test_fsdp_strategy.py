"""FSDP2 beside DDP and beside one process, on a CPU; its checkpoints are those of DDP."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_llm.models.fully_sharded import divide
from tests.processes import fit_in_two_processes, in_two_processes
from tests.tiny import byte_level_tokenizer, tiny_model_folder
from tests.tiny_languages import language_config
from tests.tiny_runs import assert_identical, assert_same_logs, fit, largest_gap, last_weights, tiny_config, write_rows

ROOT = Path(__file__).parents[1]
FSDP = '{"class_path": "lit_llm.fsdp_strategy.FsdpStrategy"}'
FROZEN = '{"class_path": "lit_llm.fsdp_strategy.FsdpStrategy", "init_args": {"divide_frozen": true}}'
CASES, RESUMED = ("sft_leftover", "kd_lora", "dskd_cross", "align", "moe1"), ("kd_lora", "align")
EVERY = [(case, "fsdp") for case in CASES] + [(case, "fsdp_frozen") for case in ("kd_lora", "dskd_cross", "align")]
CONTINUED = [(case, stage) for case, stage in EVERY if case in RESUMED]
IN_PARTS = [
    *("--data.init_args.bucket=1", "--trainer.limit_val_batches=0"),
    "--model.init_args.projectors.masked_mean=labelled",  # independent of how a batch is split
]
NEAR = 2e-5  # steps of 1e-2 in float32: AdamW divides by the root of squared gradients close to 0
WHOLE, HALVES = "--data.init_args.batch_size=4", "--data.init_args.batch_size=2"
DIES = ("--trainer.callbacks+=tests.tiny_runs.DieAt", "--trainer.callbacks.step=2")


@pytest.fixture(scope="session")
def found(once, tmp_path_factory) -> dict[tuple[str, str], dict]:
    """What `tools/check_scale.py` notes; every case trains under DDP and under FSDP, with frozen models whole and divided."""
    return {(row["case"], row["stage"]): row for row in once("fully_sharded", lambda: compared(tmp_path_factory))}


def compared(tmp_path_factory) -> list[dict]:
    file = tmp_path_factory.mktemp("fully_sharded") / "found.json"
    command = [sys.executable, str(ROOT / "tools" / "check_scale.py"), "--json", str(file), "--cases", *CASES]
    command += ["--stages", "fsdp", "fsdp_frozen", "--resume", *RESUMED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=file.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize(("case", "stage"), EVERY)
def test_fsdp_trains_as_ddp_does(found, case, stage):
    row = found[case, stage]
    assert row["loss"] < 2e-6 and row["norm"] < 1e-6  # losses around 6, in float32
    assert row["val"] < 1e-5 and row["weights"] < 1e-5  # AdamW divides by the root of squared gradients close to 0
    assert row["missing_metrics"] == []


@pytest.mark.parametrize(("case", "stage"), EVERY)
def test_everything_trained_is_divided_and_of_frozen_models_what_is_asked_for(found, case, stage):
    row = found[case, stage]
    assert row["divided"] == 1
    assert row["frozen"] == ("layers" if stage == "fsdp_frozen" else "nothing") and not row["frozen_trains"]


@pytest.mark.parametrize(("case", "stage"), EVERY)
def test_the_head_is_gathered_once_a_micro_batch(found, case, stage):
    assert found[case, stage]["head"] == 1


@pytest.mark.parametrize(("case", "stage"), EVERY)
def test_a_checkpoint_holds_what_that_of_ddp_holds(found, case, stage):
    assert found[case, stage]["other_names"] == []


@pytest.mark.parametrize(("case", "stage"), CONTINUED)
def test_a_stopped_run_continues_bit_for_bit_and_its_checkpoint_becomes_a_plain_model(found, case, stage):
    assert found[case, stage]["resumed"] == 0
    assert found[case, stage]["export"] == 0


def test_some_experts_got_no_token_in_a_process(found):
    assert found["moe1", "fsdp"]["experts_without_tokens"]


def test_projectors_are_clipped_by_the_norm_of_all_processes(tmp_path):
    options = [*IN_PARTS, "--model.init_args.projectors.gradient_clip=0.01"]
    fit(tiny_config(tmp_path / "one", "dskd_v1", dropout=0.0, max_steps=3), WHOLE, *options)
    config = tiny_config(tmp_path / "two", "dskd_v1", dropout=0.0, max_steps=3)
    done = fit_in_two_processes(config, HALVES, *options, strategy=FSDP)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (tmp_path / which / "runs" / "dskd_v1" / "version_0" for which in ("one", "two"))
    assert largest_gap(last_weights(one), last_weights(two)) < NEAR
    assert_same_logs(one, two, tolerance=1e-4)  # the norm before clipping among them


@pytest.mark.parametrize("divided_later", [True, False], ids=["one process, then FSDP", "FSDP, then one process"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, divided_later):
    unbroken = fit(tiny_config(tmp_path / "unbroken", "dskd", dropout=0.0, max_steps=5), WHOLE, *IN_PARTS)
    config = tiny_config(tmp_path / "broken", "dskd", dropout=0.0, max_steps=5)
    if divided_later:
        with pytest.raises(RuntimeError, match="died on purpose"):
            fit(config, WHOLE, *IN_PARTS, *DIES)
        done = fit_in_two_processes(config, HALVES, *IN_PARTS, "--ckpt_path=last", strategy=FSDP)
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        done = fit_in_two_processes(config, HALVES, *IN_PARTS, *DIES, strategy=FSDP)
        assert "died on purpose" in done.stderr
        fit(config, WHOLE, *IN_PARTS, "--ckpt_path=last")
    resumed = tmp_path / "broken" / "runs" / "dskd" / "version_0"
    assert largest_gap(last_weights(unbroken.model.run_folder), last_weights(resumed)) < NEAR


def test_routers_stay_float32_beside_experts_in_bfloat16(tmp_path):
    for name, strategy in (("ddp", "ddp"), ("fsdp", FSDP)):
        config = language_config(tmp_path / name, 1, max_steps=2, val_check_interval=2)
        done = fit_in_two_processes(config, "--trainer.precision=bf16-true", strategy=strategy)
        assert done.returncode == 0, done.stderr[-2000:]
    ddp, fsdp = (last_weights(tmp_path / name / "runs" / "stage1" / "version_0") for name in ("ddp", "fsdp"))
    assert {value.dtype for name, value in fsdp.items() if "router" in name} == {torch.float32}
    assert {value.dtype for name, value in fsdp.items() if "experts" in name} == {torch.bfloat16}
    assert_identical(ddp, fsdp)


def test_a_process_may_run_the_model_alone_while_it_is_whole(tmp_path):
    model = tiny_model_folder(tmp_path / "model", family="llama", layers=3, hidden_size=16)
    done = in_two_processes("-m", "tests.divided_alone", model)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(float(line) < 1e-6 for line in done.stdout.split())


def test_pairs_that_may_pass_a_sliding_window_are_refused(tmp_path):
    config = tiny_config(tmp_path, "dpo", max_steps=1)
    model = tiny_model_folder(
        tmp_path / "sliding",
        family="mistral",
        tokenizer=byte_level_tokenizer(),
        hidden_size=16,
        layers=1,
        sliding_window=64,
    )
    method = fit(config, f"--model.init_args.student.source={model}").model
    method.check_divided(weights=False, frozen=False, norms=True)
    with pytest.raises(ValueError, match=r"sees 64 tokens .* may have 96 .*data.max_length to 32 or less"):
        method.check_divided(weights=True, frozen=False, norms=True)
    method.trainer.datamodule.encoding = replace(method.trainer.datamodule.encoding, max_length=32)
    method.check_divided(weights=True, frozen=False, norms=True)


def test_frozen_models_are_not_divided_where_processes_would_not_run_them_equally_often(tmp_path):
    store = f"--model.init_args.teacher_store.folder={tmp_path / 'store'}"
    method = fit(tiny_config(tmp_path / "kd", "kd", max_steps=1), store).model
    method.check_divided(weights=True, frozen=False, norms=True)
    with pytest.raises(ValueError, match=r"teacher_store.folder is .* and strategy.divide_frozen is true"):
        method.check_divided(weights=False, frozen=True, norms=True)
    method = fit(tiny_config(tmp_path / "sampled", "kd_sampled", max_steps=1)).model
    with pytest.raises(ValueError, match=r"student_fraction is 0.5, .* without divide_frozen"):
        method.check_divided(weights=False, frozen=True, norms=True)


def test_nothing_frozen_to_divide_is_refused(tmp_path):
    done = fit_in_two_processes(tiny_config(tmp_path, "sft", max_steps=1), strategy=FROZEN)
    assert done.returncode and "SFT holds no frozen model" in done.stderr


def test_a_finished_store_beside_divided_frozen_models_is_named(tmp_path):
    options = [f"--model.init_args.teacher_store.folder={tmp_path / 'store'}", "--run.version=first"]
    config = tiny_config(tmp_path, "kd", max_steps=1)
    fit(config, *options)
    done = fit_in_two_processes(config, *options[:1], strategy=FROZEN)
    assert done.returncode and "a store is filled by whole models" in done.stderr


def test_a_share_of_the_validation_data_is_the_same_in_every_process(tmp_path):
    rows = write_rows(tmp_path / "five.jsonl", 5)
    options = [f"--data.init_args.validation={rows}", "--data.init_args.eval_batch_size=1"]
    config = tiny_config(tmp_path, "kd", max_steps=2, val_check_interval=2)
    done = fit_in_two_processes(config, *options, "--trainer.limit_val_batches=0.4", strategy=FROZEN)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_window_of_frozen_models_that_read_one_answer_does_not_matter(tmp_path):
    config = tiny_config(tmp_path, "adpa", max_steps=1)
    folder = tmp_path / "sliding"
    settings = {"family": "mistral", "hidden_size": 16, "layers": 1, "sliding_window": 64}
    teacher = tiny_model_folder(folder, tokenizer=byte_level_tokenizer(), **settings)
    method = fit(config, f"--model.init_args.teacher.source={teacher}").model
    method.check_divided(weights=False, frozen=True, norms=True)


def test_quantised_weights_are_refused():
    method = nn.Linear(2, 2)
    method.register_parameter("packed", nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False))
    with pytest.raises(ValueError, match=r"packed is torch.uint8: quantised weights are not divided"):
        divide(method, [], mesh=None)
