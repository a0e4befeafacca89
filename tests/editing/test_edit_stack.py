"""Edits in the weights: undone bit for bit in any order, added up once, made of cached values."""

from __future__ import annotations

import itertools

import pytest
import torch

from lit_llm.editing.closed_form import LowRank
from lit_llm.editing.deltas import WeightEdit, base_digest
from lit_llm.editing.edit_cache import CachedEdit
from lit_llm.editing.edit_stack import EditStack, baked
from lit_llm.editing.passes import run
from lit_llm.editing.rows import Row, padded
from tests.editing import models
from tests.editing.some_edits import cached, dense, fact, low_rank

GRID = padded([(5, 6, 7, 8, 9, 10), (11, 12, 13)])


def output(body) -> torch.Tensor:
    with torch.no_grad():
        return run(body, GRID)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weight_edits_are_undone_in_any_order_bit_for_bit(family, dtype):
    body, _ = models.body_and_head(family, dtype=dtype)
    start, digest = output(body), base_digest(body)
    edits = {edit.fact.id: edit for edit in (low_rank("a"), low_rank("b", 1, (2, 3)), dense("c", family == "gpt2"))}
    alone = {}
    for name, edit in edits.items():
        stack = EditStack(body)
        stack.apply([edit])
        alone[name] = output(body)
        assert not torch.equal(alone[name], start)
        stack.undo(name)
    for order in itertools.permutations(edits):
        stack = EditStack(body)
        stack.apply(list(edits.values()))
        assert stack.active == list(edits)
        stack.undo(order[0])
        stack.undo(order[1])
        assert torch.equal(output(body), alone[order[2]]), "what is left is as if it had been alone"
        stack.undo(order[2])
        assert torch.equal(output(body), start) and base_digest(body) == digest
    stack.apply(list(edits.values()))
    stack.undo()
    assert base_digest(body) == digest and stack.active == []


def test_an_edit_adds_its_product_to_the_weights_outputs_by_inputs():
    for family in ("gpt2", "llama"):
        body, _ = models.body_and_head(family)
        before, edit = body.weight(1).clone(), low_rank("a")
        EditStack(body).apply([edit])
        wanted = before + edit.changes[1].left @ edit.changes[1].right.T
        torch.testing.assert_close(body.weight(1), wanted)


def test_half_precision_weights_are_rounded_once_from_the_sum_of_all_edits():
    body, _ = models.body_and_head(dtype=torch.bfloat16)
    before = body.weight(1).double()
    small = [
        WeightEdit(fact(f"f{n}"), "rome", {1: LowRank(torch.full((24, 1), 1e-4), torch.ones(40, 1))}) for n in range(60)
    ]
    stack = EditStack(body)
    for edit in small:
        stack.apply([edit])
    assert torch.equal(body.weight(1), (before + 60 * torch.tensor(1e-4).double()).bfloat16())
    assert not torch.equal(body.weight(1).double(), before)


def test_all_edits_of_low_rank_are_one_product_and_dense_ones_are_added(monkeypatch):
    body, _ = models.body_and_head("gpt2")
    before, products = body.weight(2).double(), []
    edits = [low_rank("a"), low_rank("b", 1, (2, 3)), dense("c", bias=True)]
    wanted = before + sum(edit.changes[2].dense().double() for edit in edits[:2]) + edits[2].changes[2].weight
    monkeypatch.setattr(LowRank, "dense", lambda change: products.append(change))
    EditStack(body).apply(edits)
    torch.testing.assert_close(body.weight(2), wanted.float(), atol=1e-6, rtol=1e-6)
    assert not products, "no edit was made a matrix of its own"


def test_a_stack_refuses_what_does_not_fit_and_changes_nothing():
    body, _ = models.body_and_head()
    digest, stack = base_digest(body), EditStack(body)
    with pytest.raises(ValueError, match="24 x 50 matrix in layer 1.*24 x 40"):
        stack.apply([low_rank("a"), low_rank("b", m=50)])
    with pytest.raises(ValueError, match="within 0 to 3"):
        stack.apply([low_rank("a", layers=(9,))])
    assert base_digest(body) == digest and stack.active == []
    stack.apply([low_rank("a")])
    with pytest.raises(ValueError, match="active already"):
        stack.apply([low_rank("a")])
    with pytest.raises(ValueError, match="not active; active are a"):
        stack.undo("b")


def test_cached_values_become_a_weight_edit_and_the_model_is_left_alone():
    body, _ = models.body_and_head()
    digest = base_digest(body)
    rows = {"a": [Row((5, 6, 7, 8), 2)], "b": [Row((11, 12, 13), 1), Row((14, 15), 0)]}
    covariances = {layer: 1e-6 * torch.eye(40, dtype=torch.float64) for layer in (1, 2)}
    pair = [cached("a"), cached("b")]
    found = baked(body, pair, rows, covariances, covariance_weight=1.0)
    assert base_digest(body) == digest
    assert [edit.method for edit in found] == ["bake", "bake"]
    assert [edit.changes[1].left.shape[1] for edit in found] == [1, 2]
    with pytest.raises(ValueError, match="none for \\['b'\\]"):
        baked(body, pair, {"a": rows["a"]}, covariances)
    last = CachedEdit(pair[0].fact, pair[0].neurons, pair[0].values, "prompt_last")
    with pytest.raises(ValueError, match="prompt's last token"):
        baked(body, [last], rows, covariances)


def test_edits_in_different_layers_are_written_each_into_its_own():
    body, _ = models.body_and_head()
    rows = {name: [Row((5, 6, 7, 8), 2)] for name in "ab"}
    covariances = {layer: torch.eye(40, dtype=torch.float64) for layer in (1, 2)}
    one, other = cached("a"), cached("b")
    other = CachedEdit(other.fact, {2: other.neurons[2]}, {2: other.values[2]}, "lookup")
    assert [list(edit.changes) for edit in baked(body, [one, other], rows, covariances)] == [[1, 2], [2]]
