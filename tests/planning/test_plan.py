"""A plan counts what the real models are, and predicts what a run takes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_llm.cli import main
from lit_llm.models.adapters import Lora
from lit_llm.models.language_model import ModelSpec
from lit_llm.planning.bodies import FakeModel, Precision
from lit_llm.planning.live_bytes import LiveBytes
from tests.tiny import tiny_model_folder
from tests.tiny_runs import METHODS, ON_PAIRS, fit, tiny_config

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")


def planned(config, capsys, *options: str) -> dict:
    main(["plan", "--config", str(config), "--json=true", *options])
    out = capsys.readouterr().out
    return json.loads(out[out.index("{") :])


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
    from torch.utils.flop_counter import FlopCounterMode

    folder = tiny_model_folder(tmp_path, family=family, layers=3)
    real = AutoModelForCausalLM.from_pretrained(folder).train()
    found = FakeModel(ModelSpec(source=str(folder)), Precision()).cost(4, 40, 20, train=True)
    with FlopCounterMode(display=False) as counter, LiveBytes() as live:
        grid = real.base_model(input_ids=torch.zeros(4, 40, dtype=torch.int64), use_cache=False).last_hidden_state
        hidden = grid.flatten(0, 1)[torch.zeros(20, dtype=torch.int64)]
        del grid
        kept, forward = live.now, counter.get_total_flops()
        hidden.backward(torch.ones_like(hidden))
    assert found.forward_flops == forward
    assert found.backward_flops == counter.get_total_flops() - forward
    # transformers writes out the causal mask for fake tensors, so a little more is counted
    assert 0.99 * kept <= found.kept < 1.15 * kept


def test_checkpointing_keeps_less_and_computes_more(tmp_path):
    folder = str(tiny_model_folder(tmp_path, layers=4))
    plain = FakeModel(ModelSpec(source=folder), Precision()).cost(4, 40, 20, train=True)
    spared = FakeModel(ModelSpec(source=folder, gradient_checkpointing=True), Precision()).cost(4, 40, 20, train=True)
    assert spared.kept < 0.5 * plain.kept
    assert spared.forward_flops + spared.backward_flops > 1.2 * (plain.forward_flops + plain.backward_flops)


@pytest.mark.parametrize("method", ON_PAIRS)
def test_methods_on_pairs_are_refused_with_a_way_to_measure(method, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(tiny_config(tmp_path, method))])
    assert "over pairs of answers yet" in capsys.readouterr().err


@pytest.mark.parametrize("method", [method for method in METHODS if not method.startswith(ON_PAIRS)])
def test_every_method_can_be_planned_and_counts_what_it_trains(method, tmp_path, capsys):
    config = tiny_config(tmp_path, method, max_steps=2)
    plan = planned(config, capsys)
    cli = fit(config, "--trainer.limit_val_batches=0", "--trainer.val_check_interval=null")
    trained = sum(number for _, number in plan["parameters"].values())
    assert trained == sum(p.numel() for p in cli.model.parameters())
    assert plan["tokens"]["steps"] == 2 and plan["tokens"]["examples"] == 24
    assert plan["phases"]["loss"] > 0 and plan["flops"]["heads and losses"] > 0
    assert not (tmp_path / "runs" / method / "version_1").exists()


def test_the_page_names_the_parts_and_the_advice(tmp_path, capsys):
    config = tiny_config(tmp_path, "dskd", max_steps=12)
    main(["plan", "--config", str(config)])
    shown = capsys.readouterr().out
    for text in ("student body", "FLOPs per token", "<- the peak", "a store of the teacher", "Advice", "supervised"):
        assert text in shown
    assert "A store of its hidden states" in shown  # two epochs


def test_a_plan_for_gpus_is_made_without_one(tmp_path, capsys):
    options = ("--trainer.accelerator=gpu", "--trainer.devices=4", "--trainer.precision=bf16-true")
    config = tiny_config(tmp_path, "kd", max_steps=2)
    plan, plain = planned(config, capsys, *options), planned(config, capsys)
    assert "framework" not in plan["always"] and plan["notes"]
    assert plan["always"]["student weights"] * 2 == plain["always"]["student weights"]
    assert plan["tokens"]["per_step"] == 4 * plain["tokens"]["per_step"]
