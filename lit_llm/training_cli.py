"""fit, validate, test, predict and export, on LightningCLI: configs, overrides, run folders, checkpoints.

A run lives in `ROOT/NAME/version_N`: config, TensorBoard events, metrics.csv, checkpoints, model/, report.html.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import DeepSpeedStrategy

from lit_llm.callbacks import default_callbacks
from lit_llm.callbacks.event_log import EventLog
from lit_llm.callbacks.loss_doctor import LossDoctor  # noqa: F401  makes the short name known
from lit_llm.callbacks.metrics_csv import MetricsCsv
from lit_llm.callbacks.nan_guard import NonFinite
from lit_llm.checkpoint_io import read_checkpoint, stream_checkpoints
from lit_llm.config_files import check_config_files, check_nested
from lit_llm.data.facts import Facts  # noqa: F401  makes the short name known
from lit_llm.data.instructions import Instructions  # noqa: F401  makes the short name known
from lit_llm.data.labelled_answers import LabelledAnswers  # noqa: F401  makes the short name known
from lit_llm.data.languages import Languages  # noqa: F401  makes the short name known
from lit_llm.data.preferences import Preferences  # noqa: F401  makes the short name known
from lit_llm.losses.logit_gradient import compile_elementwise
from lit_llm.methods import *  # noqa: F403  makes the short names known
from lit_llm.methods.base import Method
from lit_llm.stages import MACHINE, Stage, Stages, referred
from lit_llm.storage import check_inside, check_name, check_writable, remove_leftovers, write_atomically
from lit_llm.trainer_settings import check_settings

# `${model.x}` in a file then means the root of that file, although the parsed tree sits under the subcommand's name
set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


@dataclass
class Run:
    """Where the run is kept.

    Args:
        root: folder of all runs.
        name: folder of the runs of one config; None takes the name of the first config file.
        version: folder of this run; None takes the next free version_N (when resuming from `last`: the newest).
    """

    root: str = "runs"
    name: Optional[str] = None
    version: Optional[str] = None


class LitTrainer(Trainer):
    """Lightning's Trainer with the commands that it lacks."""

    def export(self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: str, to: str) -> None:
        """Write the student of a checkpoint as a plain Hugging Face folder.

        Args:
            ckpt_path: a checkpoint, or `last` for the newest of the run.
            to: folder to write; it must not exist.
        """
        if Path(to).exists():
            raise FileExistsError(f"{to} exists. Choose another folder with --to, or remove it.")
        model.configure_model()
        checkpoint = read_checkpoint(Path(ckpt_path), weights=True)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        model.export(Path(to))

    def plan(self, model: LightningModule, datamodule: LightningDataModule, json: bool = False) -> None:
        """Parameters, FLOPs, steps and peak memory of a run, without training and without loading weights.

        Args:
            json: print JSON instead of a page.
        """
        import json as json_module
        from dataclasses import asdict

        from lit_llm.planning.page import page
        from lit_llm.planning.plan import make_plan

        self.strategy.connect(model)
        model.trainer = datamodule.trainer = self
        datamodule.setup("fit")
        plan = make_plan(model, datamodule, self.planned)
        if json:
            totals = {"peak_phase": plan.peak_phase, "peak_bytes": plan.peak_bytes}
            sys.stdout.write(json_module.dumps(asdict(plan) | totals, indent=2) + "\n")
        else:
            sys.stdout.write(page(plan) + "\n")

    def cache_teacher(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Write the teacher store that the config names, without training."""
        if getattr(model, "store", None) is None and not getattr(model, "stores", None):
            raise ValueError(
                "The config names no teacher store, so there is nothing to write. Set model.init_args.teacher_store.folder."
            )
        self.callbacks, self.loggers = [_StopBeforeTraining()], []
        self.fit(model, datamodule=datamodule)


class _StopBeforeTraining(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True  # the store is filled right after this, in the method's own on_fit_start


class _RunConfig(SaveConfigCallback):
    """Writes the run's config.yaml without what only `fit` understands and was not set, so that any command takes it.

    It is the first thing that a process writes to its run folder; what a killed one had begun there is taken away before.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *arguments: Any, **settings: Any) -> None:
        kept = config.clone()
        for name in ("ckpt_path", "weights_only"):
            if kept.get(name) is None:
                kept.pop(name, None)
        super().__init__(parser, kept, *arguments, **settings)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = trainer.log_dir  # on every rank: it is broadcast
        if trainer.is_global_zero and folder is not None and not self.already_saved:
            for place in (Path(folder), Path(folder) / "checkpoints"):
                remove_leftovers(place)
            write_atomically(Path(folder) / self.config_filename, self.parser.dump(self.config, skip_none=False))
        self.already_saved = True


