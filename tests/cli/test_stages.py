"""Earlier stages of a run are run, recognised, redone when something changed, and go on when they were killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from lit_llm.stages import fingerprint, referred
from lit_llm.training_cli import TrainingCLI
from tests.tiny_runs import tiny_config


@pytest.fixture
def config(tmp_path) -> Path:
    """AlignDistil whose two frozen models come from stages; all three runs are tiny."""
    dpo = tiny_config(tmp_path, "dpo", max_steps=2, val_check_interval=2)
    final = yaml.safe_load(tiny_config(tmp_path, "align", max_steps=2, val_check_interval=2).read_text())
    final["stages"] = {
        "dpo": {"config": [dpo.name]},
        "reverse": {"config": [dpo.name], "set": {"model.init_args.reverse": True}},
    }
    final["model"]["init_args"] |= {"dpo": {"source": "stage:dpo"}, "other": {"source": "stage:reverse"}}
    path = tmp_path / "align.yaml"
    path.write_text(yaml.safe_dump(final))
    return path


def fit(config: Path, *options: str) -> TrainingCLI:
    return TrainingCLI.run(["fit", "--config", str(config), *options])


def finished(config: Path) -> dict[str, list[Path]]:
    stages = config.parent / "runs" / "align" / "stages"
    return {name: sorted((stages / name).glob("*/stage.json")) for name in ("dpo", "reverse")}


def change(config: Path, **optimization) -> None:
    """Other settings of the stages' config."""
    path = config.parent / "dpo.yaml"
    stage = yaml.safe_load(path.read_text())
    stage["model"]["init_args"]["optimization"] |= optimization
    path.write_text(yaml.safe_dump(stage))


def test_stages_are_run_first_recognised_when_they_are_done_and_redone_when_something_changed(config, caplog):
    cli = fit(config)

    done = finished(config)
    assert [len(files) for files in done.values()] == [1, 1]
    models = {name: files[0].parent / "model" for name, files in done.items()}
    assert str(cli.model.dpo_spec.source) == str(models["dpo"])
    assert str(cli.model.other_spec.source) == str(models["reverse"])
    weights = [AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight for folder in models.values()]
    assert not weights[0].equal(weights[1])
    written = [file.stat().st_mtime_ns for files in done.values() for file in files]

    again = fit(config)

    assert again.model.run_folder.name == "version_1"
    assert [file.stat().st_mtime_ns for files in finished(config).values() for file in files] == written
    assert "Stage dpo (1 of 2): done before" in caplog.text

    final = yaml.safe_load(config.read_text())
    final["stages"]["reverse"]["set"]["model.init_args.beta"] = 0.2
    config.write_text(yaml.safe_dump(final))
    fit(config)
    assert [len(files) for files in finished(config).values()] == [1, 2]

    rows = config.parent / "train.jsonl"
    rows.write_text(rows.read_text().replace("saw a", "met a"))
    fit(config)
    assert [len(files) for files in finished(config).values()] == [2, 3]


def test_a_run_that_is_killed_in_a_stage_goes_on_there(config):
    stage = yaml.safe_load((config.parent / "dpo.yaml").read_text())
    stage["trainer"] |= {"max_steps": 60, "val_check_interval": 60}
    (config.parent / "dpo.yaml").write_text(yaml.safe_dump(stage))
    checkpoints = config.parent / "runs" / "align" / "stages" / "dpo"
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_llm", "fit", "--config", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for _ in range(12_000):
        if list(checkpoints.glob("*/checkpoints/last.ckpt")) or process.poll() is not None:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert finished(config)["dpo"] == []

    fit(config)

    (folder,) = (file.parent for file in finished(config)["dpo"])
    starts = json.loads((folder / "environment.json").read_text())["starts"]
    assert len(starts) == 2 and starts[1]["step"] > 0


def test_other_commands_want_the_stages_done(config):
    with pytest.raises(FileNotFoundError, match=r"Stage dpo \(1 of 2\) has not been run"):
        TrainingCLI.run(["validate", "--config", str(config)])


def test_a_stage_that_fails_is_named_with_its_own_command(config):
    change(config, lr=-1.0, final_lr=-2.0)
    with pytest.raises(ChildProcessError, match=r"(?s)Stage dpo \(1 of 2\) ended with status.*python -m lit_llm fit"):
        fit(config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stages": {"dpo": {"config": ["missing.yaml"]}}}, "'missing.yaml', which is in none of"),
        ({"stages": {}}, "'stage:dpo' names no earlier stage; there are: none"),
    ],
)
def test_what_is_missing_is_named(config, settings, said):
    final = yaml.safe_load(config.read_text()) | settings
    config.write_text(yaml.safe_dump(final))
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        fit(config)


def test_the_machine_is_no_part_of_a_stage_and_its_seed_is():
    config = {"seed_everything": 0, "trainer": {"max_steps": 3, "devices": 1}, "run": {"root": "a"}}
    elsewhere = {**config, "trainer": {"max_steps": 3, "devices": 8, "strategy": "ddp"}, "run": {"root": "b"}}
    assert fingerprint(config) == fingerprint(elsewhere) != fingerprint({**config, "seed_everything": 1})


def test_stages_are_found_within_lists_and_dictionaries():
    assert referred({"a": ["stage:x", 1]}, {"x": "/m"}) == {"a": ["/m", 1]}
