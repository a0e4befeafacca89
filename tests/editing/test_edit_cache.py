"""Cached values act where a text is about them, and nowhere else, bit for bit."""

from __future__ import annotations

import pytest
import torch

from lit_llm.editing.edit_cache import CachedEdit, EditCache, FactText, relation_vectors
from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.passes import run
from lit_llm.editing.rows import Row, padded
from lit_llm.editing.triggers import SubjectIndex, Trigger, decoded, mentioned_tokens
from lit_llm.models import generation
from tests import tiny
from tests.editing import models

LAYERS = [1, 2]
BY_NAME = Trigger(scope="subject")
QUESTION, OTHER = "What is the capital of France?", "The cat sat on the mat"


def edit(name: str = "france", subject: str = "France", *, apply: str = "tail", width: int = 40, seed: int = 0, **more):
    fact = FactText(name, {"en": subject}, {"en": QUESTION}, {"en": "Lyon"}, "capital")
    chosen = models.neurons(1, LAYERS, width, seed=seed)[0]
    generator = torch.Generator().manual_seed(seed)
    values = {layer: 2 * torch.randn(len(chosen[layer]), generator=generator) for layer in LAYERS}
    return CachedEdit(fact, chosen, values, apply, **more)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.byte_level_tokenizer()


def body_of(family: str = "llama"):
    return models.body_and_head(family, vocab_size=tiny.VOCABULARY_SIZE, eos_token_id=None)[0]


def ids(tokenizer, *texts: str) -> list[list[int]]:
    return [tokenizer.encode(text) for text in texts]


def edited_by_hand(body, tokens: list[int], one: CachedEdit, lookup: int, end: int):
    def add(layer):
        def change(h):
            changed = h.clone()
            changed[lookup:end, one.neurons[layer]] += one.values[layer]
            return changed

        return change

    with torch.no_grad(), body.at_inputs({layer: add(layer) for layer in LAYERS}):
        return run(body, padded([tokens]))[0]


def subject_last(tokenizer, text: str, subject: str = "France") -> int:
    """The last token whose span begins before the subject's end."""
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    end = text.index(subject) + len(subject)
    return max(number for number, (start, _) in enumerate(spans) if start < end)


@pytest.mark.parametrize("family", models.EVERY)
def test_nothing_changes_bit_for_bit_unless_the_text_is_about_an_edit(family, tokenizer):
    body = body_of(family)
    prompts = ids(tokenizer, OTHER, "Café naïve déjà vu")
    for side in ("left", "right"):
        grid = padded(prompts, side=side)
        with torch.no_grad():
            plain = run(body, grid)
            with EditCache(body, tokenizer, [], BY_NAME).active():
                assert torch.equal(run(body, grid), plain)
            cache = EditCache(body, tokenizer, [edit(width=body.width)], BY_NAME)
            with cache.active():
                assert torch.equal(run(body, grid), plain)
            assert [firing.edit for firing in cache.firings] == [None, None]
            assert torch.equal(run(body, grid), plain)


@pytest.mark.parametrize("family", models.EVERY)
def test_only_the_row_that_is_about_the_edit_changes(family, tokenizer):
    body, one = body_of(family), None
    one = edit(width=body.width)
    prompts = ids(tokenizer, OTHER, QUESTION)
    with torch.no_grad():
        grid = padded(prompts, side="left")
        plain = run(body, grid)
        cache = EditCache(body, tokenizer, [one], BY_NAME)
        with cache.active():
            found = run(body, grid)
    assert torch.equal(found[0], plain[0])
    assert [firing.edit for firing in cache.firings] == [None, "france"]
    wanted = edited_by_hand(body, prompts[1], one, subject_last(tokenizer, QUESTION), len(prompts[1]))
    real = grid.mask()[1].bool()
    torch.testing.assert_close(found[1][real], wanted, atol=2e-4, rtol=1e-3)
    assert (wanted - plain[1][real]).abs().max() > 1e-2


