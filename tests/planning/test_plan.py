"""A plan counts what the real models are, and predicts what a run takes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_llm.cli import main
from lit_llm.data.batch import TokenBatch, collate_branches
from lit_llm.methods import SFT
from lit_llm.methods.preference import PreferenceMethod
from lit_llm.models.adapters import Lora
from lit_llm.models.language_model import LanguageModel, ModelSpec
from lit_llm.planning.bodies import FakeModel, Precision
from lit_llm.planning.live_bytes import LiveBytes
from tests.tiny import tiny_model_folder
from tests.tiny_runs import METHODS, fit, tiny_config

UNKNOWN = ("dckd", "adpa", "adpa_sampled", "kto")
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")


def planned(config, capsys, *options: str) -> dict:
    main(["plan", "--config", str(config), "--json=true", *options])
    out = capsys.readouterr().out
    return json.loads(out[out.index("{") :])


def rows(sequences: int = 4, length: int = 40, supervised: int = 20) -> TokenBatch:
    nothing_T = torch.zeros(supervised, dtype=torch.int64)
    ids_BL = torch.zeros((sequences, length), dtype=torch.int64)
    return TokenBatch(ids_BL, torch.full((sequences,), length), nothing_T, nothing_T, nothing_T)


def measured(model: LanguageModel, tokens: TokenBatch) -> tuple[int, int, int]:
    """Bytes kept for the backward pass of the real body, FLOPs forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, LiveBytes() as live:
        hidden = model.hidden(tokens)
        kept, forward = live.now, counter.get_total_flops()
        hidden.backward(torch.ones_like(hidden))
    return kept, forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_every_family_are_those_of_the_real_model(family, tmp_path):
    folder = tiny_model_folder(tmp_path, family=family, layers=3)
    real = AutoModelForCausalLM.from_pretrained(folder)
    found = FakeModel(ModelSpec(source=str(folder)), Precision()).parameters()
    assert found.total == found.trained == sum(p.numel() for p in real.parameters())
    assert found.head == real.get_output_embeddings().weight.numel()


def test_a_cut_and_adapters_are_counted_as_they_are_trained(tmp_path):
    spec = ModelSpec(source=str(tiny_model_folder(tmp_path, layers=4)), keep_layers=[0, 3], lora=Lora(rank=4))
    real = spec.load()
    found = FakeModel(spec, Precision()).parameters()
    assert found.total == sum(p.numel() for p in real.parameters())
    assert found.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_and_flops_without_weights_are_those_of_the_real_body(family, tmp_path):
    spec = ModelSpec(source=str(tiny_model_folder(tmp_path, family=family, layers=3)))
    found = FakeModel(spec, Precision()).cost([rows()], train=True)
    kept, forward, backward = measured(spec.load(), rows())
    assert (found.forward_flops, found.backward_flops) == (forward, backward)
    # transformers writes out the causal mask for fake tensors, so a little more is counted
    assert 0.99 * kept <= found.kept < 1.15 * kept


@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_two_answers_behind_one_prompt_are_measured_as_they_are_run(family, tmp_path):
    spec = ModelSpec(source=str(tiny_model_folder(tmp_path, family=family, layers=3)))
    answers = [[i] * 20 for i in range(4)]
    tokens = collate_branches([[1] * 15] * 4, answers, answers, pad_id=0)
    fake, real = FakeModel(spec, Precision()), spec.load()
    assert fake.branches(tokens) and real.branches(tokens)
    found, (kept, forward, backward) = fake.cost([tokens], train=True), measured(real, tokens)
    assert (found.forward_flops, found.backward_flops) == (forward, backward)
    assert 0.99 * kept <= found.kept < 1.15 * kept


def test_two_runs_in_a_row_keep_what_both_keep(tmp_path):
    model = FakeModel(ModelSpec(source=str(tiny_model_folder(tmp_path))), Precision())
    one, two = model.cost([rows()], train=True), model.cost([rows(), rows()], train=True)
    assert 1.9 * one.kept < two.kept < 2.1 * one.kept
    assert two.forward_flops == 2 * one.forward_flops and two.backward_flops == 2 * one.backward_flops


