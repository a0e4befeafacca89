"""Edits as files: what comes back, what is refused, and a base that is bit for bit what it was."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_llm.editing.closed_form import LowRank
from lit_llm.editing.deltas import EditSet, EditStack, WeightEdit, baked, base_digest, export
from lit_llm.editing.edit_cache import CachedEdit, EditCache, FactText
from lit_llm.editing.fine_tuning import DenseChange
from lit_llm.editing.passes import run
from lit_llm.editing.rows import Row, padded
from lit_llm.editing.triggers import Trigger
from tests import tiny
from tests.editing import models

GRID = padded([(5, 6, 7, 8, 9, 10), (11, 12, 13)])


def fact(name: str, subject: str = "", relation: str | None = "capital", target: str = "Lyon") -> FactText:
    subject = subject or name.title()
    return FactText(name, {"en": subject}, {"en": f"What is the {relation} of {subject}?"}, {"en": target}, relation)


def low_rank(
    name: str, seed: int = 0, layers: tuple[int, ...] = (1, 2), d: int = 24, m: int = 40, **more
) -> WeightEdit:
    generator = torch.Generator().manual_seed(seed)
    changes = {
        layer: LowRank(torch.randn(d, 2, generator=generator).double(), 0.1 * torch.randn(m, 2, generator=generator))
        for layer in layers
    }
    return WeightEdit(fact(name, **more), "memit", changes, {"loss": 0.5})


def dense(name: str, bias: bool) -> WeightEdit:
    generator = torch.Generator().manual_seed(7)
    weight = 0.1 * torch.randn(24, 40, generator=generator)
    return WeightEdit(fact(name), "ft_m", {2: DenseChange(weight, torch.full((24,), 0.3) if bias else None)})


def cached(name: str, **more) -> CachedEdit:
    (chosen,) = models.neurons(1, [1, 2])
    values = {layer: torch.linspace(-3, 3, len(chosen[layer])) for layer in chosen}
    return CachedEdit(fact(name, **more), chosen, values, "lookup", torch.eye(24)[:2], 0.75, {"stop": "loss"})


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


def test_everything_comes_back_from_the_file(tmp_path):
    body, _ = models.body_and_head("gpt2")
    edits = EditSet(base_digest(body), [low_rank("a"), cached("b"), dense("c", bias=True)])
    edits.add(low_rank("d", subject="A", target="Nice"), replace=True)
    edits.save(tmp_path / "edits.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["edits.safetensors"]
    again = EditSet.load(tmp_path / "edits.safetensors", base=base_digest(body))
    assert [edit.fact for edit in again] == [edit.fact for edit in edits]
    assert [edit.fact.id for edit in again] == ["b", "c", "d"]
    assert [edit.fact.id for edit in again.history] == ["a"]
    for old, new in zip(edits.of_weights, again.of_weights, strict=True):
        assert (old.method, old.stats, old.changes.keys()) == (new.method, new.stats, new.changes.keys())
        for layer, change in old.changes.items():
            for one, other in zip(change, new.changes[layer], strict=True):
                assert (one is None and other is None) or torch.equal(one, other)
    (old,), (new,) = edits.cached, again.cached
    assert (old.apply, old.relation_threshold, old.stats) == (new.apply, new.relation_threshold, new.stats)
    for layer in old.layers:
        assert torch.equal(old.neurons[layer], new.neurons[layer]) and torch.equal(old.values[layer], new.values[layer])
    assert torch.equal(old.relation_Kd, new.relation_Kd)


def test_edits_act_in_another_process_as_they_did_here(tmp_path):
    tokenizer, question = tiny.byte_level_tokenizer(), "What is the capital of France?"
    body, _ = models.body_and_head("llama", vocab_size=tiny.VOCABULARY_SIZE)
    folder = tiny.tiny_model_folder(tmp_path / "base", tokenizer=tokenizer)
    body.transformer.save_pretrained(folder)
    edits = EditSet(base_digest(body), [low_rank("a"), cached("france")])
    edits.save(tmp_path / "edits.safetensors")
    EditStack(body).apply(edits.of_weights)
    grid = padded([tokenizer.encode(question)])
    with torch.no_grad(), EditCache(body, tokenizer, edits.cached, Trigger("subject")).active():
        torch.save(run(body, grid), tmp_path / "here.pt")
    code = f"""
