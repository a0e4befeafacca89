"""AlignDistil and DPO with adapters: one base is held, whatever lives on it; what is frozen stays and is not saved."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_llm.models.language_model import LanguageModel, Lora, ModelSpec
from lit_llm.models.shared_base import AdaptedBase, using
from lit_llm.training_cli import TrainingCLI
from tests.tiny import tiny_model_folder
from tests.tiny_runs import fit, tiny_config, weights

POLICY = ["--model.init_args.student.lora={rank: 4, target_modules: all-linear}"]
ONE_STEP = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.val_check_interval=null"]
IDS = torch.arange(5, 17)[None]


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict[str, Path]:
    """The run folders of a DPO and of a reverse-DPO run with adapters, of other layers than the policy's."""
    folder = tmp_path_factory.mktemp("stages")
    config = tiny_config(folder, "dpo", dropout=0.0, max_steps=6)
    lora = "--model.init_args.student.lora={rank: 2, alpha: 8, target_modules: [c_attn, c_fc]}"
    quiet = ["--trainer.limit_val_batches=0", "--trainer.val_check_interval=null", lora]
    return {
        name: fit(
            config, *quiet, f"--model.init_args.reverse={name == 'other'}", f"--run.version={name}"
        ).model.run_folder
        for name in ("dpo", "other")
    }


def shared(stages: dict[str, Path], kind: str = "adapters") -> list[str]:
    return [*POLICY, *(f"--model.init_args.{name}.source={folder / kind}" for name, folder in stages.items())]


def align_config(folder: Path, stages: dict[str, Path], **trainer) -> Path:
    """AlignDistil whose policy starts where the stages started."""
    config = tiny_config(folder, "align", dropout=0.0, **trainer)
    shutil.copytree(stages["dpo"].parents[2] / "student", folder / "student", dirs_exist_ok=True)
    return config


def frozen_adapters(model: LanguageModel, name: str) -> dict[str, torch.Tensor]:
    return {path: p for path, p in model.model.named_parameters() if f".frozen_{name}." in path}


def test_one_base_with_three_adapters_learns_like_three_whole_models(tmp_path, stages):
    config = align_config(tmp_path, stages, max_steps=4, val_check_interval=4, precision="64-true")
    ours, whole = fit(config, *shared(stages)), fit(config, *shared(stages, "model"))

    assert isinstance(ours.model.teacher, AdaptedBase) and isinstance(whole.model.teacher, LanguageModel)
    for name, value in whole.trainer.callback_metrics.items():
        if name.startswith(("train/", "val/")):
            found = ours.trainer.callback_metrics[name]
            assert found.item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name  # merged weights are rounded
    assert whole.trainer.callback_metrics["train/kl"] > 1e-4
    theirs = weights(whole)
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5)


def test_the_gradients_are_those_beside_three_whole_models(tmp_path, stages):
    config = align_config(tmp_path, stages, precision="64-true")
    found = []
    for kind in ("adapters", "model"):
        method = fit(
            config, *ONE_STEP, "--model.init_args.optimization={lr: 1e-12, final_lr: 0}", *shared(stages, kind)
        ).model
        with torch.no_grad():
            for name, parameter in method.student.named_parameters():
                if "lora_B.default" in name:
                    parameter.fill_(0.01)
        batch = next(iter(method.trainer.datamodule.train_dataloader()))
        method.zero_grad()
        method.log = lambda *arguments, **settings: None
        method.training_step(batch, 0).backward()
        found.append({name: p.grad for name, p in method.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and all(".default." in name for name in found[0])
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-8)


def test_the_memory_is_that_of_one_base_and_the_frozen_adapters_stay_as_they_were(tmp_path, stages):
    cli = fit(align_config(tmp_path, stages, max_steps=3), *shared(stages))
    method, student = cli.model, cli.model.student

    held = [method, *(frozen.model for frozen in (method.frozen_teacher, method.frozen_other, method.frozen_start))]
    seen = {p.data_ptr(): p.numel() for part in held for p in part.parameters()}
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "student").parameters())
    files = [load_file(folder / "adapters" / "adapter_model.safetensors") for folder in stages.values()]
    adapters = sum(tensor.numel() for file in files for tensor in file.values())
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert sum(seen.values()) == base + adapters + trained
    assert student.num_parameters == base + trained

    for name, file in zip(stages, files, strict=True):
        ours = frozen_adapters(student, name)
        assert len(ours) == len(file) > 0
        for path, parameter in ours.items():
            assert not parameter.requires_grad and parameter.grad is None
            assert torch.equal(parameter, file[path.replace(f".frozen_{name}", "")]), path
    assert all(p.abs().max() > 0 for name, p in student.named_parameters() if "lora_B.default" in name)


