"""ROME, MEMIT, AlphaEdit and written-back values, against dense formulas and against what they are for."""

from __future__ import annotations

import logging

import pytest
import torch

from lit_llm.editing.closed_form import (
    AlphaEdit,
    Bakeable,
    LowRank,
    add_to_weights,
    alphaedit_keys,
    bake,
    free_directions,
    grouped_keys,
    inverse,
    memit,
    memit_keys,
    rome,
    rome_update,
)
from lit_llm.editing.passes import neurons_at
from lit_llm.editing.rows import Row
from lit_llm.editing.values import Request, ValueSettings, optimise_values, outputs_at
from tests.editing import models
from tests.reference import neuron_edit as reference

SETTINGS = ValueSettings(evaluations=8, learning_rate=0.3, clamp=2.0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(width: int = 40, seed: int = 9) -> torch.Tensor:
    samples = random(200, width, seed=seed) * torch.logspace(-2, 0, width, dtype=torch.float64)
    return samples.T @ samples / 200


def requests(count: int, seed: int = 0) -> list[Request]:
    return [
        Request(
            (*fact.rows[:1], *(Row((7, *row.prompt), row.lookup + 1, row.target) for row in fact.rows[:2])),
            fact.essence[0],
        )
        for fact in models.facts(count, seed=seed)
    ]


def alone(request: Request) -> Request:
    """Without other contexts, so that the key is that of the bare prompt."""
    return Request(request.rows[:1], request.essence)


def test_memits_keys_are_those_of_the_dense_inverse():
    K, residual, C = random(40, 6), random(24, 6, seed=1), covariance()
    update = LowRank(residual, memit_keys(C, K, 3.0))
    torch.testing.assert_close(update.dense(), reference.memit_change(K, residual, C, 3.0))
    assert torch.equal(memit_keys(inverse(C), K, 3.0), update.right), "factorised once for many batches"


def test_alphaedits_keys_are_those_of_the_dense_system_with_keys_of_earlier_batches():
    K, earlier, residual = random(40, 5), random(40, 7, seed=2), random(24, 5, seed=1)
    free = free_directions(covariance(), threshold=0.1)
    P, Q = free.projection(), earlier @ earlier.T
    for kept, dense in ((earlier, Q), (K[:, :0], torch.zeros_like(Q))):
        update = LowRank(residual, alphaedit_keys(free, K, kept, 2.0))
        torch.testing.assert_close(update.dense(), reference.alphaedit_change(K, residual, P, dense, 2.0))


def test_romes_change_hits_the_value_on_the_bare_prompt():
    C, W, h = covariance(), random(24, 40), random(40, seed=3)
    k, v = random(40, seed=4) + h, random(24, seed=5)
    update = rome_update(k, C, v, h, W @ h)
    torch.testing.assert_close(update.dense(), reference.rome_change(k, C, v, h, W @ h))
    torch.testing.assert_close((W + update.dense()) @ h, v)
    plain = rome_update(k, None, v, h, W @ h)
    torch.testing.assert_close(plain.right[:, 0], k / k.norm())


def test_a_key_that_is_orthogonal_to_the_prompt_is_refused():
    h = torch.eye(40, dtype=torch.float64)
    with pytest.raises(ValueError, match="along the key's direction"):
        rome_update(h[0], None, random(24), h[1], random(24))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "gptj"])
def test_rome_gives_the_model_the_wanted_output(family):
    body, head = models.body_and_head(family)
    (request,) = requests(1)
    wanted = optimise_values(body, head, [request], 2, "mlp", SETTINGS)
    untouched = {name: value.clone() for name, value in body.transformer.state_dict().items()}
    rome(body, head, request, 2, covariance(), SETTINGS)
    found = outputs_at(body, [request.rows[0]], 2, "mlp")
    torch.testing.assert_close(found, wanted.value_Fd, atol=1e-4, rtol=1e-4)
    changed = {name for name, value in body.transformer.state_dict().items() if not torch.equal(value, untouched[name])}
    assert len(changed) == 1 and next(iter(changed)).endswith(f"{body.family.down}.weight")


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "bloom"])
def test_memit_moves_the_block_outputs_to_the_values(family):
    body, head = models.body_and_head(family)
    batch, layers = [alone(request) for request in requests(3)], [1, 2]
    bare = [request.rows[0] for request in batch]
    wanted = optimise_values(body, head, batch, 2, "block", SETTINGS).value_Fd
    before = outputs_at(body, bare, 2, "block")
    updates = memit(
        body,
        head,
        batch,
        layers,
        {1: 1e-4 * covariance(body.width), 2: 1e-4 * covariance(body.width)},
        SETTINGS,
        covariance_weight=1.0,
    )
    after = outputs_at(body, bare, 2, "block")
    assert ((after - wanted).norm(dim=-1) < 0.1 * (before - wanted).norm(dim=-1)).all()
    assert sorted(updates) == layers and updates[1].left.shape == (24, 3)


def test_the_values_of_a_batch_are_those_of_each_request_alone():
    body, head = models.body_and_head("llama", dtype=torch.float64)
    batch = requests(5)
    for site in ("mlp", "block"):
        together = optimise_values(body, head, batch, 2, site, SETTINGS, max_tokens=30)
        for number, request in enumerate(batch):
            alone = optimise_values(body, head, [request], 2, site, SETTINGS)
            torch.testing.assert_close(together.value_Fd[number], alone.value_Fd[0])
            assert together.updates_F[number] == alone.updates_F[0]


