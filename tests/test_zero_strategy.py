"""ZeRO beside DDP with two processes on a CPU; folders as checkpoints; what is refused."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_llm.checkpoint_io import read_checkpoint
from lit_llm.storage import replace_folder
from lit_llm.zero_checkpoint import check_processes, tensors_only
from tests.tiny_runs import fit, tiny_config

ROOT = Path(__file__).parents[1]
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs lit_llm[deepspeed]")
CASES = ("sft", "sft_leftover", "dskd_cross", "align", "moe1")  # leftover: 6 micro-batches in an epoch, 4 in a step
STAGES, RESUMED = ("1", "2", "3"), ("dskd_cross", "moe1")
EVERY = [(case, stage) for case in CASES for stage in STAGES]
EVERY += [(case, stage) for case in ("dskd_cross", "align") for stage in ("2_frozen", "3_frozen")]


class Code:
    """Runs when it is unpickled by a reader that allows code."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture(scope="session")
def found(once, tmp_path_factory) -> dict[tuple[str, str], dict]:
    """What `tools/check_scale.py` notes, by case and stage; every case trains under DDP and under the stages of ZeRO."""
    return {(row["case"], row["stage"]): row for row in once("scale", lambda: compared(tmp_path_factory))}


def compared(tmp_path_factory) -> list[dict]:
    file = tmp_path_factory.mktemp("scale") / "found.json"
    command = [sys.executable, str(ROOT / "tools" / "check_scale.py"), "--json", str(file), "--cases", *CASES]
    command += ["--stages", *STAGES, "2_frozen", "3_frozen", "--resume", *RESUMED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=file.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(file.read_text())


@needs_deepspeed
@pytest.mark.parametrize(("case", "stage"), EVERY)
def test_zero_trains_as_ddp_does(found, case, stage):
    row = found[case, stage]
    assert row["loss"] < 2e-6 and row["norm"] < 1e-6  # losses around 6, in float32
    assert row["val"] < 1e-5 and row["weights"] < 1e-5  # AdamW divides by the root of squared gradients close to 0


@needs_deepspeed
@pytest.mark.parametrize(("case", "stage"), EVERY)
def test_a_folder_holds_what_a_checkpoint_of_ddp_holds_and_nothing_frozen(found, case, stage):
    assert found[case, stage]["other_names"] == []


@needs_deepspeed
@pytest.mark.parametrize(("case", "stage"), EVERY)
def test_stage_3_divides_every_trained_parameter_and_frozen_models_where_it_is_asked_to(found, case, stage):
    row = found[case, stage]
    assert row["divided"] == stage.startswith("3")
    assert row["frozen"] == ("layers" if stage.endswith("_frozen") else "nothing") and not row["frozen_trains"]


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", RESUMED)
def test_a_stopped_run_continues_bit_for_bit_and_its_folder_becomes_a_plain_model(found, case, stage):
    assert found[case, stage]["resumed"] == 0
    assert found[case, stage]["export"] == 0


@needs_deepspeed
@pytest.mark.parametrize("case", CASES)
def test_a_head_is_gathered_once_for_each_direction(found, case):
    assert 1 <= found[case, "3"]["head"] <= 2


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_some_experts_got_no_token_in_a_process(found, stage):
    assert found["moe1", stage]["experts_without_tokens"]


@needs_deepspeed
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stage": 2, "offload_parameters": True}, "strategy.stage is 2"),
        ({"stage": 1, "whole_below": 0}, "whole_below is 0, but strategy.stage is 1"),
    ],
)
def test_settings_of_stage_3_are_refused_elsewhere(settings, said):
    from lit_llm.zero_strategy import ZeroStrategy

    with pytest.raises(ValueError, match=said):
        ZeroStrategy(**settings)


@needs_deepspeed
def test_another_number_of_processes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"written by 1 processes, but this run has 2"):
        check_processes(written_folder(tmp_path / "last.ckpt"), 2)


@needs_deepspeed
def test_what_deepspeed_reads_is_read_as_tensors_wherever_it_asks_for_pickles(tmp_path):
    torch.save({"weights": Code(tmp_path / "ran")}, tmp_path / "part.pt")
    with tensors_only(), pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "part.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "part.pt", weights_only=False)  # what it would have done
    assert (tmp_path / "ran").exists()


@pytest.mark.skipif(HAS_DEEPSPEED, reason="deepspeed is installed")
def test_without_deepspeed_the_extra_is_named():
    from lit_llm.zero_strategy import ZeroStrategy

    with pytest.raises(ValueError, match=r"lit_llm\[deepspeed\]"):
        ZeroStrategy()


@pytest.mark.parametrize(
    ("strategy", "way_out"),
    [
        ("deepspeed_stage_3", "deepspeed_z"),
        ("fsdp", "fsdp2"),
        ("lightning.pytorch.strategies.ModelParallelStrategy", "fsdp2"),
    ],
)
def test_strategies_that_would_take_weights_away_are_refused(tmp_path, strategy, way_out):
    with pytest.raises(ValueError, match=f"configs/trainer/{way_out}"):
        fit(tiny_config(tmp_path, "sft"), f"--trainer.strategy={strategy}")


def test_a_folder_is_refused_where_the_strategy_divides_nothing(tmp_path):
    folder = written_folder(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="a part for every process, but trainer.strategy is not ZeroStrategy"):
        fit(tiny_config(tmp_path, "sft"), f"--ckpt_path={folder}")


def test_nothing_in_a_folder_is_run(tmp_path):
    folder = written_folder(tmp_path / "last.ckpt", Code(tmp_path / "ran"))
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("content", "said"), [(None, "not one that ZeroStrategy wrote"), ({}, "no 'lit_llm' entry")])
def test_a_folder_of_something_else_is_refused(tmp_path, content, said):
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    if content is not None:
        (folder / "checkpoint").mkdir()
        torch.save(content, folder / "checkpoint" / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match=said):
        read_checkpoint(folder)


def test_a_finished_folder_takes_the_place_of_the_one_before(tmp_path):
    for number in (1, 2):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "part").write_text(str(number))
        replace_folder(tmp_path / "new", tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt" / "part").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def written_folder(folder: Path, extra=None) -> Path:
    """A checkpoint folder of one process, without weights."""
    (folder / "checkpoint").mkdir(parents=True)
    torch.save({"lit_llm": {"identity": {}}, "extra": extra}, folder / "checkpoint" / "mp_rank_00_model_states.pt")
    torch.save({}, folder / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return folder