def test_a_checkpoint_holds_the_policys_adapters_alone_and_the_run_leaves_plain_models(tmp_path, stages):
    cli = fit(align_config(tmp_path, stages, max_steps=3), *shared(stages))
    folder = cli.model.run_folder
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=False)
    assert set(checkpoint["state_dict"]) == set(cli.model.state_dict())
    assert all(".default." in name for name in checkpoint["state_dict"])
    optimized = sum(len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"])
    assert optimized == len(checkpoint["state_dict"])

    plain = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert not any("lora" in name for name, _ in plain.named_parameters())
    by_peft = PeftModel.from_pretrained(base, folder / "adapters").eval()
    again = ModelSpec(source=str(folder / "adapters")).load().eval()
    with torch.no_grad():
        live = cli.model.student.eval().transformer(input_ids=IDS).logits
        for model in (plain, by_peft, again.transformer):
            torch.testing.assert_close(model(input_ids=IDS).logits, live, rtol=1e-4, atol=1e-5)
        with using(cli.model.student.model, None):
            untrained = cli.model.student.transformer(input_ids=IDS).logits
        assert not torch.allclose(untrained, live, atol=1e-3)

    TrainingCLI.run(["export", "--config", str(tmp_path / "align.yaml"), *shared(stages), "--ckpt_path", "last",
                     "--to", str(tmp_path / "out")])  # fmt: skip
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        torch.equal(value, exported[name]) for name, value in load_file(folder / "model/model.safetensors").items()
    )


@pytest.mark.parametrize("step", [2, 5])
def test_a_run_on_a_shared_base_resumes_exactly(tmp_path, stages, step):
    unbroken = fit(align_config(tmp_path / "unbroken", stages), *shared(stages))
    config = align_config(tmp_path / "broken", stages)
    death = ["--trainer.callbacks+=tests.tiny_runs.DieAt", f"--trainer.callbacks.step={step}"]
    with pytest.raises(RuntimeError, match="died on purpose"):
        fit(config, *death, *shared(stages))
    resumed = fit(config, "--ckpt_path", "last", *shared(stages))
    theirs = weights(unbroken)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(resumed).items())
    assert resumed.trainer.callback_metrics["val/loss"] == unbroken.trainer.callback_metrics["val/loss"]


def test_the_base_is_known_by_its_content_and_another_one_is_refused_with_both_values(tmp_path, stages):
    config = align_config(tmp_path, stages)
    shutil.copytree(tmp_path / "student", tmp_path / "elsewhere")
    fit(config, *ONE_STEP, *shared(stages), f"--model.init_args.student.source={tmp_path / 'elsewhere'}")

    tiny_model_folder(tmp_path / "student", family="gpt2", hidden_size=16, layers=2, seed=11)
    recorded = json.loads((stages["dpo"] / "adapters" / "base.json").read_text())["weights"]
    with pytest.raises(ValueError, match="adapters of another base") as refused:
        fit(config, *ONE_STEP, *shared(stages))
    (line,) = [line for line in str(refused.value).splitlines() if line.startswith("  weights:")]
    theirs, ours = line.removeprefix("  weights: adapters ").split(", policy ")
    assert theirs == repr(recorded) and ours != theirs
    with pytest.raises(ValueError, match=r"model\.dpo\.attention is 'eager' and model\.student\.attention is None"):
        fit(config, *ONE_STEP, *shared(stages), f"--model.init_args.student.source={tmp_path / 'elsewhere'}",
            "--model.init_args.dpo.attention=eager")  # fmt: skip


def test_the_model_that_dpo_started_from_is_the_base_without_adapters(tmp_path, stages):
    config = align_config(tmp_path, stages, max_steps=2, val_check_interval=2)
    rule = "--model.init_args.combination={rule: adaptive_interpolation, slope: 4.0}"
    options = [*shared(stages), f"--model.init_args.other.source={tmp_path / 'student'}", rule]
    method = fit(config, *options).model
    assert isinstance(method.other, AdaptedBase) and method.other.adapter is None
    tokens = next(iter(method.trainer.datamodule.train_dataloader())).chosen
    start = ModelSpec(source=str(tmp_path / "student")).load().eval()
    with torch.no_grad():
        torch.testing.assert_close(method.other.hidden(tokens), start.hidden(tokens))
        assert not torch.allclose(method.student.hidden(tokens), start.hidden(tokens), atol=1e-4)


