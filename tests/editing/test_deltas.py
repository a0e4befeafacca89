"""Edits as files: what comes back, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_llm.editing.deltas import EditSet, WeightEdit, base_digest
from lit_llm.editing.edit_cache import CachedEdit, EditCache
from lit_llm.editing.edit_stack import EditStack
from lit_llm.editing.fact_text import FactText
from lit_llm.editing.passes import run
from lit_llm.editing.rows import padded
from lit_llm.editing.triggers import Trigger
from tests import tiny
from tests.editing import models
from tests.editing.some_edits import cached, dense, fact, low_rank


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
from lit_llm.editing.deltas import EditSet, base_digest
from lit_llm.editing.edit_cache import EditCache
from lit_llm.editing.edit_stack import EditStack
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


def test_edits_that_stay_apart_may_contradict_each_other_also_after_they_were_read():
    edits = EditSet("base", [low_rank("a", subject="France")], apart=True)
    assert edits.contradiction() is None
    edits.add(low_rank("b", subject="France", target="Nice"))
    for found in (edits, edits.copy(), EditSet.from_state(edits.state())):
        assert [edit.fact.id for edit in found.contradiction()] == ["b", "a"]
    copied = edits.copy()
    copied.remove("a")
    assert len(edits) == 2 and copied.contradiction() is None


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


def test_cached_values_in_other_layers_are_refused_for_two_edits_could_act_at_once():
    one, other = cached("a"), cached("b")
    other = CachedEdit(other.fact, {2: other.neurons[2]}, {2: other.values[2]}, "lookup")
    edits = EditSet("base", [one, low_rank("c", layers=(3,))])
    with pytest.raises(ValueError, match=r"'b' is in the layers \[2\].*'a', are in \[1, 2\]"):
        edits.add(other)
    edits.add(CachedEdit(one.fact, other.neurons, other.values), replace=True)
    assert [edit.layers for edit in edits.cached] == [[2]]


def test_removing_takes_out_one_or_all_and_knows_the_names():
    edits = EditSet("base", [low_rank("a"), cached("b"), low_rank("c")])
    assert [edit.fact.id for edit in edits.remove("b")] == ["b"]
    assert [edit.fact.id for edit in edits.remove()] == ["a", "c"] and len(edits) == 0
    with pytest.raises(ValueError, match="no edit 'x'; there are none"):
        edits.remove("x")


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