@pytest.mark.parametrize("apply", ["tail", "lookup", "prompt_last"])
def test_values_are_added_where_the_edit_says(apply, tokenizer):
    body, one = body_of(), edit(apply=apply)
    (tokens,) = ids(tokenizer, QUESTION + " It is Lyon, they")
    prompt = len(tokenizer.encode(QUESTION))
    lookup = subject_last(tokenizer, QUESTION)
    start, end = {"tail": (lookup, len(tokens)), "lookup": (lookup, lookup + 1), "prompt_last": (prompt - 1, prompt)}[
        apply
    ]
    with torch.no_grad(), EditCache(body, tokenizer, [one], BY_NAME).active(prompt_lengths=[prompt]):
        found = run(body, padded([tokens]))[0]
    torch.testing.assert_close(found, edited_by_hand(body, tokens, one, start, end), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("apply", ["tail", "lookup"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_generation_with_kept_keys_is_generation_by_whole_passes(family, apply, tokenizer):
    body = body_of(family)
    one = edit(apply=apply, width=body.width)
    prompts = ids(tokenizer, QUESTION, OTHER)
    cache = EditCache(body, tokenizer, [one], BY_NAME)
    head = body.transformer.get_output_embeddings()
    softcap = getattr(body.transformer.config, "final_logit_softcapping", None)
    assert softcap is None
    with cache.active():
        found = generation.generate(body.transformer, tokenizer, prompts, generation.Sampling(6), 2)
    for number, prompt in enumerate(prompts):
        tokens, length = list(prompt), len(prompt)
        for _ in range(6):
            if number == 0:
                lookup = subject_last(tokenizer, QUESTION)
                hidden = edited_by_hand(body, tokens, one, lookup, len(tokens) if apply == "tail" else lookup + 1)
            else:
                with torch.no_grad():
                    hidden = run(body, padded([tokens]))[0]
            tokens.append(head(hidden[-1]).argmax().item())
        wanted = tokens[length:]
        assert found[number] == wanted[: len(found[number])] and found[number]
    plain = generation.generate(body.transformer, tokenizer, prompts, generation.Sampling(6), 2)
    assert plain[1] == found[1]


def test_a_question_of_another_relation_about_the_same_subject_is_left_alone(tokenizer):
    body = body_of()
    texts = [QUESTION, "Name the capital of France, please!", "The capital city of France is?"]
    rows = [Row(tokenizer.encode(text), subject_last(tokenizer, text)) for text in texts]
    starts = [row.lookup for row in rows]
    vectors = relation_vectors(body, rows, starts, LAYERS[0])
    stored = edit(relation_Kd=vectors, relation_threshold=0.999)
    cache = EditCache(body, tokenizer, [stored])
    far = "def add(a, b): France = a + b; return a + b + b + b"
    grid = padded(ids(tokenizer, QUESTION, far), side="left")
    with torch.no_grad():
        plain = run(body, grid)
        with cache.active():
            found = run(body, grid)
    asked, other = cache.firings
    assert asked.edit == "france" and asked.cosine == pytest.approx(1.0, abs=0.05)
    assert other.edit is None and other.mention is not None and other.cosine < asked.cosine
    assert torch.equal(found[1], plain[1]) and not torch.equal(found[0], plain[0])


@pytest.mark.parametrize("trigger", [None, BY_NAME])
def test_of_several_edits_of_one_subject_the_nearest_relation_acts(tokenizer, trigger):
    body = body_of()
    texts = {"capital": QUESTION, "colour": "### Instruction:\nName three colours of France"}
    edits = []
    for number, (relation, text) in enumerate(texts.items()):
        row = Row(tokenizer.encode(text), subject_last(tokenizer, text))
        vectors = relation_vectors(body, [row], [row.lookup], LAYERS[0])
        edits.append(edit(relation, seed=number, relation_Kd=vectors, relation_threshold=0.5))
    cache = EditCache(body, tokenizer, edits, trigger)
    with torch.no_grad(), cache.active():
        for relation, text in texts.items():
            run(body, padded(ids(tokenizer, text)))
            assert cache.firings[0].edit == relation


def test_of_edits_of_one_subject_at_most_one_acts_whatever_their_triggers_are(tokenizer):
    body = body_of()
    row = Row(tokenizer.encode(QUESTION), subject_last(tokenizer, QUESTION))
    vectors = relation_vectors(body, [row], [row.lookup], LAYERS[0])
    by_subject = edit("colour", seed=1, relation_Kd=-vectors)
    far, near = (edit(seed=0, relation_Kd=vectors, relation_threshold=needed) for needed in (1.5, 0.5))
    for other, acting in ((near, "france"), (far, None)):
        cache = EditCache(body, tokenizer, [by_subject, other])
        with torch.no_grad(), cache.active():
            run(body, padded(ids(tokenizer, QUESTION)))
        assert cache.firings[0].edit == acting
    cache = EditCache(body, tokenizer, [edit("older"), edit("newer", seed=2)])
    with torch.no_grad(), cache.active():
        run(body, padded(ids(tokenizer, QUESTION)))
    assert cache.firings[0].edit == "newer", "without vectors the newest acts"


def test_special_tokens_do_not_count_for_the_relation(tokenizer):
    model = models.transformer("llama", vocab_size=tiny.VOCABULARY_SIZE, eos_token_id=None)
    special = tokenizer.all_special_ids
    with torch.no_grad():
        model.get_input_embeddings().weight[special] = 1.0  # the row of padding is 0 in a random model
    body = FeedForwards(model)
    prompt = (special[0], *tokenizer.encode(QUESTION))
    mention = SubjectIndex({"france": ["France"]}).find(decoded(tokenizer, prompt))
    first, last = mentioned_tokens(tokenizer, prompt, mention)
    row = Row(prompt, last)
    cosines = []
    for left_out in (special, ()):
        vectors = relation_vectors(body, [row], [first], LAYERS[0], left_out)
        cache = EditCache(body, tokenizer, [edit(relation_Kd=vectors, relation_threshold=-1.0)])
        with torch.no_grad(), cache.active():
            run(body, padded([row.prompt]))
        cosines.append(cache.firings[0].cosine)
    assert cosines[0] == pytest.approx(1.0, abs=1e-4) and cosines[1] < cosines[0]


def test_an_edit_chosen_from_outside_acts_whatever_the_text_says(tokenizer):
    body, one = body_of(), edit()
    cache = EditCache(body, tokenizer, [one, edit("spain", "Spain", seed=1)], BY_NAME)
    prompts = ids(tokenizer, OTHER, QUESTION, QUESTION)
    grid = padded(prompts, side="left")
    with torch.no_grad():
        plain = run(body, grid)
        with cache.active(chosen=["france", "france", None]):
            found = run(body, grid)
    last = len(prompts[0])
    wanted = edited_by_hand(body, prompts[0], one, last - 1, last)
    torch.testing.assert_close(found[0][-last:], wanted, atol=1e-5, rtol=1e-4)
    lookup = subject_last(tokenizer, QUESTION)
    wanted = edited_by_hand(body, prompts[1], one, lookup, len(prompts[1]))
    torch.testing.assert_close(found[1][-len(prompts[1]) :], wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(found[2], plain[2])
    with pytest.raises(ValueError, match="no edits.*italy"), cache.active(chosen=["italy"]):
        pass


def test_a_disabled_edit_does_not_act_for_the_while(tokenizer):
    body = body_of()
    cache = EditCache(body, tokenizer, [edit(), edit("spain", "Spain", seed=1)], BY_NAME)
    grid = padded(ids(tokenizer, QUESTION))
    with torch.no_grad():
        plain = run(body, grid)
        with cache.active():
            acting = run(body, grid)
            with cache.disabled("france"):
                assert torch.equal(run(body, grid), plain)
            assert torch.equal(run(body, grid), acting) and not torch.equal(acting, plain)
            with cache.disabled("france", "spain"):
                assert torch.equal(run(body, grid), plain)
    with pytest.raises(ValueError, match="no edits.*italy"), cache.disabled("italy"):
        pass


def test_hooks_are_gone_afterwards_also_after_an_error(tokenizer):
    body = body_of()
    with pytest.raises(RuntimeError), EditCache(body, tokenizer, [edit()], BY_NAME).active():
        raise RuntimeError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in body.transformer.modules())


def test_the_last_token_of_a_character_of_several_tokens_is_where_a_subject_ends(tokenizer):
    body, text = body_of(), "Где 世界 🙂🙂?"
    one = edit(subject="世界")
    tokens = tokenizer.encode(text)
    cache = EditCache(body, tokenizer, [one], BY_NAME)
    with torch.no_grad(), cache.active():
        found = run(body, padded([tokens]))[0]
    lookup = next(n for n in range(len(tokens)) if tokenizer.decode(tokens[: n + 1]).startswith("Где 世界"))
    wanted = edited_by_hand(body, tokens, one, lookup, len(tokens))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_embeddings_and_foreign_keys_are_refused(tokenizer):
    body = body_of()
    cache = EditCache(body, tokenizer, [edit()], BY_NAME)
    embedded = torch.zeros(1, 3, 24)
    with torch.no_grad(), cache.active(), pytest.raises(ValueError, match="Pass input_ids"):
        body.transformer(inputs_embeds=embedded)
    with torch.no_grad():
        kept = body.transformer(input_ids=torch.ones(1, 3, dtype=torch.int64), use_cache=True).past_key_values
        with cache.active(), pytest.raises(ValueError, match="Run the prompts again"):
            body.transformer(input_ids=torch.ones(1, 1, dtype=torch.int64), past_key_values=kept)


def test_edits_that_do_not_fit_are_refused(tokenizer):
    body = body_of()
    with pytest.raises(ValueError, match="belongs to another model"):
        EditCache(body, tokenizer, [edit(width=90, seed=3)], BY_NAME)
    with pytest.raises(ValueError, match="different ids"):
        EditCache(body, tokenizer, [edit(), edit()], BY_NAME)
    with pytest.raises(ValueError, match="as 0.500, but was stored without their hidden states"):
        EditCache(body, tokenizer, [edit(relation_threshold=0.5)])
    elsewhere = edit("spain")
    elsewhere = CachedEdit(elsewhere.fact, {1: elsewhere.neurons[1]}, {1: elsewhere.values[1]})
    with pytest.raises(ValueError, match=r"same layers, but these are in \[\[1\], \[1, 2\]\]"):
        EditCache(body, tokenizer, [edit(), elsewhere], BY_NAME)
