"""A small world that a tiny model learns by heart in seconds: facts in two languages, three wordings of each question.

A question is four tokens: wording, relation, entity, end; the answer is one token. Half of the entities have one name in
both languages. Every language has answers of its own.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.rows import Row
from lit_llm.losses.head import Head

ENTITIES, RELATIONS, LANGUAGES, WORDINGS, ANSWERS = 12, 2, 2, 3, 6
_AT = {"wording": 3, "relation": 9, "entity": 13, "end": 37, "answer": 39}
VOCABULARY = 39 + LANGUAGES * RELATIONS * ANSWERS


def question(entity: int, relation: int, language: int, wording: int) -> Row:
    """The lookup position is the entity's."""
    shared = entity < ENTITIES // 2
    tokens = (
        _AT["wording"] + language * WORDINGS + wording,
        _AT["relation"] + language * RELATIONS + relation,
        _AT["entity"] + entity + (0 if shared else language * ENTITIES),
        _AT["end"] + language,
    )
    return Row(tokens, 2)


def answer(which: int, relation: int, language: int) -> int:
    return _AT["answer"] + (language * RELATIONS + relation) * ANSWERS + which


def true_answer(entity: int, relation: int) -> int:
    return (entity * 5 + relation * 3 + entity // 5) % ANSWERS


def every_question() -> list[tuple[int, int, int, int]]:
    spans = (ENTITIES, RELATIONS, LANGUAGES, WORDINGS)
    return [tuple(place.tolist()) for place in torch.cartesian_prod(*(torch.arange(n) for n in spans))]


def learned(steps: int = 150, seed: int = 0) -> tuple[FeedForwards, Head]:
    """A model that knows every answer.

    Raises:
        AssertionError: it has not learned them.
    """
    from tests import tiny

    config = tiny.tiny_config("llama", vocab_size=VOCABULARY, hidden_size=48, layers=4, intermediate_size=96)
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    places = every_question()
    ids = torch.tensor([question(*place).prompt for place in places])
    wanted = torch.tensor([answer(true_answer(e, r), r, lang) for e, r, lang, _ in places])
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(steps):
        loss = cross_entropy(model(input_ids=ids).logits[:, -1], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        assert (model(input_ids=ids).logits[:, -1].argmax(-1) == wanted).all(), f"not learned, loss {loss.item():.3f}"
    return FeedForwards(model), Head(model.get_output_embeddings().weight.detach())
