"""ADPA and DCKD: their loss by hand, what they bring the policy to, whose answers they learn on, and what they refuse.

Shapes: L tokens of a sequence, A tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_llm.methods import ADPA, DCKD
from lit_llm.methods.on_policy import OnPolicy
from lit_llm.models.adapters import Lora
from lit_llm.models.language_model import ModelSpec
from tests.tiny_runs import fit, tiny_config

ONE_STEP = ("--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.val_check_interval=null")
IN_DOUBLE = (*ONE_STEP, "--trainer.precision=64-true")
X = ModelSpec(source="x")


def metrics(cli) -> dict[str, float]:
    return {name: value.item() for name, value in cli.trainer.callback_metrics.items()}


def log_probs(folder, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """(A, V) of a plain model in float64, at the positions that predict the answer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    logits_LV = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
    return logits_LV[len(prompt) - 1 : -1].log_softmax(-1)


def first_pairs(cli) -> list[dict]:
    """The pairs of the first optimizer step."""
    sampler = cli.datamodule._training_sampler(cli.datamodule.sets["train"])
    return [cli.datamodule.sets["train"][example] for example in sampler.plan(0)[0].examples]


def cross_entropy(folder, pairs: list[dict]) -> torch.Tensor:
    values = []
    for row in pairs:
        found_AV = log_probs(folder, row["student_prompt_ids"], row["chosen_ids"])
        values.append(-found_AV[range(len(found_AV)), row["chosen_ids"]])
    return torch.cat(values).mean()