class TrainingCLI(LightningCLI):
    """LightningCLI with run folders, default callbacks and checkpoints found by `--ckpt_path last`."""

    @classmethod
    def run(cls, args: list[str]) -> TrainingCLI:
        """Parse and run one command; `args` begins with the command."""
        check_config_files(args)
        sys.argv = [sys.argv[0], *args]
        return cls(
            Method,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=LitTrainer,
            trainer_defaults={"use_distributed_sampler": False, "log_every_n_steps": 1, "num_sanity_val_steps": 0},
            seed_everything_default=0,
            parser_kwargs={"parser_mode": "omegaconf+"},
            save_config_callback=_RunConfig,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        ours = ("export", "plan", "cache_teacher")
        known = {**LightningCLI.subcommands(), **{command: {"model", "datamodule"} for command in ours}}
        # each takes time to build; stages are resolved as `fit`
        return {command: known[command] for command in dict.fromkeys((sys.argv[1], "fit"))}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Errors of parsing are raised, for `lit_llm.cli` to tell them in its own way."""
        return super().init_parser(**{**kwargs, "exit_on_error": False})

    def _parse_ckpt_path(self) -> None:
        """Nothing of a config stands in our checkpoints, and reading one here would come before it is checked."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=Run, default=Run(), help="where the run is kept")
        parser.add_argument(
            "--compile_loss",
            type=Optional[bool],
            default=None,
            help="compile the elementwise parts of the losses: half a minute at the first step; None: where a GPU is used",
        )
        parser.add_argument(
            "--stages", type=dict[str, Stage], default={}, help="runs that come first (lit_llm/stages.py)"
        )
        parser.add_argument(
            "--non_finite", type=NonFinite, default=NonFinite(), help="what becomes of a step whose loss is no number"
        )
        parser.add_argument("--vars", type=dict, default={}, help="values for ${vars.NAME} in a config")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "{step}"})
        # a checkpoint that a killed process left is written over when its step comes again, and last.ckpt is always the last
        parser.set_defaults({"checkpoint.enable_version_counter": False})

    def _set_seed(self) -> None:
        seed = self.config[self.subcommand].seed_everything
        if seed is None or (not isinstance(seed, bool) and not 0 <= seed < 2**32):
            raise ValueError(f"seed_everything is {seed}; a seed is a whole number from 0 to {2**32 - 1:,}.")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        check_nested(config)
        check_settings(config.trainer, config.checkpoint)
        self._set_strategy_aside(config.trainer)
        compile_elementwise(_may_compile(config.compile_loss, config.trainer.accelerator))
        self._choose_run_folder(config)
        self._use_stages(config)
        if self.subcommand != "fit":
            self.save_config_callback = None  # the run folder keeps the config that it was trained with

    def _set_strategy_aside(self, trainer) -> None:
        """Where no process will be joined, what joins them need not be installed."""
        self._strategy = trainer.strategy
        if self.subcommand in ("plan", "export") and isinstance(self._strategy, Namespace):
            trainer.strategy = "auto"

    def _use_stages(self, config) -> None:
        """Run the stages that are missing, and put their models in the place of `stage:NAME`."""
        models = {}
        if config.stages:
            stages = Stages(
                {name: stage if isinstance(stage, Stage) else Stage(**stage) for name, stage in config.stages.items()},
                folder=Path(config.run.root) / config.run.name / "stages",
                files=[Path(str(file)) for file in config.get("config") or []],
                resolve=self._resolved,
                inherited={f"trainer.{key}": _plain(config.trainer[key]) for key in MACHINE},
            )
            models = stages.models(run_missing=self.subcommand == "fit")
        for key, value in list(config.model.items()):
            config.model[key] = referred(value, models)

    def _resolved(self, options: list[str]) -> dict:
        """The config of a `fit` with these options, every default filled in."""
        return self._subcommand_parsers["fit"].parse_args(options).as_dict()

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if path := self.config[self.subcommand].get("ckpt_path"):  # tensors stay on the disk
            self._check_strategy(Path(path))
            self.model.use_plan_of(read_checkpoint(Path(path)))
        if self.config[self.subcommand].compile_loss and not self.model.compiles_loss:
            raise ValueError(
                f"compile_loss is true, but no part of {type(self.model).__name__}'s loss is compiled. Leave compile_loss out."
            )

    def _check_strategy(self, path: Path) -> None:
        divided = isinstance(self.trainer.strategy, DeepSpeedStrategy)
        if path.is_dir() and not divided and self.subcommand != "export":
            raise ValueError(
                f"--ckpt_path {path} is a folder with a part for every process, but trainer.strategy is not ZeroStrategy. Resume "
                f"with the trainer's config that the run began with (configs/trainer/deepspeed_*.yaml), or write the model "
                f"with `export`."
            )

    def instantiate_trainer(self, **kwargs) -> Trainer:
        config = self.config[self.subcommand]
        settings = self._get(self.config_init, "trainer", default={})
        if settings.get("logger") in (None, True):
            place = {"save_dir": config.run.root, "name": config.run.name, "version": config.run.version}
            kwargs["logger"] = [EventLog(**place), MetricsCsv(**place)]
        callbacks = default_callbacks(
            progress_bar=settings.get("enable_progress_bar") is not False,
            stage=self.subcommand,
            non_finite=self._get(self.config_init, "non_finite", default=NonFinite()),
        )
        kwargs["callbacks"] = (settings.get("callbacks") or []) + callbacks
        if self.subcommand != "plan":
            trainer = super().instantiate_trainer(**kwargs)
            stream_checkpoints(trainer)
            return trainer
        # a plan for eight GPUs can be made on a laptop
        here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
        trainer = super().instantiate_trainer(**{**kwargs, **here, "logger": False, "profiler": None})
        trainer.planned = _planned(settings, trainer, self._strategy)
        return trainer

    def _choose_run_folder(self, config) -> None:
        """Fill in name and version; find the checkpoint that `last` means; refuse to write over another run."""
        run = config.run
        run.name = run.name or _config_name(config) or "run"
        for name in ("name", "version"):
            check_name(f"run.{name}", getattr(run, name))
        check_inside("checkpoint.filename", config.checkpoint.filename)
        runs = Path(run.root) / run.name
        if config.get("ckpt_path") == "last":
            folder = _newest_run(runs, run.version)
            config.ckpt_path, run.version = str(folder / "checkpoints" / "last.ckpt"), folder.name
        if config.get("ckpt_path"):
            _check_checkpoint(Path(config.ckpt_path))
        if self.subcommand == "fit":
            check_writable(runs / (run.version or ""), "run.root")
        if run.version is None:
            run.version = f"version_{_next_version(runs)}"
        elif self.subcommand == "fit" and not config.get("ckpt_path") and (runs / run.version).exists():
            raise FileExistsError(
                f"The run folder {runs / run.version} exists.\n"
                f"  Continue it with --ckpt_path last, or start a new one with --run.version=null."
            )


