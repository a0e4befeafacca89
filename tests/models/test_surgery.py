"""Expanding decoders of every tested family, growing them again, and what trains in which stage."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_llm.models.adapters import Lora, with_adapters
from lit_llm.models.expansion_plan import ClassifierPlan, ExpansionPlan
from lit_llm.models.experts import RoutedMLP, collect_routing
from lit_llm.models.surgery import (
    add_classifiers,
    base_fingerprint,
    base_parameters,
    dense_plan,
    expand,
    plan_of,
    routed_layers,
    set_trainable,
)
from tests.tiny import tiny_config

FAMILIES = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
VOCABULARY = 97


def dense(family="llama", layers=3, seed=0, dtype=torch.float32, **settings):
    config = tiny_config(family, vocab_size=VOCABULARY, layers=layers, **settings)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def expanded(family="llama", experts=(3, 1, 2), **settings):
    model = dense(family, **settings)
    return expand(model, dense_plan(model, languages=["en"]).with_group("first", ["el", "hu"], list(experts)))


def grown(seed=0, router_init="fresh"):
    model = expanded()
    disturb(model)
    add_classifiers(model, [0])
    return expand(model, plan_of(model).with_group("second", ["hi"], [2, 2, 1]), seed, router_init)


def disturb(model, seed=1):
    """As if it had been trained: experts, routers and classifiers are no longer what they were."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for routed in routed_layers(model).values():
            for name, parameter in routed.named_parameters():
                if not name.startswith("base."):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ids(rows=3, length=19):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))