@torch.no_grad()
def test_the_loss_of_dckd_is_cross_entropy_and_the_divergence_on_both_answers(tmp_path):
    config = tiny_config(tmp_path, "dckd", dropout=0.0)
    cli = fit(config, *IN_DOUBLE, "--model.init_args.chosen_weight=0.7", "--model.init_args.rejected_weight=0.4")
    pairs, folders = first_pairs(cli), [tmp_path / name for name in ("student", "teacher")]

    expected = cross_entropy(folders[0], pairs)
    for side, weight in (("chosen", 0.7), ("rejected", 0.4)):
        divergences = []
        for row in pairs:
            policy_AV, teacher_AV = (log_probs(f, row["student_prompt_ids"], row[f"{side}_ids"]) for f in folders)
            divergences.append((teacher_AV.exp() * (teacher_AV - policy_AV)).sum(-1))
        assert metrics(cli)[f"train/kl_{side}"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-5)
        expected = expected + weight * torch.cat(divergences).mean()
    assert metrics(cli)["train/loss"] == pytest.approx(expected.item(), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("answers", ["chosen", "rejected"])
def test_the_loss_of_adpa_is_cross_entropy_less_the_expected_advantage(tmp_path, answers):
    config = tiny_config(tmp_path, "adpa", dropout=0.0)
    settings = [f"--model.init_args.{s}" for s in (f"answers={answers}", "gamma=40", "beta=0.5", "sft_weight=0.3")]
    cli = fit(config, *IN_DOUBLE, *settings)
    pairs, folders = first_pairs(cli), [tmp_path / name for name in ("student", "teacher", "before")]

    advantages = []
    for row in pairs:
        policy_AV, teacher_AV, before_AV = (
            log_probs(f, row["student_prompt_ids"], row[f"{answers}_ids"]) for f in folders
        )
        advantages.append(0.5 * (policy_AV.exp() * (teacher_AV - before_AV)).sum(-1))
    advantage = torch.cat(advantages).mean()
    expected = 0.3 * cross_entropy(folders[0], pairs) - 40 * advantage
    assert metrics(cli)["train/expected_advantage"] == pytest.approx(advantage.item(), rel=1e-4)
    assert metrics(cli)["train/loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_dckd_brings_the_policy_to_the_teacher_on_both_answers(tmp_path):
    config = tiny_config(tmp_path, "dckd", max_steps=24, val_check_interval=24)
    alone = [f"--model.init_args.{weight}" for weight in ("sft_weight=0", "chosen_weight=1", "rejected_weight=1")]
    start = metrics(fit(config, *ONE_STEP[:1], "--trainer.val_check_interval=1", *alone, "--run.version=start"))
    found = metrics(fit(config, *alone))
    for side in ("chosen", "rejected"):
        assert found[f"val/kl_{side}"] < 0.8 * start[f"val/kl_{side}"], side
    assert {"val/reward_accuracy", "val/reward_margin", "val/agreement"} <= found.keys()


@pytest.mark.parametrize("answers", ["start", "policy", "rejected"])
def test_adpa_raises_the_advantage_that_the_teacher_sees(tmp_path, answers):
    config = tiny_config(tmp_path, "adpa", max_steps=24, val_check_interval=24)
    settings = [f"--model.init_args.{s}" for s in (f"answers={answers}", "sft_weight=0", "gamma=50")]
    if answers != "rejected":
        settings += ["--model.init_args.on_policy.max_new_tokens=6"]
    start = metrics(fit(config, *ONE_STEP[:1], "--trainer.val_check_interval=1", *settings, "--run.version=start"))
    found = metrics(fit(config, *settings))
    # the two teachers are small and random, so that they hardly differ
    assert found["val/expected_advantage"] > start["val/expected_advantage"] + 0.01
    assert ("val/sampled_expected_advantage" in found) == (answers != "rejected")
    assert {"val/reward_accuracy", "val/dpo_reward_accuracy"} <= found.keys()


def test_published_answers_are_those_of_the_policy_as_it_starts(tmp_path):
    config = tiny_config(tmp_path, "adpa_sampled")
    cli = fit(config, "--model.init_args.on_policy.temperature=0")
    method = cli.model
    prompts = [cli.datamodule.sets["train"][row]["student_prompt_ids"] for row in range(4)]
    start = ModelSpec(source=str(tmp_path / "student")).load()
    settings = {"max_new_tokens": 6, "temperature": 0.0}
    assert [list(r.tokens) for r in method.rollouts._sample(prompts, 0)] == start.generate(prompts, **settings)
    assert method.student.generate(prompts, **settings) != start.generate(prompts, **settings)


def test_a_part_of_the_settings_of_sampling_leaves_the_published_rest(tmp_path):
    cli = fit(tiny_config(tmp_path, "adpa_sampled"), *ONE_STEP, "--model.init_args.on_policy.student_fraction=1")
    assert cli.model.rollouts.settings.temperature == 0.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gamma": 0.0}, "model.gamma is 0.0"),
        ({"beta": -1.0}, "model.beta is -1.0"),
        ({"sft_weight": -1.0}, "model.sft_weight is -1.0"),
        ({"answers": "own"}, "model.answers is 'own'; known are start, policy, chosen, rejected"),
        ({"answers": "chosen", "on_policy": OnPolicy()}, "model.on_policy is set, but model.answers is 'chosen'"),
        ({"reference_teacher": ModelSpec(source="x", lora=Lora())}, "model.reference_teacher.lora is set"),
        (
            {"student": ModelSpec(config={"model_type": "llama"}, tokenizer="x")},
            "model.answers is 'start', but the policy starts at random",
        ),
    ],
)
def test_settings_of_adpa_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        ADPA(**{"student": X, "teacher": X, "reference_teacher": X} | settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"chosen_weight": -0.1}, "model.chosen_weight is -0.1"),
        ({"chosen_weight": 0, "rejected_weight": 0}, "are both 0, so the teacher has no part"),
        ({"teacher": ModelSpec(source="x", lora=Lora())}, "model.teacher.lora is set"),
    ],
)
def test_settings_of_dckd_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        DCKD(**{"student": X, "teacher": X} | settings)


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path):
    config = tiny_config(tmp_path / "pairs", "dckd")
    tiny_config(tmp_path / "cross", "dskd_cross")
    with pytest.raises(
        ValueError, match=r"model\.teacher .* has another tokenizer than model\.student .* DCKD compares"
    ):
        fit(config, *ONE_STEP, f"--model.init_args.teacher.source={tmp_path / 'cross' / 'teacher'}")