def _planned(settings, trainer: Trainer, strategy: Any):
    """The part of the trainer's config that a plan depends on."""
    from lit_llm.planning.process import keeps_freed_blocks
    from lit_llm.planning.tokens import Setup

    accelerator = settings.get("accelerator") or "auto"
    counts = {name: settings.get(name) or 1 for name in ("devices", "num_nodes")}
    notes = [
        f"trainer.{name} is {value!r}; one is assumed" for name, value in counts.items() if not str(value).isdigit()
    ]
    if str(strategy) not in ("auto", "ddp"):
        named = strategy if isinstance(strategy, str) else strategy.class_path
        notes.append(f"trainer.strategy is {named}; the plan is for a process that holds everything, as ddp does")
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    if on_gpu:
        notes.append("the GPU's own context and the allocator's slack; figures are those of the CPU's kernels")
    return Setup(
        precision=settings.get("precision"),
        accumulate=trainer.accumulate_grad_batches,
        max_steps=trainer.max_steps,
        max_epochs=trainer.max_epochs,
        processes=math.prod(int(value) if str(value).isdigit() else 1 for value in counts.values()),
        on_gpu=on_gpu,
        keeps_freed=not on_gpu and keeps_freed_blocks(),
        notes=notes,
    )


def _may_compile(wanted: bool | None, accelerator: str) -> bool:
    """Whether the losses are compiled: as said, or else where there is a GPU and a compiler for it.

    Raises:
        ValueError: it is said, and there is no compiler.
    """
    if wanted is False:
        return False
    on_gpu = torch.cuda.is_available() and accelerator != "cpu"
    if on_gpu:
        found, missing = importlib.util.find_spec("triton") is not None, "the package triton"
    else:
        compiler = os.environ.get("CXX", "g++")
        found, missing = shutil.which(compiler) is not None, f"a C++ compiler ({compiler})"
    if wanted and not found:
        raise ValueError(f"compile_loss is true, but {missing} was not found. Install it, or leave compile_loss out.")
    return found if wanted else on_gpu and found