def test_a_policy_may_start_from_adapters_and_be_compared_with_them(tmp_path, stages):
    start = stages["dpo"] / "adapters"
    options = [*POLICY, f"--model.init_args.student.source={start}", f"--model.init_args.other.source={start}"]
    options += [f"--model.init_args.dpo.source={stages['other'] / 'model'}"]
    options += ["--model.init_args.combination={rule: adaptive_interpolation, slope: 4.0}"]
    method = fit(align_config(tmp_path, stages), *ONE_STEP, *options).model
    assert isinstance(method.other, AdaptedBase) and method.other.adapter is None
    assert isinstance(method.teacher, LanguageModel)
    with pytest.raises(ValueError, match="adapters of another base"):
        fit(
            tmp_path / "align.yaml", *ONE_STEP, *options, f"--model.init_args.dpo.source={stages['other'] / 'adapters'}"
        )


@pytest.mark.parametrize("loss", ["tdpo2", "sigmoid"])
def test_the_reference_of_a_policy_with_adapters_is_its_base(tmp_path, loss, monkeypatch):
    config = tiny_config(tmp_path, "dpo", max_steps=4, dropout=0.3)
    loaded, load = [], ModelSpec.load
    monkeypatch.setattr(ModelSpec, "load", lambda spec: loaded.append(spec) or load(spec))
    options = [*POLICY, f"--model.init_args.loss={loss}"]
    start = fit(config, *options, *ONE_STEP)
    assert start.trainer.callback_metrics["train/loss"].item() == pytest.approx(math.log(2), abs=1e-4)
    trained = fit(config, *options)
    assert len(loaded) == 2  # one policy for each run
    assert trained.trainer.callback_metrics["train/chosen_reward"].abs() > 1e-4
    if loss == "sigmoid":  # a reference that is asked again after training is where it was
        method = trained.model
        asked = method.reference.parts["validation"].clone()
        method.reference.load_state({})
        torch.testing.assert_close(method.reference._computed("validation", method.reference._model()), asked)


def test_a_teacher_that_is_the_students_base_is_not_held_twice(tmp_path):
    config = tiny_config(tmp_path, "kd", max_steps=4, dropout=0.0)
    start = f"--model.init_args.teacher.source={tmp_path / 'student'}"
    found = [fit(config, *POLICY, start, *steps) for steps in (ONE_STEP, [])]
    assert all(isinstance(run.model.teacher, AdaptedBase) for run in found)
    assert found[0].trainer.callback_metrics["train/kd"].item() == pytest.approx(0, abs=1e-6)
    assert found[1].trainer.callback_metrics["train/kd"] > 1e-4  # the student has left it
    whole = fit(config, *POLICY, f"--model.init_args.teacher.source={tmp_path / 'teacher'}").model
    assert isinstance(whole.teacher, LanguageModel)


def test_adapters_stand_for_their_base_with_them_merged(stages, tmp_path):
    whole = ModelSpec(source=str(stages["dpo"] / "model")).load().transformer
    merged = ModelSpec(source=str(stages["dpo"] / "adapters")).load().transformer
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value)
    with pytest.raises(ValueError, match="keep_layers is .0., but the source"):
        ModelSpec(source=str(stages["dpo"] / "adapters"), keep_layers=[0]).load()

    moved = shutil.copytree(stages["dpo"] / "adapters", tmp_path / "adapters")
    recorded = json.loads((moved / "base.json").read_text())
    other = tiny_model_folder(tmp_path / "other", family="gpt2", hidden_size=16, seed=9)
    (moved / "base.json").write_text(json.dumps(recorded | {"source": str(other)}))
    with pytest.raises(ValueError, match=f"(?s)the hash {recorded['weights']} .weights., but what is there now has"):
        ModelSpec(source=str(moved)).load()
    (moved / "base.json").unlink()
    with pytest.raises(ValueError, match=r"holds adapters, but no base\.json"):
        ModelSpec(source=str(moved)).load()


@pytest.mark.parametrize(
    ("saved", "folders"), [("merged", {"model"}), ("adapters", {"adapters"}), ("both", {"model", "adapters"})]
)
def test_a_run_leaves_what_its_settings_say(tmp_path, saved, folders):
    lora = f"--model.init_args.student.lora={{rank: 2, saved: {saved}}}"
    folder = fit(tiny_config(tmp_path, "sft"), *ONE_STEP, lora).model.run_folder
    assert {place.name for place in folder.iterdir()} & {"model", "adapters"} == folders


def test_adapters_of_a_random_start_say_that_they_have_no_base_to_load(tmp_path, byte_level_tokenizer):
    byte_level_tokenizer.save_pretrained(tmp_path / "tokenizer")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 4}
    spec = ModelSpec(config={"model_type": "gpt2", **sizes}, tokenizer=str(tmp_path / "tokenizer"), lora=Lora(rank=2))
    spec.load().save_adapters(tmp_path / "adapters")
    with pytest.raises(ValueError, match="a base that started at random"):
        ModelSpec(source=str(tmp_path / "adapters")).load()
