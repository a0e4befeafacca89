"""DPO and its relatives, and AlignDistil: where they start, what they compare with, and what they refuse."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from lit_llm.methods import DPO, AlignDistil
from lit_llm.methods.reference_log_probs import ReferenceLogProbs
from lit_llm.models.language_model import ModelSpec
from lit_llm.storage import cache_folder
from tests.tiny_runs import fit, tiny_config

ONE_STEP = ("--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.val_check_interval=null")
LOSSES = ("sigmoid", "ipo", "simpo", "kto", "tdpo1", "tdpo2")


def metrics(cli) -> dict[str, float]:
    return {name: value.item() for name, value in cli.trainer.callback_metrics.items()}


def gradients_of_first_batch(config, *options) -> dict[str, torch.Tensor]:
    """What the first micro-batch leaves on the policy."""
    method = fit(
        config,
        *ONE_STEP,
        "--model.init_args.optimization.lr=1e-12",
        "--model.init_args.optimization.final_lr=0",
        *options,
    ).model
    batch = next(iter(method.trainer.datamodule.train_dataloader()))
    method.zero_grad()
    method._trainer.accumulate_grad_batches = 1
    method.log = method.log_dict = lambda *arguments, **settings: None
    method.training_step(batch, 0).backward()
    return {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("loss", "expected"), [("sigmoid", math.log(2)), ("tdpo1", math.log(2)), ("ipo", 25.0), ("kto", 0.5)]
)
def test_the_policy_starts_as_its_own_reference_although_the_model_has_dropout(tmp_path, loss, expected):
    cli = fit(tiny_config(tmp_path, "dpo", dropout=0.3), *ONE_STEP, f"--model.init_args.loss={loss}")
    found = metrics(cli)
    assert found["train/loss"] == pytest.approx(expected, abs=1e-4)
    assert found["train/chosen_reward"] == pytest.approx(0, abs=1e-5)
    assert found["train/rejected_reward"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_to_prefer_the_chosen_answers(tmp_path, loss):
    config = tiny_config(tmp_path, "dpo", max_steps=24, val_check_interval=24)
    beta = {"simpo": 2.0, "ipo": 0.5}.get(loss, 0.3)
    found = metrics(fit(config, f"--model.init_args.loss={loss}", f"--model.init_args.beta={beta}"))
    assert found["val/reward_accuracy"] > 0.7 and found["val/reward_margin"] > 0


FAMILY = {  # settings -> the settings from which they must differ
    "loss=sigmoid": None,
    "loss=sigmoid label_smoothing=0.2": "loss=sigmoid",
    "loss=ipo": "loss=sigmoid",
    "loss=ipo ipo_mean=true": "loss=ipo",
    "loss=simpo": "loss=sigmoid",
    "loss=simpo simpo_margin=2": "loss=simpo",
    "loss=simpo label_smoothing=0.2": "loss=simpo",
    "loss=kto": "loss=sigmoid",
    "loss=tdpo1": "loss=sigmoid",
    "loss=tdpo1 label_smoothing=0.2": "loss=tdpo1",
    "loss=tdpo2": "loss=tdpo1",
    "loss=tdpo2 tdpo_alpha=1.5": "loss=tdpo2",
    "loss=tdpo2 label_smoothing=0.2": "loss=tdpo2",
}


def test_every_setting_of_the_family_has_a_finite_loss_and_moves_the_policy_its_own_way(tmp_path):
    config, quiet = tiny_config(tmp_path, "dpo", max_steps=4), ONE_STEP[1:]
    start = ModelSpec(source=str(config.parent / "student")).load().state_dict()
    trained: dict[str, dict[str, torch.Tensor]] = {}
    for settings, other in FAMILY.items():
        options = [f"--model.init_args.{setting}" for setting in settings.split()]
        cli = fit(config, *quiet, *options, "--model.init_args.optimization.lr=1e-3")
        assert math.isfinite(metrics(cli)["train/loss"]), settings
        weights = trained[settings] = {name: w.clone() for name, w in cli.model.student.state_dict().items()}
        assert not any(torch.equal(value, start[name]) for name, value in weights.items()), settings
        if other is not None:
            gap = max((value - trained[other][name]).abs().max().item() for name, value in weights.items())
            assert gap > 1e-6, settings


def test_simpo_loads_no_reference(tmp_path, monkeypatch):
    loaded, load = [], ModelSpec.load
    monkeypatch.setattr(ModelSpec, "load", lambda spec: loaded.append(spec.source) or load(spec))
    monkeypatch.setattr(ReferenceLogProbs, "fill", lambda *_: pytest.fail("a reference was asked"))
    cli = fit(tiny_config(tmp_path, "dpo"), "--model.init_args.loss=simpo", "--model.init_args.beta=2.5")
    assert loaded == [str(tmp_path / "student")] and cli.model.frozen_reference is None
    assert "val/reward_accuracy" in cli.trainer.callback_metrics


def test_reverse_dpo_begins_with_the_opposite_gradient_and_ends_with_the_opposite_preference(tmp_path):
    config = tiny_config(tmp_path, "dpo", dropout=0.0, max_steps=24, val_check_interval=24)
    ours, theirs = (gradients_of_first_batch(config, f"--model.init_args.reverse={r}") for r in ("false", "true"))
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, -theirs[name], rtol=1e-3, atol=1e-6)
    found = metrics(fit(config, "--model.init_args.reverse=true", "--run.version=reversed"))
    assert found["train/reward_accuracy"] > 0.7 and found["val/reward_accuracy"] < 0.3


def test_cross_entropy_on_the_chosen_answers_can_be_added(tmp_path):
    config = tiny_config(tmp_path, "dpo", max_steps=16, val_check_interval=16)
    plain, helped = (
        metrics(fit(config, f"--model.init_args.sft_weight={w}", f"--run.version=w{w}"))["val/chosen_log_prob"]
        for w in (0.0, 1.0)
    )
    assert helped > plain + 0.2


def test_a_reference_is_asked_once_for_all_runs_on_the_same_pairs(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "dpo")
    fit(config, *ONE_STEP)

    def refuse(*_):
        raise AssertionError("the reference was asked again")

    monkeypatch.setattr(ReferenceLogProbs, "_computed", refuse)
    fit(config, *ONE_STEP, "--model.init_args.reverse=true", "--model.init_args.beta=0.3")
    with pytest.raises(AssertionError, match="asked again"):
        fit(config, *ONE_STEP, "--data.init_args.limit=20")


def test_a_resumed_run_needs_neither_the_cache_nor_the_reference(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "dpo")
    with pytest.raises(RuntimeError, match="died on purpose"):
        fit(config, "--trainer.callbacks+=tests.tiny_runs.DieAt", "--trainer.callbacks.step=3")
    shutil.rmtree(cache_folder() / "reference_log_probs")
    monkeypatch.setattr(ReferenceLogProbs, "_computed", lambda *_: pytest.fail("the reference was asked"))
    assert fit(config, "--ckpt_path", "last").trainer.global_step == 8


def test_another_reference_gives_other_rewards(tmp_path):
    config = tiny_config(tmp_path, "align")  # for its other models
    dpo = tiny_config(tmp_path, "dpo")
    own, other = (
        metrics(fit(dpo, *ONE_STEP, *options))["train/chosen_reward"]
        for options in ((), (f"--model.init_args.reference.source={config.parent / 'other'}",))
    )
    assert own == pytest.approx(0, abs=1e-5) and abs(other) > 1e-3


def test_the_first_token_of_an_answer_is_trained_and_nothing_of_the_prompt_is(tmp_path):
    for method in ("align", "align_sampled"):
        cli = fit(tiny_config(tmp_path / method, method, dropout=0.0), *ONE_STEP)
        model, data = cli.model, cli.datamodule
        batch = next(iter(data.train_dataloader()))
        prompts = [len(data.sets["train"][i]["student_prompt_ids"]) for i in batch.examples]
        tokens = batch.chosen
        if method == "align_sampled":
            rollouts = model.rollouts._sample([data.sets["train"][i]["student_prompt_ids"] for i in batch.examples], 0)
            tokens = model.rollouts._batch(batch.examples, rollouts).student
        hidden_TD = model.student.hidden(tokens).detach().requires_grad_()
        model.student.hidden = lambda _, hidden_TD=hidden_TD: hidden_TD
        model.compared(tokens, torch.ones(len(hidden_TD))).loss.backward()

        width = tokens.ids_BL.shape[1]
        for number, prompt in enumerate(prompts):
            rows = (tokens.sequence_T == number).nonzero().squeeze(1)
            assert tokens.position_T[rows[0]] == number * width + prompt - 1
            assert hidden_TD.grad[rows[0]].abs().sum() > 0


def test_a_policy_that_is_its_teacher_stays(tmp_path):
    config = tiny_config(tmp_path, "align")
    student = config.parent / "student"
    same = [f"--model.init_args.{name}.source={student}" for name in ("dpo", "other")]
    found = metrics(fit(config, *ONE_STEP, *same))
    assert found["train/kl"] == pytest.approx(0, abs=1e-6) and found["train/tvd"] == pytest.approx(0, abs=1e-6)
    assert found["train/grad_norm"] == pytest.approx(0, abs=1e-2)  # beta_t is dpo_beta / floor here


@pytest.mark.parametrize("reduction", ["sum", "token_mean"])
def test_both_forms_have_the_same_gradient(tmp_path, reduction):
    config = tiny_config(tmp_path, "align", dropout=0.0)
    options = (f"--model.init_args.reduction={reduction}", "--trainer.precision=64-true")
    ours, theirs = (
        gradients_of_first_batch(config, *options, f"--model.init_args.form={f}") for f in ("combined", "decomposed")
    )
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-6, atol=1e-9)


def test_adaptive_rules_and_their_ablations_bring_the_policy_to_the_teacher(tmp_path):
    rules = {
        "adaptive_extrapolation": "{rule: adaptive_extrapolation, slope: 4.0}",
        "fixed_extrapolation": "{rule: fixed_extrapolation, beta: 0.1}",
        "fixed_interpolation": "{rule: fixed_interpolation, beta: 0.2}",
    }
    for rule, combination in rules.items():
        config = tiny_config(tmp_path / rule, "align", max_steps=24, val_check_interval=24)
        cli = fit(config, f"--model.init_args.combination={combination}")
        start = fit(config, *ONE_STEP[:1], "--trainer.val_check_interval=1", "--run.version=start")
        assert metrics(cli)["val/kl"] < 0.8 * metrics(start)["val/kl"], rule


def test_validation_tells_how_pairs_are_judged_and_how_far_the_policy_went(tmp_path):
    found = metrics(fit(tiny_config(tmp_path, "align_sampled")))
    for name in (
        "reward_accuracy",
        "dpo_reward_accuracy",
        "contrastive_reward_accuracy",
        "reward",
        "kl_start",
        "kl_dpo",
    ):
        assert f"val/{name}" in found, name
    for name in ("kl_dpo_of_answer", "reward_of_answer", "expected_reward_of_answer", "tokens", "cut", "entropy"):
        assert math.isfinite(found[f"val/sampled_{name}"]), name


def test_testing_asks_the_reference_for_the_test_pairs(tmp_path):
    config = tiny_config(tmp_path, "dpo")
    fit(config)
    from lit_llm.training_cli import TrainingCLI

    cli = TrainingCLI.run(["test", "--config", str(config), "--ckpt_path", "last"])
    assert cli.trainer.callback_metrics["test/chosen_reward"] != 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"loss": "simpo", "beta": 2.5, "reference": ModelSpec(source="x")},
            "model.reference is set, but model.loss is 'simpo'",
        ),
        ({"ipo_mean": True}, "model.ipo_mean is set, but model.loss is 'sigmoid'"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "model.label_smoothing is set, but model.loss is 'ipo'"),
        ({"simpo_margin": 1.0}, "model.simpo_margin is set, but model.loss is 'sigmoid'"),
        ({"loss": "tdpo1", "tdpo_alpha": 1.0}, "model.tdpo_alpha is set, but model.loss is 'tdpo1'"),
        ({"loss": "tdpo2", "ipo_mean": True}, "model.ipo_mean is set, but model.loss is 'tdpo2'"),
        ({"loss": "kto", "label_smoothing": 0.1}, "model.label_smoothing is set, but model.loss is 'kto'"),
        ({"beta": 0.0}, "model.beta is 0.0"),
        ({"label_smoothing": 0.5}, "model.label_smoothing is 0.5"),
        ({"sft_weight": -1.0}, "model.sft_weight is -1.0"),
    ],
)
def test_settings_of_dpo_that_cannot_take_effect_are_refused(settings, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        DPO(ModelSpec(source="x"), **settings)


def test_dropout_of_adapters_and_adapters_on_frozen_models_are_refused():
    from lit_llm.models.adapters import Lora

    with pytest.raises(ValueError, match="turns dropout off"):
        DPO(ModelSpec(source="x", lora=Lora(dropout=0.1)))
    with pytest.raises(ValueError, match=r"model\.other\.lora is set"):
        AlignDistil(ModelSpec(source="x"), ModelSpec(source="y"), ModelSpec(source="z", lora=Lora()))


def test_models_of_another_tokenizer_are_refused(tmp_path):
    config = tiny_config(tmp_path / "pairs", "align")
    tiny_config(tmp_path / "cross", "dskd_cross")
    with pytest.raises(ValueError, match=r"model\.other .* has another tokenizer than model\.student"):
        fit(config, *ONE_STEP, f"--model.init_args.other.source={tmp_path / 'cross' / 'teacher'}")
