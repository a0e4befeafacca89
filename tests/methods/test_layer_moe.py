"""LayerMoE: whole steps against golden vectors, what trains in each stage, resume, splits and ranks, and the run's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from lit_llm.data.batch import LanguageBatch, collate_tokens
from lit_llm.evaluation.forgetting import ForgettingTable
from lit_llm.evaluation.language_similarity import SimilarityReport
from lit_llm.methods.answers import Generation
from lit_llm.methods.layer_moe import LayerMoE
from lit_llm.methods.layer_moe_settings import Expand
from lit_llm.models import surgery
from lit_llm.models.experts import collect_routing
from lit_llm.models.language_model import LanguageModel, ModelSpec
from tests.golden.golden import Case, family_folder, read_index
from tests.golden.routing_cases import decoder
from tests.tiny_languages import language_config
from tests.tiny_runs import fit

KIND = "model_step"
FOLDER = family_folder("layer_moe")
STEPS = {name: entry for name, entry in read_index(FOLDER).items() if entry["kind"] == "model_step"}

# ------------------------------------------------------------------ golden


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", sorted(STEPS))
def test_a_whole_step_is_as_the_golden_vectors_have_it(name, dtype):
    case = Case(STEPS[name], FOLDER, dtype)
    case.loosen(torch.float32)  # transformers' norms compute in single precision also for double weights
    method = golden_method(case)
    batch = golden_batch(case)
    check_forward(case, method.student, batch)
    terms = method.terms(batch, *method.routed(batch))
    total = sum(method.coefficients[name] * term.mean for name, term in terms.items())
    for field in case.expected("loss."):
        if field != "loss.total":
            case.check(field, terms[field.removeprefix("loss.")].mean)
    case.check("loss.total", total)
    surgery.set_trainable(method.student.transformer, case.hparams["stage"])
    terms = method.terms(batch, *method.routed(batch))
    sum(method.coefficients[name] * term.mean for name, term in terms.items()).backward()
    found = gradients(method.student.transformer)
    for field in case.expected("grad."):
        case.check(field, found[field.removeprefix("grad.")], **case.gradient_tolerance(field))
    case.finish()


def golden_method(case: Case) -> LayerMoE:
    model, settings = decoder(case), case.hparams
    plan = surgery.dense_plan(model, "old", experts_per_token=settings["top_k"])
    surgery.expand(model, plan.with_group("new", [], settings["num_experts"]))
    by_row = settings["scope"] == "sequence_sum"
    arguments = {"stage": settings["stage"]}
    if settings["stage"] == 1:
        arguments |= {"balance_coef": settings["balance_coef"]}
    else:
        arguments |= {"lpr_coef": settings["lpr_coef"], "lpr_form": "released" if by_row else "exact"}
        if settings["classifier_layers"]:
            names = ("classifier_layers", "classifier_coef")
            arguments |= {name: settings[name] for name in names} | {"classifier_scope": settings["scope"]}
            surgery.add_classifiers(model, settings["classifier_layers"], settings["scope"])
    with torch.no_grad():
        for index, routed in surgery.routed_layers(model).items():
            new = {name: case[f"moe.{index}.new.{name}_proj.weight"] for name in ("gate", "up", "down")}
            routed.experts["1"].gate_up_proj.copy_(torch.cat([new["gate"], new["up"]], 1))
            routed.experts["1"].down_proj.copy_(new["down"])
            routed.router.weight = torch.nn.Parameter(case[f"moe.{index}.router.weight"])
            if routed.classifier is not None:
                routed.classifier.weight = torch.nn.Parameter(case[f"moe.{index}.classifier.weight"])
    method = LayerMoE(ModelSpec(source="golden"), **arguments)
    method.student = LanguageModel(model, _tokenizer(), trim_head=False)
    method.plan = surgery.plan_of(model)
    return method


def golden_batch(case: Case) -> LanguageBatch:
    ids_BL, mask_BL = case["input_ids"], case["attention_mask"].bool()
    lengths = mask_BL.sum(1).tolist()
    tokens = collate_tokens([row[:n].tolist() for row, n in zip(ids_BL, lengths, strict=True)], [0] * len(lengths), 0)
    assert torch.equal(tokens.target_T, case["labels"][:, 1:][case["labels"][:, 1:] >= 0])
    old_BL = case["old_mask"].bool() if "old_mask" in case else torch.zeros_like(mask_BL)
    group_BL = torch.where(mask_BL, (~old_BL).long(), -1)
    if "group" in case:
        assert torch.equal(group_BL[:, 0], case["group"])
    counts = tuple(int((group_BL == group).sum()) for group in (0, 1))
    language_T = group_BL.flatten()[tokens.position_T]
    return LanguageBatch(
        tokens, group_BL, group_BL, language_T, len(tokens.target_T), counts, sum(lengths), tuple(range(len(lengths)))
    )


def check_forward(case: Case, student: LanguageModel, batch: LanguageBatch) -> None:
    real_BL1 = (batch.group_BL >= 0)[..., None]
    seen: dict[int, Tensor] = {}
    layers = surgery.routed_layers(student.transformer)
    handles = [
        routed.register_forward_pre_hook(lambda _, given, index=index: seen.update({index: given[0].detach()}))
        for index, routed in layers.items()
    ]
    with torch.no_grad(), collect_routing(student) as records:
        hidden_BLD = student.hidden_grid(batch.student)
    for handle in handles:
        handle.remove()
    case.check("logits", student.head(hidden_BLD) * real_BL1)
    for index in layers:
        shape = (*batch.group_BL.shape, -1)
        case.check(f"layer_input.{index}", seen[index] * real_BL1)
        case.check(f"router_logits.{index}", records[index].router_logits_MN.view(shape) * real_BL1)
        if (logits := records[index].classifier_logits) is not None:
            by_row = len(logits) == len(batch.group_BL)
            case.check(f"classifier_logits.{index}", logits if by_row else logits.view(shape) * real_BL1)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {}
    for index, routed in surgery.routed_layers(model).items():
        found[f"moe.{index}.router.weight"] = routed.router.weight.grad
        if routed.classifier is not None:
            found[f"moe.{index}.classifier.weight"] = routed.classifier.weight.grad
        bank = routed.experts["1"]
        if bank.gate_up_proj.grad is not None:
            gate, up = bank.gate_up_proj.grad.chunk(2, 1)
            found |= {f"moe.{index}.new.gate_proj.weight": gate, f"moe.{index}.new.up_proj.weight": up}
            found[f"moe.{index}.new.down_proj.weight"] = bank.down_proj.grad
    return found


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")


# -------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """The run folder of a first stage."""
    return fit(language_config(tmp_path_factory.mktemp("first"), 1)).model.run_folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_stage_1_moves_new_experts_and_routers_and_nothing_else(first):
    dense, trained = load_file(first.parents[2] / "dense" / "model.safetensors"), weights(first)
    added = {name for name in trained if ".experts." in name or ".router." in name}
    assert {name.replace("mlp.base.", "mlp.") for name in trained if name not in added} == set(dense)
    for name, value in trained.items():
        if name not in added:
            assert torch.equal(value, dense[name.replace("mlp.base.", "mlp.")]), name
    for layer in (0, 2):
        gate = dense[f"model.layers.{layer}.mlp.gate_proj.weight"]
        bank = trained[f"model.layers.{layer}.mlp.experts.1.gate_up_proj"]
        assert all(not torch.equal(expert[: len(gate)], gate) for expert in bank)
    assert not [name for name in trained if ".layers.1.mlp.experts" in name]


def test_stage_2_moves_routers_and_classifiers_and_nothing_else(first, tmp_path):
    cli = fit(language_config(tmp_path, 2, source=first / "model", model={"classifier_layers": [0]}))
    before, after = weights(first), weights(cli.model.run_folder)
    new = set(after) - set(before)
    assert new == {"model.layers.0.mlp.classifier.weight"} and set(before) <= set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"model.layers.{layer}.mlp.router.weight" for layer in (0, 2)}
    assert sorted(cli.model.trained_names) == sorted(
        ["model.layers.0.mlp.classifier.weight", *(f"model.layers.{layer}.mlp.router.weight" for layer in (0, 2))]
    )


def test_the_optimizer_gets_only_what_trains(first, tmp_path):
    cli = fit(language_config(tmp_path, 2, source=first / "model", max_steps=1))
    groups = cli.trainer.optimizers[0].param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == 16 * (3 + 2)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("step", [3, 5])
def test_a_run_that_died_resumes_to_the_same_weights_and_table(first, tmp_path, stage, step):
    more = {"source": first / "model", "model": {"classifier_layers": [2]}} if stage == 2 else {}
    if stage == 1:
        more = {"model": {"expand": {"new_experts": 3}, "similarity": {"tokens_per_language": 100}}}
    unbroken = fit(language_config(tmp_path / "unbroken", stage, **more))
    config = language_config(tmp_path / "broken", stage, **more)
    with pytest.raises(RuntimeError, match="died on purpose"):
        fit(config, "--trainer.callbacks+=tests.tiny_runs.DieAt", f"--trainer.callbacks.step={step}")
    resumed = fit(config, "--ckpt_path", "last")
    assert resumed.trainer.global_step == 8
    ours, theirs = (weights(cli.model.run_folder) for cli in (resumed, unbroken))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    tables = [ForgettingTable.read(cli.model.run_folder / "forgetting.json") for cli in (resumed, unbroken)]
    assert tables[0] == tables[1] and [name for name, _ in tables[0].moments][-1] == f"stage {stage} (new), step 8"


SPLIT = ["--trainer.precision=64-true", "--trainer.limit_val_batches=0", "--trainer.val_check_interval=null"]


def trained_state(config: Path, *options: str) -> dict[str, Tensor]:
    found = fit(config, *SPLIT, *options).model.state_dict()
    return {name: value.detach().clone() for name, value in found.items()}


def gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in ours)


@pytest.mark.parametrize("stage", [1, 2])
def test_recomputed_activations_give_the_same_weights(first, tmp_path, stage):
    from lit_llm.models import dispatch

    more = {"source": first / "model", "model": {"classifier_layers": [2]}} if stage == 2 else {}
    options = ("--trainer.limit_val_batches=0", "--trainer.val_check_interval=null", "--trainer.max_steps=3")
    found = []
    for name, recompute in (("kept", "false"), ("recomputed", "true")):
        dispatch._failed_self_test.cache_clear()  # the first step of a process makes the test
        config = language_config(tmp_path / name, stage, **more)
        cli = fit(config, f"--model.init_args.student.gradient_checkpointing={recompute}", *options)
        found.append(weights(cli.model.run_folder))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("stage", [1, 2])
def test_splitting_a_batch_does_not_change_the_weights(first, tmp_path, stage):
    # the load of the balance loss is that of a micro-batch, as released, and so is left out here
    more = {"source": first / "model", "model": {"classifier_layers": [2]}} if stage == 2 else {}
    more = more or {"model": {"balance_coef": 0.0}}

    def trained(batch_size: int, accumulate: int) -> dict[str, Tensor]:
        folder = tmp_path / str(batch_size)
        config = language_config(folder, stage, **more, max_steps=3, accumulate_grad_batches=accumulate)
        return trained_state(config, f"--data.init_args.batch_size={batch_size}")

    whole = trained(8, 1)
    for batch_size, accumulate in ((4, 2), (1, 8)):
        assert gap(trained(batch_size, accumulate), whole) < 1e-6


def test_experts_are_allocated_by_measured_similarity_and_the_run_says_how(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("lit_llm.methods.expansion.rank_zero_info", said.append)
    # of every document three tokens count, far fewer than it has
    settings = {"expand": {"new_experts": 4}, "similarity": {"tokens_per_language": 150, "max_length": 3}}
    cli = fit(language_config(tmp_path, 1, model=settings, max_steps=2, val_check_interval=2))
    folder = cli.model.run_folder
    assert any(text.startswith("Experts per layer (new_experts 4): 4 new in 3 layers") for text in said)
    report = SimilarityReport.read(folder / "similarity.json")
    assert list(report.pairs) == ["hu-tr", "hu-en", "tr-en"] and report.languages["en"].tokens == 150
    plan = cli.model.plan
    assert cli.trainer.callback_metrics["train/balance_per_slot"] >= 0.5
    assert plan.similarity["measured"] == {"hu": 150, "tr": 150, "en": 150}
    assert sum(plan.expert_counts) == 7 and plan.similarity["new_old"] == report.new_old
    assert [group.languages for group in plan.groups] == [["en"], ["hu", "tr"]]
    written = json.loads((folder / "expansion.json").read_text())
    counts = written["parameters"]
    assert written["plan"] == plan.to_dict()
    assert counts["added"] == counts["total"] - counts["dense"] == counts["trained"]

    overlay = yaml.safe_load((folder / "allocation.yaml").read_text())
    assert overlay["model"]["init_args"]["expand"]["experts"] == plan.expert_counts
    monkeypatch.setattr("lit_llm.methods.expansion.measure", None)  # a call would be an error
    monkeypatch.chdir(tmp_path)
    unvalidated = ("--trainer.limit_val_batches=0", "--trainer.val_check_interval=null")
    again = language_config(tmp_path / "again", 1, model=settings, max_steps=1)
    repeated = fit(again, "--config", str(folder / "allocation.yaml"), *unvalidated).model
    assert repeated.plan.expert_counts == plan.expert_counts
    source, classifiers = repeated.run_folder / "model", {"classifier_layers": 2}
    config = language_config(tmp_path / "review", 2, source=source, model=classifiers, max_steps=1)
    review = fit(config, *unvalidated).model
    most_alike = sorted(range(3), key=lambda layer: -report.new_old[layer])[:2]
    assert review.plan.classifier_layers == sorted(most_alike)


def test_a_second_group_grows_the_model_and_leaves_the_first_groups_experts_alone(tmp_path):
    steps = {"max_steps": 2, "val_check_interval": 2}
    first = fit(language_config(tmp_path / "g1", 1, groups={"old": ["en"], "one": ["hu"]}, **steps)).model
    three = {"old": ["en"], "one": ["hu"], "two": ["tr"]}
    grown = fit(language_config(tmp_path / "g2", 1, source=first.run_folder / "model", groups=three, **steps)).model
    before, after = weights(first.run_folder), weights(grown.run_folder)
    assert grown.plan.expert_counts == [5, 1, 3]
    older = [name for name in before if ".router." not in name]
    assert older and all(torch.equal(before[name], after[name]) for name in older)
    review = fit(
        language_config(
            tmp_path / "review", 2, source=grown.run_folder / "model", groups=three,
            model={"prior_groups": "all"}, **steps,
        )
    )  # fmt: skip
    assert {"train/lpr", "val/loss_tr", "val/loss_two"} <= set(review.trainer.callback_metrics)
    table = ForgettingTable.read(review.model.run_folder / "forgetting.json")
    assert [name for name, _ in table.moments] == [
        "start", "stage 1 (one), step 2", "stage 1 (two), start", "stage 1 (two), step 2", "stage 2 (two), start",
        "stage 2 (two), step 2",
    ]  # fmt: skip


def test_review_brings_old_languages_back_to_expert_0(first, tmp_path):
    settings = {"classifier_layers": [0], "optimization": {"lr": 0.1, "weight_decay": 0.0}, "lpr_coef": 1.0}
    config = language_config(tmp_path, 2, source=first / "model", model=settings, max_steps=16)
    fit(config)
    header, *rows = (tmp_path / "runs/stage2/version_0/metrics.csv").read_text().splitlines()
    table = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    old, classifier = (
        [float(row[name]) for row in table if row[name]]
        for name in ("val/routing/old_prob_expert0", "train/classifier")
    )
    assert old[-1] > old[0] + 0.2 and classifier[-1] < classifier[0] - 0.1


def test_plain_sft_trains_on_the_same_data_and_is_scored_by_language(tmp_path):
    cli = fit(language_config(tmp_path, None))
    table = ForgettingTable.read(cli.model.run_folder / "forgetting.json")
    assert [name for name, _ in table.moments] == ["start", "SFT, step 8"]
    (_, before), (_, after) = table.moments
    assert all(after[name].loss < before[name].loss for name in ("hu", "tr"))
    assert float(cli.trainer.callback_metrics["val/loss_hu"]) == pytest.approx(after["hu"].loss, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stage": 2, "expand": Expand(uniform=1)}, "model.expand is set, but model.stage is 2"),
        ({"stage": 2, "balance_coef": 0.1}, "model.balance_coef is set, but model.stage is 2"),
        ({"stage": 1, "lpr_coef": 0.2}, "model.lpr_coef is set, but model.stage is 1"),
        ({"stage": 1, "classifier_layers": 2}, "model.classifier_layers is set, but model.stage is 1"),
        ({"stage": 2, "classifier_gate": "label"}, "model.classifier_gate is set, but model.classifier_layers is not"),
        ({"stage": 2, "lpr_coef": -1.0}, "model.lpr_coef is -1.0"),
        ({"stage": 2, "lpr_form": "released", "prior_groups": "all"}, "model.prior_groups is 'all'"),
        ({"routing_window": 0}, "model.routing_window is 0"),
        (
            {
                "stage": 2,
                "classifier_layers": 1,
                "classifier_scope": "sequence_sum",
                "generation": Generation(prompts=3),
            },
            "model.generation asks for 3 generated answers",
        ),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(settings, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        LayerMoE(ModelSpec(source="x"), **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "expand sets none of"),
        ({"delta": 3.0, "uniform": 1}, "expand sets delta and uniform of"),
        ({"uniform": 1, "min_experts": 2}, "expand.min_experts is 2, but expand.uniform decides"),
        ({"new_experts": 0}, "expand.new_experts is 0"),
        ({"uniform": 1, "experts_per_token": 1}, "expand.experts_per_token is 1"),
    ],
)
def test_expansions_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        Expand(**settings)


def test_methods_and_data_that_do_not_belong_together_are_refused(tmp_path):
    from tests.tiny_runs import tiny_config

    config = yaml.safe_load(tiny_config(tmp_path / "answers", "kd").read_text())
    languages = yaml.safe_load(language_config(tmp_path / "text", 1).read_text())
    for name, model, data, said in (
        ("kd", config, languages, "KD learns from prompts with answers, but data.class_path is Languages"),
        (
            "moe",
            languages,
            config,
            "LayerMoE learns from text in several languages, but data.class_path is Instructions",
        ),
    ):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**config, "model": model["model"], "data": data["data"]}, sort_keys=False))
        with pytest.raises(ValueError, match=said):
            fit(path)


def test_the_report_tells_what_routers_and_classifiers_did(first, tmp_path):
    cli = fit(language_config(tmp_path, 2, source=first / "model", model={"classifier_layers": [2]}, max_steps=4))
    lines = [json.loads(line) for line in (cli.model.run_folder / "languages.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4] and lines[-1]["routing"]["layers"] == [0, 2]
    assert [row[0] for row in lines[-1]["routing"]["by_language"]["classifier_acc"]] == [None] * 3
    page = (cli.model.run_folder / "report.html").read_text(encoding="utf-8")
    for said in ("What was learned and forgotten", "used by one token", "Classifier: share judged right, by language"):
        assert said in page
    assert "train/routing/max_violation" in (cli.model.run_folder / "metrics.csv").read_text()


def test_a_checkpoint_of_either_stage_becomes_a_model_folder(first, tmp_path):
    from lit_llm.training_cli import TrainingCLI

    config = first.parents[2] / "stage1.yaml"
    last = first / "checkpoints" / "last.ckpt"
    TrainingCLI.run(["export", "--config", str(config), "--ckpt_path", str(last), "--to", str(tmp_path / "model")])
    ours, theirs = load_file(tmp_path / "model" / "model.safetensors"), weights(first)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_stages_and_groups_that_do_not_fit_are_refused(first, tmp_path):
    with pytest.raises(ValueError, match=r"model\.stage is 1, but data\.stage is 2"):
        fit(language_config(tmp_path / "a", 1, data={"stage": 2}))
    with pytest.raises(
        ValueError, match="data.groups has 2 groups: .* but the student knows 2 groups: .* adds one group"
    ):
        fit(language_config(tmp_path / "b", 1, source=first / "model"))
    with pytest.raises(ValueError, match=r"the student knows 1 group: old \(en\)"):
        fit(language_config(tmp_path / "c", 2))
    with pytest.raises(ValueError, match="no similarity to choose them by"):
        fit(language_config(tmp_path / "d", 2, source=first / "model", model={"classifier_layers": 1}))
