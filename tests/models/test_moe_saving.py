"""Expanded models on disk: whole folders that plain transformers reads, deltas, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_llm.models.language_model import LanguageModel, ModelSpec
from lit_llm.models.moe_saving import apply_delta, family_classes, save_delta
from lit_llm.models.surgery import add_classifiers, dense_plan, expand, plan_of, routed_layers
from tests.models.test_surgery import FAMILIES, dense, disturb, expanded, ids
from tests.tiny import tiny_model_folder


def learned(family="llama", classifiers=(0,), **settings):
    model = expanded(family, **settings)
    add_classifiers(model, list(classifiers))
    return disturb(model).eval()


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_with_the_same_logits(family, tmp_path):
    model = learned(family)
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(again) is type(model) and isinstance(again, type(dense(family)))
    assert torch.equal(logits(again), logits(model)) and plan_of(again) == plan_of(model)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["model_type"], fields["base_model_type"]) == ("layer_moe", family)
    assert fields["architectures"] == [f"LayerMoe{type(dense(family)).__name__}"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_routers_and_classifiers_stay_in_float32_on_disk_and_back(dtype, tmp_path):
    model = learned(dtype=dtype)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, parameter in again.named_parameters():
        wide = "router" in name or "classifier" in name
        assert parameter.dtype == (torch.float32 if wide else dtype), name
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_our_loader_reads_it_trains_it_and_writes_it_again(tmp_path, byte_level_tokenizer):
    tiny_model_folder(tmp_path / "dense", tokenizer=byte_level_tokenizer, layers=3)
    first = ModelSpec(source=str(tmp_path / "dense")).load()
    expand(first.transformer, dense_plan(first.transformer).with_group("first", ["el"], [3, 1, 2]))
    disturb(first.transformer)
    first.save(tmp_path / "expanded")
    second = ModelSpec(source=str(tmp_path / "expanded"), gradient_checkpointing=True).load()
    assert second.family == first.family == "llama" and not second._packing_unknown
    assert torch.equal(logits(second.transformer.eval()), logits(first.transformer.eval()))
    assert AutoTokenizer.from_pretrained(tmp_path / "expanded").get_vocab() == byte_level_tokenizer.get_vocab()
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13]]
    assert second.generate(prompts, max_new_tokens=6) == first.generate(prompts, max_new_tokens=6)
    plan = plan_of(second.transformer).with_group("second", ["hi"], [2, 1, 1])
    expand(second.transformer, plan)
    second.save(tmp_path / "grown")
    third = ModelSpec(source=str(tmp_path / "grown")).load()
    assert plan_of(third.transformer) == plan and isinstance(third, LanguageModel)
    with pytest.raises(ValueError, match="keep_layers cuts dense models.*added experts"):
        ModelSpec(source=str(tmp_path / "grown"), keep_layers=[0]).load()


READ = """
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained({folder!r}).eval()
torch.save(model(torch.load({folder!r} + "/ids")).logits.detach(), {folder!r} + "/logits")
"""


@pytest.mark.parametrize(
    "imports", ["import lit_llm", "from transformers import AutoConfig, AutoModel; import lit_llm"]
)
def test_plain_transformers_reads_it_in_a_fresh_process_after_importing_lit_llm(imports, tmp_path):
    model = learned()
    model.save_pretrained(tmp_path)
    torch.save(ids(), tmp_path / "ids")
    run(imports + READ.format(folder=str(tmp_path)))
    assert torch.equal(torch.load(tmp_path / "logits"), logits(model))


def test_importing_lit_llm_imports_neither_torch_nor_transformers():
    run("import lit_llm, sys; assert not {'torch', 'transformers', 'lightning'} & set(sys.modules)")


def test_transformers_alone_refuses_it_instead_of_leaving_the_experts_out(tmp_path):
    learned().save_pretrained(tmp_path)
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    shown = run(code, succeeds=False)
    assert "`layer_moe`" in shown and "does not recognize this architecture" in shown


def run(code, succeeds=True):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (shown.returncode == 0) == succeeds, shown.stderr
    return shown.stderr


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_generation_with_and_without_a_cache_is_the_same_with_classifiers(family, tmp_path):
    model = learned(family, classifiers=(0, 2))
    prompts = ids(4, 6)
    mask = torch.ones_like(prompts)
    mask[0, :3] = 0  # padded on the left
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(prompts, use_cache=True, **settings)
    assert torch.equal(with_cache, model.generate(prompts, use_cache=False, **settings))
    assert with_cache.shape == (4, 18)


def test_a_decision_per_row_does_not_generate():
    model = expanded()
    add_classifiers(model, [0], scope="sequence_sum")
    assert logits(model).isfinite().all()
    with pytest.raises(ValueError, match=r"layers \[0\] decide once per row.*classifier_scope: token"):
        model.generate(ids(1, 4), max_new_tokens=2)


def test_a_configuration_alone_makes_a_model_that_starts_as_its_dense_part():
    config = learned().config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    layer = routed_layers(model)[0]
    assert layer.experts["1"].copies(layer.base) and layer.router.weight.isfinite().all()
    empty, _ = family_classes("llama")
    with pytest.raises(ValueError, match="needs its plan"):
        AutoModelForCausalLM.from_config(empty(vocab_size=50, hidden_size=32, num_attention_heads=4))


def test_a_folder_of_an_unknown_base_is_refused(tmp_path):
    learned().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "base_model_type": "unheard_of"}))
    with pytest.raises(ValueError, match="no causal language model of the type 'unheard_of'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# --------------------------------------------------------------------- deltas


def test_a_delta_turns_the_dense_model_into_the_expanded_one(tmp_path):
    model = learned(classifiers=(0, 2))
    save_delta(model, tmp_path / "delta")
    assert sorted(file.name for file in (tmp_path / "delta").iterdir()) == ["layer_moe.json", "layer_moe.safetensors"]
    again = apply_delta(dense(), tmp_path / "delta")
    assert torch.equal(logits(again.eval()), logits(model)) and plan_of(again) == plan_of(model)
    size = (tmp_path / "delta" / "layer_moe.safetensors").stat().st_size
    added = sum(p.numel() * 4 for name, p in model.named_parameters() if ".mlp." in name and ".base." not in name)
    assert size < added + 4096


def test_after_a_review_routers_and_classifiers_are_enough(tmp_path):
    first = disturb(expanded())
    save_delta(first, tmp_path / "stage1")
    second = apply_delta(dense(), tmp_path / "stage1")
    add_classifiers(second, [2], threshold=0.6)
    with torch.no_grad():
        for layer in routed_layers(second).values():
            layer.router.weight.add_(0.1)
    save_delta(second, tmp_path / "stage2", experts=False)
    again = apply_delta(apply_delta(dense(), tmp_path / "stage1"), tmp_path / "stage2")
    assert torch.equal(logits(again.eval()), logits(second.eval()))
    assert (tmp_path / "stage2" / "layer_moe.safetensors").stat().st_size < 4096
    with pytest.raises(ValueError, match=r"routers and classifiers only.*\[3, 1, 2\] experts per layer"):
        apply_delta(dense(), tmp_path / "stage2")
    with pytest.raises(ValueError, match="for other experts"):
        apply_delta(disturb(expanded(), seed=9), tmp_path / "stage2")


def test_a_delta_knows_its_base_and_the_order_of_groups(tmp_path):
    save_delta(learned(), tmp_path / "delta")
    with pytest.raises(ValueError, match="another dense model"):
        apply_delta(dense(seed=1), tmp_path / "delta")
    other = dense()
    expand(other, dense_plan(other).with_group("second", ["hi"], [2, 2, 2]))
    with pytest.raises(ValueError, match="groups original, first, but the model was expanded with original, second"):
        apply_delta(other, tmp_path / "delta")
    with pytest.raises(ValueError, match="for 3 layers, but LlamaForCausalLM has 2"):
        apply_delta(dense(layers=2), tmp_path / "delta")
    with pytest.raises(FileNotFoundError, match="no saved expansion"):
        apply_delta(dense(), tmp_path)
    with pytest.raises(ValueError, match="is dense"):
        save_delta(dense(), tmp_path / "nothing")


@pytest.mark.parametrize("lacking", ["layers.2.router.weight", "layers.0.experts.1.out_proj_bias"])
def test_a_delta_that_lacks_tensors_changes_nothing(lacking, tmp_path):
    from safetensors.torch import load_file, save_file

    save_delta(learned("gpt2"), tmp_path / "delta")
    file = tmp_path / "delta" / "layer_moe.safetensors"
    tensors = load_file(file)
    del tensors[lacking]
    save_file(tensors, file, {"experts": ""})
    model = dense("gpt2")
    with pytest.raises(ValueError, match=rf"lacks 1 of its plan's tensors, e.g. {lacking}"):
        apply_delta(model, tmp_path / "delta")
    assert plan_of(model) is None and not routed_layers(model)