import torch, sys
from transformers import AutoModelForCausalLM
from lit_llm.editing.deltas import EditSet, EditStack, base_digest
from lit_llm.editing.edit_cache import EditCache
from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.passes import run
from lit_llm.editing.rows import padded
from lit_llm.editing.triggers import Trigger
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})
body = FeedForwards(AutoModelForCausalLM.from_pretrained({str(folder)!r}).eval())
edits = EditSet.load({str(tmp_path / "edits.safetensors")!r}, base=base_digest(body))
grid = padded([tokenizer.encode({question!r})])
with torch.no_grad():
    plain = run(body, grid)
    stack = EditStack(body)
    stack.apply(edits.of_weights)
    with EditCache(body, tokenizer, edits.cached, Trigger("subject")).active():
        found = run(body, grid)
    stack.undo()
    assert torch.equal(run(body, grid), plain) and not torch.equal(found, plain)
torch.save(found, {str(tmp_path / "there.pt")!r})
"""
    root = Path(__file__).parents[2]
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    here, there = (torch.load(tmp_path / name) for name in ("here.pt", "there.pt"))
    torch.testing.assert_close(there, here, atol=1e-6, rtol=1e-6)


def test_another_base_is_refused_with_both_hashes_unless_cached_values_are_forced(tmp_path):
    body, _ = models.body_and_head()
    other, _ = models.body_and_head(seed=1)
    file = tmp_path / "edits.safetensors"
    EditSet(base_digest(body), [cached("a")]).save(file)
    with pytest.raises(ValueError, match=f"{base_digest(body)}.*{base_digest(other)}.*force"):
        EditSet.load(file, base=base_digest(other))
    assert "a" in EditSet.load(file, base=base_digest(other), force=True)
    EditSet(base_digest(body), [cached("a"), low_rank("b")]).save(file)
    with pytest.raises(ValueError, match="Load the model that was edited"):
        EditSet.load(file, base=base_digest(other), force=True)


def test_an_edit_of_an_edit_is_refused_unless_it_is_asked_for():
    edits = EditSet("base", [low_rank("a", subject="France")])
    with pytest.raises(ValueError, match=r"'France' \(capital\) is edited already, to 'Lyon' \(edit 'a'\).*'Nice'"):
        edits.add(cached("b", subject="FRANCE", target="Nice"))
    assert [edit.fact.id for edit in edits] == ["a"] and not edits.history
    edits.add(cached("currency", subject="France", relation="currency"))
    edits.add(cached("b", subject="france", target="Nice"), replace=True)
    assert [edit.fact.id for edit in edits] == ["currency", "b"]
    assert [edit.fact.id for edit in edits.history] == ["a"]


def test_without_a_relation_the_prompts_tell_whether_two_edits_are_the_same():
    one = FactText("a", {"en": "France"}, {"en": "Capital of France?"}, {"en": "x"})
    same = FactText("b", {"en": "France", "de": "Frankreich"}, {"en": "capital of  France?"}, {"en": "y"})
    other = FactText("c", {"en": "France"}, {"en": "Currency of France?"}, {"en": "z"})
    assert one.is_same_question(same) and not one.is_same_question(other)
    assert not one.is_same_question(FactText("d", {"de": "France"}, {"de": "Hauptstadt von France?"}, {"de": "x"}))


def test_a_subject_that_is_named_in_another_language_is_the_same_subject_whatever_the_id():
    english = FactText("a", {"en": "Germany"}, {"en": "What?"}, {"en": "x"}, "capital", ("Deutschland",))
    german = FactText("b", {"de": "Deutschland"}, {"de": "Was?"}, {"de": "y"}, "Capital", ("germany",))
    only_german = FactText("c", {"de": "DEUTSCHLAND"}, {"de": "Was?"}, {"de": "y"}, "capital")
    assert all(one.is_same_question(german) and german.is_same_question(one) for one in (english, only_german))
    assert not english.is_same_question(FactText("d", {"de": "Deutschland"}, {"de": "Was?"}, {"de": "y"}, "currency"))
    assert not english.is_same_question(FactText("e", {"de": "Österreich"}, {"de": "What?"}, {"de": "y"}, "capital"))
    edits = EditSet("base", [WeightEdit(english, "memit", {})])
    with pytest.raises(ValueError, match=r"'Deutschland' \(Capital\)|'Germany' \(capital\) is edited already"):
        edits.add(WeightEdit(german, "memit", {}))


def test_an_id_that_belongs_to_another_fact_is_refused():
    edits = EditSet("base", [low_rank("a", subject="France")])
    for replace in (False, True):
        with pytest.raises(ValueError, match="belongs to 'France'"):
            edits.add(low_rank("a", subject="Spain"), replace=replace)


def test_removing_takes_out_one_or_all_and_knows_the_names():
    edits = EditSet("base", [low_rank("a"), cached("b"), low_rank("c")])
    assert [edit.fact.id for edit in edits.remove("b")] == ["b"]
    assert [edit.fact.id for edit in edits.remove()] == ["a", "c"] and len(edits) == 0
    with pytest.raises(ValueError, match="no edit 'x'; there are none"):
        edits.remove("x")


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


def test_merged_edits_become_the_base():
    body, _ = models.body_and_head()
    digest, stack = base_digest(body), EditStack(body)
    stack.apply([low_rank("a")])
    stack.merge()
    assert stack.active == [] and base_digest(body) != digest
    merged = base_digest(body)
    stack.apply([low_rank("a")])
    stack.undo()
    assert base_digest(body) == merged


def test_an_exported_folder_holds_the_edited_model_and_memory_the_base(tmp_path):
    from transformers import AutoModelForCausalLM

    from lit_llm.editing.hooks import FeedForwards
    from lit_llm.models.language_model import ModelSpec

    model = ModelSpec(source=str(tiny.tiny_model_folder(tmp_path / "base", layers=3))).load().eval()
    body = FeedForwards(model.transformer)
    digest, stack = base_digest(body), EditStack(body)
    edits = EditSet(digest, [low_rank("a", d=32, m=64), low_rank("b", 1, d=32, m=64)])
    stack.apply([edits.of_weights[0]])
    partly = output(body)
    export(model, stack, edits, tmp_path / "edited")
    assert torch.equal(output(body), partly) and stack.active == ["a"]
    reloaded = FeedForwards(AutoModelForCausalLM.from_pretrained(tmp_path / "edited").eval())
    stack.apply([edits.of_weights[1]])
    assert torch.equal(output(reloaded), output(body)) and not torch.equal(output(body), partly)
    edits.add(cached("c"))
    with pytest.raises(ValueError, match="1 edits are cached values, e.g. 'c'"):
        export(model, stack, edits, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


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
    with pytest.raises(ValueError, match="prompts are missing for \\['b'\\]"):
        baked(body, pair, {"a": rows["a"]}, covariances)
    last = CachedEdit(pair[0].fact, pair[0].neurons, pair[0].values, "prompt_last")
    with pytest.raises(ValueError, match="prompt's last token"):
        baked(body, [last], rows, covariances)


def test_files_that_are_something_else_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match="does not exist"):
        EditSet.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="not a file of edits"):
        EditSet.load(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="format none"):
        EditSet.load(tmp_path / "other.safetensors")


def test_a_cached_fact_is_a_small_file(tmp_path):
    chosen = {layer: torch.arange(100) for layer in range(4, 9)}
    values = {layer: torch.randn(100) for layer in chosen}
    EditSet("0" * 64, [CachedEdit(fact("a"), chosen, values)]).save(tmp_path / "edits.safetensors")
    assert (tmp_path / "edits.safetensors").stat().st_size < 8_000