# --------------------------------------------------------------------- step 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_expanded_model_starts_with_the_logits_of_the_dense_one_bit_for_bit(family, dtype):
    model = dense(family, dtype=dtype)
    mask = torch.ones(3, 19, dtype=torch.long)
    mask[1, 11:] = 0
    with torch.no_grad():
        before = [model(ids()).logits, model(ids(1, 1)).logits, model(ids(), attention_mask=mask).logits]
    text = model.generate(ids(2, 5), max_new_tokens=8, do_sample=False)
    expand(model, dense_plan(model).with_group("first", ["el"], [3, 1, 2]))
    assert [type(layer) for layer in routed_layers(model).values()] == [RoutedMLP, RoutedMLP]
    with torch.no_grad():
        after = [model(ids()).logits, model(ids(1, 1)).logits, model(ids(), attention_mask=mask).logits]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, before))
    assert torch.equal(model.generate(ids(2, 5), max_new_tokens=8, do_sample=False), text)

    set_trainable(model, 1)
    training = model(ids())
    assert torch.equal(training.logits, before[0])
    training.logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expanded_model_computes_another_function_once_it_has_learned(family):
    model = expanded(family)
    before = model(ids()).logits
    set_trainable(model, 1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    model(ids(), labels=ids()).loss.backward()
    optimizer.step()
    assert not torch.allclose(model(ids()).logits, before, atol=1e-5)


# ---------------------------------------------------------------- what trains


def test_the_first_stage_trains_the_newest_experts_and_all_routers():
    assert set_trainable(expanded(), 1) == [
        "model.layers.0.mlp.experts.1.gate_up_proj",
        "model.layers.0.mlp.experts.1.down_proj",
        "model.layers.0.mlp.router.weight",
        "model.layers.2.mlp.experts.1.gate_up_proj",
        "model.layers.2.mlp.experts.1.down_proj",
        "model.layers.2.mlp.router.weight",
    ]
    assert set_trainable(grown(), 1) == [
        "model.layers.0.mlp.experts.2.gate_up_proj",
        "model.layers.0.mlp.experts.2.down_proj",
        "model.layers.0.mlp.router.weight",
        "model.layers.1.mlp.experts.2.gate_up_proj",
        "model.layers.1.mlp.experts.2.down_proj",
        "model.layers.1.mlp.router.weight",
        "model.layers.2.mlp.router.weight",
    ]


def test_the_review_stage_trains_routers_and_classifiers():
    model = grown()
    add_classifiers(model, [1])
    assert set_trainable(model, 2) == [
        "model.layers.0.mlp.router.weight",
        "model.layers.1.mlp.router.weight",
        "model.layers.1.mlp.classifier.weight",
        "model.layers.2.mlp.router.weight",
    ]


@pytest.mark.parametrize("stage", [1, 2])
def test_what_is_frozen_does_not_move_by_one_bit_and_what_trains_moves(stage):
    model = grown().train()
    add_classifiers(model, [1], gate="label")
    names = set(set_trainable(model, stage))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    for _ in range(2):
        labels = torch.randint(0, 3, (3, 19))
        with collect_routing(model, token_labels=labels) as records:
            loss = model(ids(), labels=ids()).loss
        loss = loss + torch.nn.functional.cross_entropy(records[1].classifier_logits, (labels.flatten() > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == names


def test_a_dense_model_has_nothing_to_train_in_a_stage():
    model = dense()
    with pytest.raises(ValueError, match="LlamaForCausalLM is dense.*Expand it first"):
        set_trainable(model, 1)
    with pytest.raises(ValueError, match="is dense"):
        add_classifiers(model, [0])
    none_added = expand(model, dense_plan(model).with_group("first", ["el"], [1, 1, 1]))
    with pytest.raises(ValueError, match="no routed layer"):
        set_trainable(none_added, 1)


# --------------------------------------------------------------------- growth


def test_growth_adds_copies_of_the_original_after_the_experts_that_are_there():
    small, large = disturb(expanded()), grown()
    kept, new = dict(small.named_parameters()), dict(large.named_parameters())
    for name, parameter in kept.items():
        if "router" not in name:
            # layers that were dense have their MLP one level deeper now
            place = name if name in new else name.replace(".mlp.", ".mlp.base.")
            assert torch.equal(new[place], parameter), name
    layers = routed_layers(large)
    assert sorted(layers) == [0, 1, 2] and [layers[i].num_experts for i in range(3)] == [4, 2, 2]
    assert all(layers[i].experts["2"].copies(layers[i].base) for i in (0, 1))
    assert (
        list(layers[0].experts) == ["1", "2"] and list(layers[1].experts) == ["2"] and list(layers[2].experts) == ["1"]
    )
    assert all(layer.classifier is None for layer in layers.values())
    assert plan_of(large).expert_counts == [4, 2, 2] and plan_of(large).experts_after_group(0) == [1, 3, 4]


def test_growth_makes_routers_afresh_or_keeps_their_rows():
    old = {i: layer.router.weight.detach().clone() for i, layer in routed_layers(disturb(expanded())).items()}
    fresh, keep = routed_layers(grown()), routed_layers(grown(router_init="keep"))
    assert fresh[0].router.weight.shape == keep[0].router.weight.shape == (4, 32)
    assert (
        torch.equal(keep[0].router.weight[:3], old[0]) and not torch.isclose(fresh[0].router.weight[:3], old[0]).any()
    )
    assert torch.equal(fresh[2].router.weight, old[2])  # nothing was added here
    again, other = routed_layers(grown()), routed_layers(grown(seed=1))
    assert torch.equal(fresh[0].router.weight, again[0].router.weight)
    assert not torch.equal(fresh[0].router.weight, other[0].router.weight)


def test_the_dense_model_inside_is_the_same_at_any_time():
    model = dense()
    names, fingerprint = [name for name, _ in model.named_parameters()], base_fingerprint(model)
    expand(model, dense_plan(model).with_group("first", ["el"], [3, 1, 2]))
    disturb(model)
    assert [name for name, _ in base_parameters(model)] == names and base_fingerprint(model) == fingerprint
    assert plan_of(model).base.fingerprint == fingerprint
    assert base_fingerprint(dense(seed=1)) != fingerprint


def test_the_fingerprint_of_a_checkpoint_does_not_depend_on_the_type_that_it_is_read_in():
    model = dense(dtype=torch.bfloat16)
    narrow = base_fingerprint(model)
    assert base_fingerprint(model.float()) == narrow


def test_classifiers_are_put_where_they_are_wanted_and_nowhere_else():
    model = expanded()
    add_classifiers(model, [0, 2], threshold=0.7)
    first = routed_layers(model)[2].classifier.weight.detach().clone()
    plan = add_classifiers(model, [2], scope="sequence_sum", seed=1)
    layers = routed_layers(model)
    assert layers[0].classifier is None and layers[2].classifier.scope == "sequence_sum"
    assert not torch.equal(layers[2].classifier.weight, first)
    assert plan == plan_of(model) and plan.classifier_layers == [2]
    assert plan.layers[2].classifier == ClassifierPlan("sequence_sum", 0.5)


@pytest.mark.parametrize("change", [disturb, lambda model: model], ids=["later", "at step 0"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_records_of_a_whole_model_come_by_layer(checkpointing, change):
    model = change(expanded()).train()
    set_trainable(model, 1)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with collect_routing(model) as records:
        loss = model(ids(), labels=ids()).loss
    assert sorted(records) == [0, 2] and records[0].router_logits_MN.shape == (57, 3)
    (loss + records[0].router_logits_MN.square().mean()).backward()
    reference = change(expanded()).train()
    set_trainable(reference, 1)
    with collect_routing(reference) as records:
        loss = reference(ids(), labels=ids()).loss
    (loss + records[0].router_logits_MN.square().mean()).backward()
    for ours, theirs in zip(model.parameters(), reference.parameters()):
        assert ours.requires_grad == theirs.requires_grad and (
            not ours.requires_grad or torch.equal(ours.grad, theirs.grad)
        )


# ----------------------------------------------------------------------- plan


def test_a_plan_survives_its_file(tmp_path):
    model = grown()
    plan = add_classifiers(model, [1], threshold=0.6)
    plan.save(tmp_path)
    fields = json.loads((tmp_path / "layer_moe.json").read_text())
    assert ExpansionPlan.load(tmp_path) == plan
    assert [layer["experts"] for layer in fields["layers"]] == [[1, 2, 1], [1, 0, 1], [1, 1, 0]]
    assert fields["layers"][1]["classifier"] == {"scope": "token", "threshold": 0.6}
    assert fields["groups"][2] == {"name": "second", "languages": ["hi"]}
    assert fields["mlp"] == {"kind": "gated", "names": ["gate_proj", "up_proj", "down_proj"]}
    (tmp_path / "layer_moe.json").write_text(json.dumps({**fields, "format_version": 2}))
    with pytest.raises(ValueError, match="format_version 2.*reads 1"):
        ExpansionPlan.load(tmp_path)
    (tmp_path / "layer_moe.json").write_text(json.dumps({**fields, "surprise": 1}))
    with pytest.raises(ValueError, match="surprise"):
        ExpansionPlan.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no layer_moe.json"):
        ExpansionPlan.load(tmp_path / "elsewhere")


def test_a_plan_for_two_groups_is_carried_out_at_once():
    model = dense()
    plan = dense_plan(model).with_group("first", ["el"], [3, 1, 2]).with_group("second", ["hi"], [2, 2, 1])
    expand(model, plan)
    assert [layer.num_experts for layer in routed_layers(model).values()] == [4, 2, 2]
    assert torch.equal(model(ids()).logits, dense()(ids()).logits)


def test_plans_that_contradict_themselves_are_refused_in_words():
    plan = dense_plan(dense())
    with pytest.raises(ValueError, match="has 0 for layer 1.*1 leaves a layer as it is"):
        plan.with_group("first", ["el"], [2, 0, 2])
    with pytest.raises(ValueError, match="has 2 entries, but the model has 3 layers"):
        plan.with_group("first", ["el"], [2, 2])
    first = plan.with_group("first", ["el"], [3, 1, 2])
    with pytest.raises(ValueError, match=r"Layer 1 has a classifier but no added expert.*\[0, 2\]"):
        first.with_classifiers([1])
    with pytest.raises(ValueError, match=r"classifier_layers names \[3\].*0 to 2"):
        first.with_classifiers([0, 3])
    with pytest.raises(ValueError, match="twice: original, first, first"):
        first.with_group("first", ["hu"], [2, 2, 2])
    with pytest.raises(ValueError, match="experts_per_token is 1.*'always'"):
        dense_plan(dense(), experts_per_token=1)
    with pytest.raises(ValueError, match="experts_per_token is 0"):
        dense_plan(dense(), experts_per_token=0)
    fields = first.to_dict()
    fields["layers"][0]["experts"] = [2, 2]
    with pytest.raises(ValueError, match=r"Layer 0 lists the experts \[2, 2\].*so 1"):
        ExpansionPlan.from_dict(fields)
    fields["layers"][0]["experts"] = [1]
    with pytest.raises(ValueError, match="Layer 0 lists experts of 1 groups.*has 2 groups"):
        ExpansionPlan.from_dict(fields)


def test_one_expert_per_token_starts_as_the_dense_model_if_always_renormalised():
    model = dense()
    before = model(ids()).logits
    expand(model, dense_plan(model, experts_per_token=1, renormalise="always").with_group("first", ["el"], [3, 1, 2]))
    assert torch.equal(model(ids()).logits, before)
    disturb(model)
    with collect_routing(model) as records:
        model(ids())
    assert records[0].mixture_MN.max(-1).values.eq(1).all()


# --------------------------------------------------------------------- errors


def test_a_plan_for_another_model_is_refused_before_anything_is_changed():
    plan = dense_plan(dense()).with_group("first", ["el"], [3, 1, 2])
    others = {
        "another dense model: its fingerprint is [0-9a-f]{16}…, that of this one": dense(seed=1),
        "for 3 layers, but LlamaForCausalLM has 4": dense(layers=4),
        "for a llama model of width 32, but this is a qwen2 model of width 32": dense("qwen2"),
        "for a llama model of width 32, but this is a llama model of width 48": dense(hidden_size=48),
    }
    for message, model in others.items():
        with pytest.raises(ValueError, match=message):
            expand(model, plan)
        assert plan_of(model) is None and not routed_layers(model)


def test_a_plan_that_does_not_continue_the_models_own_is_refused():
    model = expanded()
    base = plan_of(model)
    start = dense_plan(dense(), languages=["en"])
    with pytest.raises(ValueError, match="groups original, second, but the model was expanded with original, first"):
        expand(model, start.with_group("second", ["hi"], [2, 2, 2]))
    with pytest.raises(ValueError, match="groups original, second, first.*the order must be the same"):
        expand(model, start.with_group("second", ["hi"], [2, 2, 2]).with_group("first", ["el", "hu"], [3, 1, 2]))
    with pytest.raises(ValueError, match=r"does not continue the model's own, which has \[3, 1, 2\]"):
        expand(model, start.with_group("first", ["el", "hu"], [3, 2, 2]).with_group("second", ["hi"], [2, 2, 2]))
    with pytest.raises(ValueError, match="expanded already"):
        dense_plan(model)
    assert plan_of(model) == base and [layer.num_experts for layer in routed_layers(model).values()] == [3, 2]


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "opt",
            {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32},
            "OPTForCausalLM have no module `mlp`.*self_attn",
        ),
        ("bloom", {"hidden_size": 32}, r"take 2 inputs \(hidden_states, residual\)"),
    ],
)
def test_a_family_without_a_replaceable_mlp_is_refused_in_words(family, settings, message):
    fields = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4, "n_layer": 2, "n_head": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields, **settings))
    with pytest.raises(ValueError, match=message):
        dense_plan(model)


@pytest.mark.parametrize("family", ["phi3", "phi", "gpt_neox", "olmo2", "falcon"])
def test_families_with_other_mlps_are_expanded_too(family):
    fields = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    inner = {} if family == "falcon" else {"intermediate_size": 64, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields, **inner)).eval()
    tokens = torch.randint(1, 50, (2, 9))
    before = model(tokens).logits
    expand(model, dense_plan(model).with_group("first", ["el"], [3, 2]))
    assert torch.equal(model(tokens).logits, before)
    disturb(model)
    assert not torch.allclose(model(tokens).logits, before, atol=1e-4)


def test_adapters_and_unusual_classes_are_refused():
    model = dense()
    plan = dense_plan(model).with_group("first", ["el"], [3, 1, 2])
    with pytest.raises(ValueError, match="has adapters"):
        expand(with_adapters(copy.deepcopy(model), Lora(rank=2)), plan)

    class Mine(type(model)):
        pass

    other = copy.deepcopy(model)
    other.__class__ = Mine
    with pytest.raises(ValueError, match="transformers makes LlamaForCausalLM, but this is a Mine"):
        expand(other, plan)
