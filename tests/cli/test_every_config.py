"""Every shipped config runs: at its own settings, with tiny stand-ins for the models that it names."""

from pathlib import Path

import pytest
import yaml

from lit_llm.data.languages import DEFAULT_GROUPS
from lit_llm.methods.edited_model import EDITS_FILE
from lit_llm.methods.neuron_edit import NeuronEdit
from lit_llm.training_cli import TrainingCLI
from tests.tiny import byte_level_tokenizer, sentencepiece_tokenizer, tiny_model_folder
from tests.tiny_edits import write_facts
from tests.tiny_languages import write_corpora
from tests.tiny_runs import write_pairs, write_rows

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("debug", "trainer"))
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
SENTENCEPIECE = ("llama", "mistral", "tinyllama", "gemma", "Qwen")


def stand_in(folder: Path, source: str) -> str:
    """A tiny model with a tokenizer of the kind that the real one has, and with as many layers as a cut may name."""
    kind = (
        sentencepiece_tokenizer
        if any(name.lower() in source.lower() for name in SENTENCEPIECE)
        else byte_level_tokenizer
    )
    tokenizer = kind()
    tokenizer.chat_template = CHAT
    width = 32 if "gpt2" in source.lower() else 16
    return str(tiny_model_folder(folder, family="llama", tokenizer=tokenizer, hidden_size=width, layers=30))


def reduced(path: Path, folder: Path) -> Path:
    """What replaces models and data of a config; everything else stays as shipped."""
    config = yaml.safe_load(path.read_text())
    model = config["model"]["init_args"]
    roles = ("student", "teacher", "reference", "dpo", "other", "reference_teacher")
    sources = {role: model[role]["source"] for role in roles if role in model}
    # one config runs its stages as well; what they are in the others is a recipe of its own, except that of a model that
    # only its first stage makes
    with_stages = path.parent == CONFIGS or config["model"]["class_path"] == "LayerMoE"
    if with_stages:
        sources = {role: source for role, source in sources.items() if not source.startswith("stage:")}
    sources = {role: sources["student"] if s.startswith("stage:") else s for role, s in sources.items()}
    shorter = {"on_policy": {"max_new_tokens": 8, "validation_prompts": 2}} if "on_policy" in model else {}
    if "teacher_store" in model:
        shorter["teacher_store"] = {"folder": str(folder / "store")}
    write = write_rows if config["data"]["class_path"] == "Instructions" else write_pairs
    folder.mkdir(exist_ok=True)
    settings = {
        "model": {"init_args": {role: {"source": stand_in(folder / role, s)} for role, s in sources.items()} | shorter},
        "data": {
            "init_args": {part: str(write(folder / f"{part}.jsonl", 40)) for part in ("train", "validation", "test")}
        },
        "trainer": {
            # a process group would outlive the test, and its port with it
            **{"accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": "32-true"},
            **{"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False},
        },
        "run": {"root": str(folder / "runs")},
    }
    if config["data"]["class_path"] == "Languages":
        settings["data"]["init_args"] = {"groups": some_text(config, folder / "text"), "row_length": 16}
        settings["data"]["init_args"] |= {"tokens": None, "num_workers": 0}
    elif config["data"]["class_path"] == "Facts":
        facts = str(write_facts(folder / "facts.jsonl"))
        settings["data"]["init_args"] = {"source": facts, "languages": ["en", "de"], "known": None}
    else:
        settings["data"]["init_args"]["columns"] = {"prompt": "prompt"}
    tiny = str(CONFIGS / "debug" / "tiny.yaml")
    if not with_stages:
        settings["stages"] = {}
    for name, stage in (config.get("stages", {}) if with_stages else {}).items():
        # the stages of a run are reduced like the run itself
        names = [str(path.parent / file) for file in stage["config"]]
        own = reduced(path.parent / stage["config"][0], folder / name)
        settings.setdefault("stages", {})[name] = {**stage, "config": [*names, str(own), tiny]}
        # all models of such a run start from one
        shared = yaml.safe_load(own.read_text())
        if "student" in settings["model"]["init_args"]:
            shared["model"]["init_args"]["student"] = settings["model"]["init_args"]["student"]
        if "groups" in settings["data"]["init_args"]:
            shared["data"]["init_args"]["groups"] = settings["data"]["init_args"]["groups"]
        own.write_text(yaml.safe_dump(shared, sort_keys=False))
    override = folder / "reduced.yaml"
    override.write_text(yaml.safe_dump(settings, sort_keys=False))
    return override


def some_text(config: dict, folder: Path) -> dict[str, dict[str, str]]:
    """Made-up text for the groups of languages of a config, or for those that it leaves to the default."""
    groups = config["data"]["init_args"].get("groups") or DEFAULT_GROUPS
    files = list(write_corpora(folder).values())
    return {
        name: {language: files[number % len(files)] for number, language in enumerate(members)}
        for name, members in groups.items()
    }


def run(*configs: Path, options: tuple[str, ...] = ()) -> TrainingCLI:
    flags = [flag for config in configs for flag in ("--config", str(config))]
    return TrainingCLI.run(["fit", *flags, *options])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS).with_suffix("")))
