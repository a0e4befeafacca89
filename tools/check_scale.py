"""Does a method train the same under ZeRO and FSDP as under DDP? Two processes on a CPU, tiny models, one table.

    python tools/check_scale.py                                   # every case, every stage
    python tools/check_scale.py --cases kd_chunks dskd --stages 3 fsdp
    python tools/check_scale.py --nodes                           # two launcher agents on loopback as two nodes

Stages with `_frozen` divide frozen models too, in cases that hold one. Stages with a number need `lit_llm[deepspeed]`. Each case is a config of the tests: 4 optimizer steps under DDP, the same under
`ZeroStrategy` or `FsdpStrategy`, and 2 steps, a stop, and 2 more from the checkpoint. Columns, where 0 is equal to the last bit:

- loss, norm, val: largest difference of the training loss, the gradient's norm and the validation loss from DDP;
- weights: largest difference of the exported `model/` from that of DDP;
- resumed: largest difference of the exported model after a stop from that of the unbroken run;
- export: of `export` from the last checkpoint, from the run's own `model/`;
- in checkpoint: names that are in it, and in the DDP run's file;
- head: how often the head's weight is gathered in a micro-batch (stage 3, fsdp).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
LORA = "--model.init_args.student.lora={rank: 4, target_modules: all-linear}"
SAMPLED = "--model.init_args.on_policy.student_fraction=1"
CASES = {  # name -> config of the tests, options
    "sft": ("sft", []),
    "sft_accumulate": ("sft", ["--trainer.accumulate_grad_batches=3"]),
    "sft_leftover": ("sft", ["--trainer.accumulate_grad_batches=4"]),
    "sft_unclipped": ("sft", ["--trainer.gradient_clip_val=0"]),
    "kd_chunks": ("kd", ["--model.init_args.loss_chunk=4"]),
    "kd_lora": ("kd", [LORA]),
    "kd_sampled": ("kd_sampled", [SAMPLED]),
    "dskd": ("dskd", []),
    "dskd_v1": ("dskd_v1", []),
    "dskd_cross": ("dskd_cross", []),
    "dskd_cross_cma": ("dskd_cross_cma", []),
    "uld_cross": ("uld_cross", []),
    "mined_cross": ("mined_cross", []),
    "shared_cross": ("shared_cross", []),
    "gold_cross": ("gold_cross", []),
    "dpo": ("dpo", []),
    "tdpo": ("dpo", ["--model.init_args.loss=tdpo2"]),
    "kto": ("kto", []),
    "align": ("align", []),
    "align_sampled": ("align_sampled", [SAMPLED]),
    "dckd": ("dckd", []),
    "adpa": ("adpa", []),
    "adpa_sampled": ("adpa_sampled", [SAMPLED]),
    "moe1": ("moe1", []),
    "moe2": ("moe2", []),
}
OFFLOADED = {"offload_optimizer": True}
DIVIDED = {"stage": 3, "whole_below": 0}  # even the smallest parameter, for in a tiny model all are small
STAGES = {
    "1": {"stage": 1},
    "2": {"stage": 2},
    "2_offload": {"stage": 2, **OFFLOADED},
    "3": DIVIDED,
    "3_offload": {**DIVIDED, **OFFLOADED, "offload_parameters": True},
    "fsdp": {},
    "1_frozen": {"stage": 1, "divide_frozen": True},
    "2_frozen": {"stage": 2, "divide_frozen": True},
    "3_frozen": {**DIVIDED, "divide_frozen": True},
    "fsdp_frozen": {"divide_frozen": True},
}
HOLDS_NO_FROZEN = ("sft", "dpo", "kto", "moe")  # beginnings of cases
STEPS, STOP = 4, 2
COLUMNS = ("loss", "norm", "val", "weights", "resumed", "export", "in_checkpoint", "head")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument(
        "--resume", nargs="*", choices=list(CASES), help="cases that are stopped and continued; default: all"
    )
    parser.add_argument("--nodes", action="store_true", help="two agents on loopback instead, under DDP")
    parser.add_argument("--json", help="write what was found to this file")
    options = parser.parse_args()
    if "moe2" in options.cases and "moe1" not in options.cases:
        parser.error("--cases moe2 continues the model of moe1. Name moe1 before it.")
    options.resume = options.cases if options.resume is None else options.resume
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        found = two_nodes(work) if options.nodes else divided_beside_ddp(work, options)
        if options.json:
            Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
        print(table(found))


def divided_beside_ddp(work: Path, options: argparse.Namespace) -> list[dict]:
    """Write the configs, fork two processes, and collect what the first one notes."""
    os.environ.update(environment(work), DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
    if any(not stage.startswith("fsdp") for stage in options.stages):
        import deepspeed  # noqa: F401  once for both
    import torch

    import lit_llm.training_cli  # noqa: F401

    torch.set_num_threads(1)
    for name in options.cases:
        write_config(work / name, CASES[name][0])
    fork, port = multiprocessing.get_context("fork"), free_port()
    workers = [fork.Process(target=Worker, args=(work, options, rank, port)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        if any(worker.exitcode for worker in workers):
            for worker in workers:
                worker.kill()
        time.sleep(0.1)
    noted = work / "found.jsonl"
    found = [json.loads(line) for line in noted.read_text().splitlines()] if noted.exists() else []
    if any(worker.exitcode for worker in workers):
        sys.exit(f"{table(found)}\ncheck_scale: a process failed; its messages are above.")
    return found


def two_nodes(work: Path) -> list[dict]:
    """The same run in one process, in two of one node, and in two nodes of one process each, with an agent for each."""
    from tests.tiny_runs import tiny_config

    config = tiny_config(work, "kd", dropout=0.0, max_steps=STEPS)
    run = ["-m", "lit_llm", "fit", "--config", str(config), "--data.init_args.bucket=1"]
    two = [*run, "--data.init_args.batch_size=2", "--trainer.strategy=ddp"]
    agent, place = ["-m", "torch.distributed.run"], ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    launched = {
        "one": [[*run, "--data.init_args.batch_size=4"]],
        "local": [[*agent, "--standalone", "--nproc-per-node=2", *two, "--trainer.devices=2"]],
        "nodes": [
            [*agent, "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1", *place, *two]
            + ["--trainer.devices=1", "--trainer.num_nodes=2"]
            for rank in (0, 1)
        ],
    }
    for version, commands in launched.items():
        started = [
            subprocess.Popen([sys.executable, *command, f"--run.version={version}"], env=environment(work), cwd=work)
            for command in commands
        ]
        if any([process.wait() for process in started]):
            sys.exit(f"check_scale: {version} failed; its messages are above.")
    runs = {version: work / "runs" / "kd" / version for version in launched}
    values = {version: metrics(run)[0] for version, run in runs.items()}
    found = []
    for ours, theirs in (("local", "one"), ("nodes", "local")):
        gaps = {
            column: gap(values[ours][name], values[theirs][name])
            for column, name in (("loss", "train/loss"), ("val", "val/loss"))
        }
        found.append({"case": f"{ours} beside {theirs}", "stage": "ddp", **gaps})
        found[-1]["weights"] = weight_gap(runs[ours], runs[theirs])
    return found


class Worker:
    """One of the two processes: runs every case, and notes what it finds if it is the first."""

    def __init__(self, work: Path, options: argparse.Namespace, rank: int, port: int) -> None:
        self.work, self.options, self.first = work, options, rank == 0
        self.counted: dict[str, object] = {}
        place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})  # as torchrun does
        for name in options.cases:
            self.fit(name, "ddp", "--trainer.strategy=ddp")
            for stage in options.stages:
                if not (stage.endswith("_frozen") and name.startswith(HOLDS_NO_FROZEN)):
                    self.note(name, stage)

    def note(self, name: str, stage: str) -> None:
        kind = "fsdp_strategy.FsdpStrategy" if stage.startswith("fsdp") else "zero_strategy.ZeroStrategy"
        strategy = {"class_path": f"lit_llm.{kind}", "init_args": STAGES[stage]}
        divided, folder = [f"--trainer.strategy={json.dumps(strategy)}"], self.work / name / "runs" / name
        self.fit(name, f"z{stage}", *divided)
        counted = dict(self.counted)
        if name in self.options.resume:
            self.fit(name, f"r{stage}", *divided, f"--trainer.max_steps={STOP}")
            self.fit(name, f"r{stage}", *divided, f"--ckpt_path={folder / f'r{stage}' / 'checkpoints' / 'last.ckpt'}")
            if self.first:
                self.export(name, stage, *divided)
        if self.first:
            found = {"case": name, "stage": stage, **self.compared(name, stage), **counted}
            with (self.work / "found.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")

    def fit(self, name: str, version: str, *options: str) -> None:
        from lit_llm.training_cli import TrainingCLI

        arguments = ["fit", "--config", str(self.work / name / f"{name}.yaml"), *CASES[name][1], *options]
        self.counted = {}
        callbacks = ["--trainer.callbacks+=tests.divided_watch.DividedWatch"] if version.startswith("z") else []
        cli = TrainingCLI.run([*arguments, "--trainer.devices=2", f"--run.version={version}", *callbacks])
        for callback in cli.trainer.callbacks:
            self.counted |= getattr(callback, "counted", {})

    def export(self, name: str, stage: str, *options: str) -> None:
        from lit_llm.training_cli import TrainingCLI

        folder = self.work / name / "runs" / name / f"r{stage}"
        arguments = [
            "--config",
            str(self.work / name / f"{name}.yaml"),
            *CASES[name][1],
            "--trainer.devices=2",
            *options,
        ]
        arguments += ["--ckpt_path", str(folder / "checkpoints" / "last.ckpt"), "--to", str(folder / "exported")]
        TrainingCLI.run(["export", *arguments])

    def compared(self, name: str, stage: str) -> dict:
        import torch

        from lit_llm.checkpoint_io import read_checkpoint

        folder = self.work / name / "runs" / name
        ddp, divided, resumed = folder / "ddp", folder / f"z{stage}", folder / f"r{stage}"
        (ours, names), (theirs, their_names) = metrics(divided), metrics(ddp)
        found = {
            "loss": gap(ours["train/loss"], theirs["train/loss"]),
            "norm": gap(ours["train/grad_norm"], theirs["train/grad_norm"]),
            "val": gap(ours["val/loss"], theirs["val/loss"]),
            "weights": weight_gap(divided, ddp),
            "missing_metrics": sorted(their_names - names),
        }
        file = torch.load(ddp / "checkpoints" / "last.ckpt", weights_only=True, mmap=True)
        saved = read_checkpoint(divided / "checkpoints" / "last.ckpt", weights=True)["state_dict"]
        found["in_checkpoint"] = f"{len(saved)}, {len(file['state_dict'])}"
        found["other_names"] = sorted(saved.keys() ^ file["state_dict"].keys())
        if name in self.options.resume:
            found |= {
                "resumed": weight_gap(resumed, divided),
                "export": weight_gap(resumed / "exported", resumed / "model"),
            }
        return found


def write_config(folder: Path, method: str) -> None:
    """A config of the tests, whose validation part does not divide evenly by two processes."""
    import yaml

    from tests.tiny_languages import language_config
    from tests.tiny_runs import ON_PAIRS, tiny_config, write_labelled, write_pairs, write_rows

    if method.startswith("moe"):
        few = {"row_length": 8, "batch_size": 1}  # so that some experts get no token in one of the processes
        first = {"expand": {"experts": [6, 1, 4]}} if method == "moe1" else {"classifier_layers": [0]}
        source = folder.parent / "moe1" / "runs" / "moe1" / "ddp" / "model" if method == "moe2" else None
        steps = {"max_steps": STEPS, "val_check_interval": STEPS}
        path = language_config(folder, int(method[-1]), source=source, model=first, data=few, **steps)
        config = yaml.safe_load(path.read_text())
        config["data"]["init_args"]["validation_tokens"] = 40
    else:
        config = yaml.safe_load(tiny_config(folder, method, dropout=0.1, max_steps=STEPS).read_text())
        write = write_labelled if method == "kto" else write_pairs if method.startswith(ON_PAIRS) else write_rows
        write(folder / "validation.jsonl", 5, start=24)
        config["data"]["init_args"] |= {"bucket": 1, "batch_size": 4 if method == "kto" else 2, "eval_batch_size": 1}
    # a schedule whose rate does not depend on where the run will end
    config["model"]["init_args"]["optimization"]["schedule"] = "constant"
    config["run"]["name"] = folder.name
    (folder / f"{folder.name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def metrics(run: Path) -> tuple[dict[str, list[float]], set[str]]:
    """Values of a run's metrics.csv by name, and the names."""
    import csv
    from collections import defaultdict

    values = defaultdict(list)
    with (run / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    values[name].append(float(value))
    return values, set(values)


def gap(ours: list[float], theirs: list[float]) -> float:
    """Largest difference; not a number where there are other numbers of values, or none, or one that is no number."""
    if len(ours) != len(theirs) or not ours:
        return float("nan")
    return largest(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def weight_gap(ours: Path, theirs: Path) -> float:
    """Largest difference of two exported models, each loaded as anyone would."""
    from transformers import AutoModelForCausalLM

    import lit_llm.models.moe_saving  # noqa: F401  makes expanded models known

    models = [path / "model" if (path / "model").is_dir() else path for path in (ours, theirs)]
    states = [AutoModelForCausalLM.from_pretrained(model).state_dict() for model in models]
    if states[0].keys() != states[1].keys():
        return float("nan")
    return largest((states[0][name].double() - value.double()).abs().max().item() for name, value in states[1].items())


def largest(differences: Iterable[float]) -> float:
    """Not a number where one of them is none, which `max` would pass over."""
    values = list(differences)
    return float("nan") if any(map(math.isnan, values)) else max(values)


def table(found: list[dict]) -> str:
    lines = [("case", "stage", *(name.replace("_", " ") for name in COLUMNS)), ("---",) * (2 + len(COLUMNS))]
    for row in found:
        lines.append((row["case"], row["stage"], *(written(row.get(name)) for name in COLUMNS)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def written(value: float | str | None) -> str:
    return "" if value is None else f"{value:.1e}".replace("0.0e+00", "0") if isinstance(value, float) else str(value)


def environment(work: Path) -> dict[str, str]:
    ours = {"LIT_LLM_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **ours, "PYTHONPATH": path}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    main()