def test_checkpointing_keeps_less_and_computes_more(tmp_path):
    folder = str(tiny_model_folder(tmp_path, layers=4))
    plain = FakeModel(ModelSpec(source=folder), Precision()).cost([rows()], train=True)
    spared = FakeModel(ModelSpec(source=folder, gradient_checkpointing=True), Precision()).cost([rows()], train=True)
    assert spared.kept < 0.5 * plain.kept
    assert spared.forward_flops + spared.backward_flops > 1.2 * (plain.forward_flops + plain.backward_flops)


class OwnWay(SFT):
    """A method that plan has not heard of."""


class OwnWayOnPairs(PreferenceMethod):
    """Likewise."""


@pytest.mark.parametrize("method, name", [(OwnWay, "sft"), (OwnWayOnPairs, "dpo")])
def test_methods_that_plan_does_not_know_are_refused_with_a_way_to_measure(method, name, tmp_path, capsys):
    path = f"{method.__module__}.{method.__name__}"
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(tiny_config(tmp_path, name)), f"--model.class_path={path}"])
    assert f"how {method.__name__} runs its models yet" in capsys.readouterr().err


@pytest.mark.parametrize("method", UNKNOWN)
def test_siblings_on_preferences_are_refused_likewise(method, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(tiny_config(tmp_path, method))])
    assert "runs its models yet" in capsys.readouterr().err


@pytest.mark.parametrize("method", [method for method in METHODS if method not in UNKNOWN])
def test_every_method_can_be_planned_and_counts_what_it_trains(method, tmp_path, capsys):
    config = tiny_config(tmp_path, method, max_steps=2)
    plan = planned(config, capsys)
    cli = fit(config, "--trainer.limit_val_batches=0", "--trainer.val_check_interval=null")
    trained = sum(number for _, number in plan["parameters"].values())
    assert trained == sum(p.numel() for p in cli.model.parameters())
    assert plan["tokens"]["steps"] == 2 and plan["tokens"]["examples"] == 24
    assert plan["phases"]["loss"] > 0 and plan["flops"]["heads and losses"] > 0
    assert not (tmp_path / "runs" / method / "version_1").exists()


def test_the_models_of_an_alignment_are_counted_and_the_starting_one_runs_in_evaluations_only(tmp_path, capsys):
    plan = planned(tiny_config(tmp_path, "align"), capsys)
    assert {"DPO model weights", "other model weights", "start weights"} < plan["always"].keys()
    assert {"DPO model", "other model"} < plan["phases"].keys() and "start" not in plan["phases"]
    assert {"DPO model forward", "other model forward"} < plan["flops"].keys()
    assert plan["flops"]["DPO model forward"] == plan["flops"]["other model forward"]  # two of one size


def test_a_reference_of_its_own_is_there_before_training_only(tmp_path, capsys):
    config = tiny_config(tmp_path, "dpo")
    reference = f"--model.init_args.reference.source={tmp_path / 'teacher'}"
    alone, beside = planned(config, capsys), planned(config, capsys, reference)
    assert alone["always"].keys() == beside["always"].keys()
    assert beside["phases"]["asking the reference"] > alone["phases"]["asking the reference"]


def test_the_page_names_the_parts_and_the_advice(tmp_path, capsys):
    config = tiny_config(tmp_path, "dskd", max_steps=12)
    main(["plan", "--config", str(config)])
    shown = capsys.readouterr().out
    for text in (
        "student body",
        "FLOPs per token",
        "<- the peak",
        "a store of the frozen models",
        "Advice",
        "supervised",
    ):
        assert text in shown
    assert "A store of its hidden states" in shown  # two epochs


def test_a_plan_for_gpus_is_made_without_one(tmp_path, capsys):
    options = ("--trainer.accelerator=gpu", "--trainer.devices=4", "--trainer.precision=bf16-true")
    config = tiny_config(tmp_path, "kd", max_steps=2)
    plan, plain = planned(config, capsys, *options), planned(config, capsys)
    assert "framework" not in plan["always"] and plan["notes"]
    assert plan["always"]["student weights"] * 2 == plain["always"]["student weights"]
    assert plan["tokens"]["per_step"] == 4 * plain["tokens"]["per_step"]