def test_a_recipe_trains(recipe, tmp_path):
    cli = run(recipe, reduced(recipe, tmp_path), CONFIGS / "debug" / "tiny.yaml")
    assert cli.trainer.global_step == 2
    assert "val/loss" in cli.trainer.callback_metrics
    # cached values live beside a model that stays as it is
    left = EDITS_FILE if isinstance(cli.model, NeuronEdit) else "model/config.json"
    assert (cli.model.run_folder / left).is_file()


def test_overfitting_eight_examples_drives_the_loss_down(tmp_path):
    recipe = CONFIGS / "sft.yaml"
    cli = run(
        recipe,
        reduced(recipe, tmp_path),
        CONFIGS / "debug" / "overfit.yaml",
        options=("--model.init_args.optimization.lr=1e-2",),
    )
    assert cli.trainer.callback_metrics["train/ce"] < 2.5


def test_profiling_leaves_a_table(tmp_path):
    recipe = CONFIGS / "sft.yaml"
    options = (f"--trainer.profiler.init_args.dirpath={tmp_path / 'profile'}", "--trainer.max_steps=3")
    run(recipe, reduced(recipe, tmp_path), CONFIGS / "debug" / "profile.yaml", options=options)
    assert any("aten::" in file.read_text(errors="ignore") for file in (tmp_path / "profile").iterdir())


def test_the_loss_doctor_writes_the_size_of_every_term(tmp_path):
    recipe = CONFIGS / "kd.yaml"
    both = (CONFIGS / "debug" / "loss_doctor.yaml", CONFIGS / "debug" / "tiny.yaml")
    cli = run(recipe, reduced(recipe, tmp_path), *both)
    columns = (cli.model.run_folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"doctor/ce", "doctor/kd", "doctor/kd_grad_norm"} <= set(columns)


@pytest.mark.parametrize("trainer", sorted((CONFIGS / "trainer").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_trainer_config_is_understood(trainer, tmp_path, capsys):
    recipe = CONFIGS / "dskd.yaml"
    with pytest.raises(SystemExit) as stop:
        run(recipe, reduced(recipe, tmp_path), trainer, options=("--print_config",))
    assert stop.value.code == 0
    shown, written = yaml.safe_load(capsys.readouterr().out)["trainer"], yaml.safe_load(trainer.read_text())["trainer"]
    strategy = written.pop("strategy", None)
    assert written.items() <= shown.items()
    if isinstance(strategy, dict):
        assert shown["strategy"]["class_path"] == strategy["class_path"]
        assert strategy["init_args"].items() <= shown["strategy"]["init_args"].items()
    else:
        assert strategy in (None, shown["strategy"])