def _plain(value: Any) -> Any:
    """A class with its arguments as a dictionary, as the command line takes it."""
    return value.as_dict() if isinstance(value, Namespace) else value


def _config_name(config) -> str | None:
    """The stem of the first config file that was given; a run's own config.yaml gives the run's name instead."""
    files = [str(path) for path in config.get("config") or []]
    return Path(files[0]).stem if files else None


def _newest_run(runs: Path, version: str | None) -> Path:
    """By number: times of files say when a clock was set, not which run is newer."""
    there = [runs / version] if version else sorted(runs.glob("*/"))
    found = [folder for folder in there if (folder / "checkpoints" / "last.ckpt").exists()]
    if not found:
        raise FileNotFoundError(
            f"--ckpt_path last: no checkpoints/last.ckpt in {runs}/{version or '*'}.\n"
            f"  A run writes its first checkpoint after checkpoint.every_n_train_steps steps. Name a checkpoint file, or "
            f"set --run.root, --run.name and --run.version to the run that you mean."
        )
    numbers = {folder: _number(folder) for folder in found}
    if len(found) > 1 and None in numbers.values():
        raise ValueError(
            f"--ckpt_path last: {runs} holds {len(found)} runs with a checkpoint, and names do not tell which is the newest: "
            f"{', '.join(folder.name for folder in found)}.\n  Say which one with --run.version."
        )
    return max(found, key=lambda folder: numbers[folder] or 0)


def _check_checkpoint(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"--ckpt_path {path}: no such file. `last` finds the newest checkpoint of the run.")
    read_checkpoint(path, verify=True)


def _next_version(runs: Path) -> int:
    numbers = [_number(folder) for folder in runs.glob("version_*")]
    return max((number for number in numbers if number is not None), default=-1) + 1


def _number(folder: Path) -> int | None:
    """N of version_N."""
    prefix, _, number = folder.name.rpartition("_")
    return int(number) if prefix == "version" and number.isdigit() else None