def test_there_is_one_update_less_than_evaluations_and_the_value_stays_in_its_ball():
    body, head = models.body_and_head("llama")
    batch = requests(2)
    found = optimise_values(body, head, batch, 2, "mlp", ValueSettings(evaluations=4, learning_rate=5.0, clamp=0.5))
    assert found.updates_F.tolist() == [3, 3]
    moved = (found.value_Fd - found.start_Fd).norm(dim=-1)
    torch.testing.assert_close(moved, 0.5 * found.start_Fd.norm(dim=-1))
    only = optimise_values(body, head, batch, 2, "mlp", ValueSettings(evaluations=1))
    assert torch.equal(only.value_Fd, only.start_Fd)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_a_norm_after_the_mlp_forbids_spreading_over_layers_but_not_one_layer(family):
    body, head = models.body_and_head(family)
    covariances = {1: 1e-4 * covariance(), 2: 1e-4 * covariance()}
    before = body.weight(1).clone()
    with pytest.raises(ValueError, match=r"norm after its MLP.*\[1, 2\].*one layer"):
        memit(body, head, requests(2), [1, 2], covariances, SETTINGS)
    assert torch.equal(body.weight(1), before)
    batch = [alone(request) for request in requests(2)]
    wanted = optimise_values(body, head, batch, 2, "mlp", SETTINGS).value_Fd
    bare = [request.rows[0] for request in batch]
    start = outputs_at(body, bare, 2, "mlp")
    memit(body, head, batch, [2], covariances, SETTINGS, covariance_weight=1.0)
    moved = outputs_at(body, bare, 2, "mlp")
    assert ((moved - wanted).norm(dim=-1) < 0.1 * (start - wanted).norm(dim=-1)).all()


def test_alphaedit_leaves_what_ordinary_text_uses_alone():
    body, head = models.body_and_head("llama")
    C = covariance()
    sequence = AlphaEdit({2: free_directions(C, threshold=0.05)}, SETTINGS, ridge=1e-3)
    before = body.weight(2).double()
    for number in range(2):
        sequence.edit(body, head, requests(2, seed=number))
    change = body.weight(2).double() - before
    _, vectors = torch.linalg.eigh(C)
    free = sequence.free[2].basis_mU.shape[1]
    assert (change @ vectors[:, free:]).norm() < 1e-5 * change.norm()
    assert sequence.earlier[2].shape == (40, 4) and change.norm() > 0


def test_free_directions_are_refused_where_there_are_none_or_nothing_else():
    C = covariance()
    with pytest.raises(ValueError, match="0 of 40 directions.*moments lie between"):
        free_directions(C, threshold=1e-12)
    with pytest.raises(ValueError, match="40 of 40"):
        free_directions(C, threshold=1e6)
    with pytest.raises(ValueError, match="one of the two"):
        free_directions(C, threshold=0.1, fraction=0.5)
    assert free_directions(C, threshold=None, fraction=0.25).basis_mU.shape == (40, 10)


def test_the_bare_prompt_counts_half_of_a_memit_key_and_a_single_context_all_of_it():
    body, _ = models.body_and_head("llama")
    (request,) = requests(1)
    each = neurons_at(body, [row.bare() for row in request.rows], [1])[1].double()
    keys = grouped_keys(body, [request, Request(request.rows[:1], request.essence)], 1)
    torch.testing.assert_close(keys[:, 0], each[0] / 2 + each[1:].mean(0) / 2)
    torch.testing.assert_close(keys[:, 1], each[0])


@pytest.mark.parametrize("to_the_end", [False, True])
def test_baked_values_come_out_of_the_weights_where_the_cache_would_add_them(to_the_end):
    body, _ = models.body_and_head("llama", dtype=torch.float64)
    rows = tuple(row.bare() for row in models.facts(1)[0].rows)
    (chosen,) = models.neurons(1, [1, 2])
    values = {layer: random(len(chosen[layer]), seed=layer) for layer in chosen}
    places = [Row(r.prompt, at) for r in rows for at in (range(r.lookup, len(r.prompt)) if to_the_end else [r.lookup])]
    added = body.weight(1)[:, chosen[1]].clone() @ values[1]
    keys = neurons_at(body, places, [1])[1]
    before = keys @ body.weight(1).clone().T
    tiny = {1: 1e-12 * torch.eye(40, dtype=torch.float64), 2: 1e-12 * torch.eye(40, dtype=torch.float64)}
    (parts,) = bake(body, [Bakeable(rows, chosen, values, to_the_end)], tiny, covariance_weight=1.0)
    torch.testing.assert_close(keys @ body.weight(1).T, before + added, atol=1e-5, rtol=1e-5)
    assert parts[1].left.shape == (24, len(places))


def test_a_covariance_that_is_not_positive_definite_is_helped_once_and_then_refused(caplog):
    flat = torch.ones(40, 40, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        memit_keys(flat, random(40, 2), 1.0)
    assert "not positive definite" in caplog.text
    with pytest.raises(ValueError, match="more tokens than neurons"):
        memit_keys(flat - 2 * torch.eye(40, dtype=torch.float64), random(40, 2), 1.0)


def test_updates_reach_half_precision_weights_rounded_once():
    body, _ = models.body_and_head("gpt2", dtype=torch.bfloat16)
    update = LowRank(random(24, 2), random(40, 2, seed=1))
    wanted = (body.weight(1).float() + update.dense().float()).bfloat16()
    add_to_weights(body, {1: update})
    assert torch.equal(body.weight(1), wanted)


def test_requests_and_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="bare prompt"):
        Request((), Row((1,), 0))
    with pytest.raises(ValueError, match="no target"):
        Request((Row((1,), 0),), Row((1,), 0))
    with pytest.raises(ValueError, match="evaluations is 0"):
        ValueSettings(evaluations=0)
    body, head = models.body_and_head()
    with pytest.raises(ValueError, match="no request"):
        optimise_values(body, head, [], 1, "mlp", SETTINGS)
