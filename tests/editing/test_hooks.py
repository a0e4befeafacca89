"""Where the neurons are, in every family; what does not fit is refused in words."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_llm.editing.hooks import FAMILIES, FeedForwards
from lit_llm.editing.passes import neurons_at, run
from lit_llm.editing.rows import Row, padded
from tests.editing import models

ROWS = [Row((5, 6, 7, 8, 9), 3), Row((11, 12), 0), Row((20, 21, 22, 23), 2)]


@pytest.mark.parametrize("family", models.EVERY)
def test_a_value_added_to_a_neuron_adds_its_column_to_the_output(family):
    body, _ = models.body_and_head(family)
    layer, neuron, seen = 2, 7, []
    grid = padded([row.prompt for row in ROWS])

    def add(neurons_Nm):
        changed = neurons_Nm.clone()
        changed[:, neuron] += 0.5
        return changed

    with torch.no_grad():
        with body.at_outputs({layer: seen.append}):
            run(body, grid)
        with body.at_inputs({layer: add}), body.at_outputs({layer: seen.append}):
            run(body, grid)
    plain, changed = (output.view(-1, body.hidden_size) for output in seen)
    torch.testing.assert_close(
        changed - plain, (0.5 * body.weight(layer)[:, neuron]).expand_as(plain), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("family", models.EVERY)
def test_a_hook_that_returns_nothing_changes_no_bit(family):
    body, _ = models.body_and_head(family)
    grid = padded([row.prompt for row in ROWS])
    with torch.no_grad():
        plain = run(body, grid)
        nothing = {layer: lambda values: None for layer in range(body.num_layers)}
        with body.at_inputs(nothing), body.at_outputs(nothing), body.at_block_outputs(nothing):
            assert torch.equal(run(body, grid), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in body.transformer.modules())


@pytest.mark.parametrize("family", models.EVERY)
def test_neurons_are_those_of_each_row_alone_whatever_the_padding(family):
    body, _ = models.body_and_head(family)
    layers = [1, 3]
    together = neurons_at(body, ROWS, layers)
    for side in ("right", "left"):
        grid, seen = padded([row.prompt for row in ROWS], side=side), {}
        with (
            torch.no_grad(),
            body.at_inputs({layer: (lambda h, at=layer, to=seen: to.update({at: h})) for layer in layers}),
        ):
            run(body, grid)
        flat = grid.flat([row.lookup for row in ROWS])
        for layer in layers:
            torch.testing.assert_close(seen[layer][flat], together[layer], atol=1e-5, rtol=1e-4)
    for number, row in enumerate(ROWS):
        alone = neurons_at(body, [row], layers)
        for layer in layers:
            torch.testing.assert_close(alone[layer][0], together[layer][number], atol=1e-5, rtol=1e-4)


def test_positions_are_the_subjects_last_the_prompts_last_and_the_mean_in_between():
    body, _ = models.body_and_head()
    row = ROWS[0]
    each = neurons_at(body, [Row(row.prompt, at) for at in range(5)], [1])[1]
    assert torch.equal(neurons_at(body, [row], [1])[1][0], each[3])
    assert torch.equal(neurons_at(body, [row], [1], position="prompt_last")[1][0], each[4])
    torch.testing.assert_close(neurons_at(body, [row], [1], position="mean")[1][0], each[3:].mean(0))
    with pytest.raises(ValueError, match="subject_last, prompt_last, mean"):
        neurons_at(body, [row], [1], position="first")


def test_orientation_follows_the_class_of_the_module_also_where_it_is_square():
    square = {"n_inner": 24}
    body, _ = models.body_and_head("gpt2", **square)
    assert body.width == body.hidden_size == 24
    assert torch.equal(body.weight(0), body.down(0).weight.T) and body.transposed(0)
    other, _ = models.body_and_head("llama", intermediate_size=24)
    assert torch.equal(other.weight(0), other.down(0).weight) and not other.transposed(0)


def test_the_weight_is_a_view_that_edits_reach():
    body, _ = models.body_and_head("gpt2")
    with torch.no_grad():
        body.weight(1)[3, 5] = 42.0
    assert body.down(1).weight[5, 3].item() == 42.0


def test_an_unknown_family_is_refused_with_the_known_ones():
    model = nn.Module()
    model.config = type("Config", (), {"model_type": "mamba"})()
    with pytest.raises(ValueError, match="'mamba'.*Editable: bloom, gemma.*qwen3"):
        FeedForwards(model)


def test_a_mixture_of_experts_is_refused_with_the_reason():
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model("mixtral", vocab_size=20, num_key_value_heads=2, num_local_experts=2, **sizes)
    with pytest.raises(ValueError, match="mixture of experts.*num_local_experts.*router"):
        FeedForwards(AutoModelForCausalLM.from_config(config))


def test_opt_350m_is_refused_for_what_it_does_before_the_head():
    with pytest.raises(ValueError, match="12 dimensions before the head"):
        FeedForwards(models.transformer("opt", word_embed_proj_dim=12))


def test_adapters_around_a_down_projection_are_refused():
    from lit_llm.models.adapters import Lora, with_adapters

    adapted = with_adapters(models.transformer("llama"), Lora(rank=2, target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="Merge adapters"):
        FeedForwards(adapted.get_base_model())


def test_quantised_weights_are_refused_for_reading_and_say_what_works():
    body, _ = models.body_and_head()
    body.down(0).weight = nn.Parameter(torch.zeros(24, 40, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised \(torch.uint8\).*cache work"):
        body.weight(0)


@pytest.mark.parametrize("layers", [[], [2, 1], [1, 1], [-1, 2], [3, 4]])
def test_layers_that_do_not_ascend_within_the_model_are_refused(layers):
    body, _ = models.body_and_head()
    with pytest.raises(ValueError, match="ascend within 0 to 3"):
        body.check_layers(layers)


def test_default_layers_are_the_published_ones_or_the_same_share_of_the_depth():
    body, _ = models.body_and_head()
    for family, depth, wanted in (
        ("llama", 32, [4, 5, 6, 7, 8]),
        ("gptj", 28, [3, 4, 5, 6, 7, 8]),
        ("gpt2", 48, [13, 14, 15, 16, 17]),
        ("gemma3_text", 18, [3, 4]),
        ("llama", 4, [1]),
        ("llama", 1, [0]),
    ):
        body.transformer.config.model_type = family
        body.blocks = [None] * depth
        assert body.default_layers() == wanted, (family, depth)


def test_values_of_neurons_go_to_the_middle_layers_where_none_are_named():
    body, _ = models.body_and_head()
    for depth, wanted in ((18, range(8, 13)), (32, range(14, 22)), (4, (2, 3)), (2, (1,)), (1, (0,))):
        body.blocks = [None] * depth
        assert body.middle_layers() == list(wanted)


def test_weights_come_back_bit_for_bit_after_they_were_changed_for_a_while():
    for family in ("gpt2", "llama"):
        body, _ = models.body_and_head(family)
        before = [parameter.clone() for parameter in body.down(1).parameters()]
        with pytest.raises(RuntimeError), body.restoring([1]), torch.no_grad():
            body.weight(1).add_(0.1)
            raise RuntimeError
        after = list(body.down(1).parameters())
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_every_family_of_the_table_is_built_here():
    assert set(models.EVERY) == set(FAMILIES) and len(FAMILIES) >= 15
