"""Generation: what counts, what does not, and what is left as it was."""

import threading
from itertools import pairwise

import pytest
import torch

from lit_llm.models import generation
from lit_llm.models.generation import end_ids
from lit_llm.models.language_model import Lora, ModelSpec
from tests.tiny import byte_level_tokenizer, tiny_model_folder

PROMPTS = [[5, 6, 7, 8, 9, 10], [20, 21], [30, 31, 32], [40], [50, 51, 52, 53]]
STREAM = {"max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("llama"), initializer_range=0.5)


@pytest.fixture
def model(folder):
    return ModelSpec(source=str(folder)).load()


def test_the_settings_of_the_models_own_folder_do_not_count(model):
    before = model.generate(PROMPTS, max_new_tokens=8)
    sampled = model.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=3)
    own = model.transformer.generation_config
    own.repetition_penalty, own.top_k, own.temperature, own.do_sample = 9.0, 1, 0.1, True
    own.suppress_tokens = [answer[0] for answer in before if answer]
    assert model.generate(PROMPTS, max_new_tokens=8) == before
    assert model.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=3) == sampled
    assert model.transformer.generation_config is own


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_answers_come_in_the_order_of_the_prompts_for_any_batch_size(model, batch_size):
    one_by_one = [model.generate([prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    assert model.generate(PROMPTS, max_new_tokens=6, batch_size=batch_size) == one_by_one
    assert len({tuple(answer) for answer in one_by_one}) > 1


def test_no_prompts_give_no_answers(model):
    assert model.generate([], max_new_tokens=4) == []


def test_sampling_among_one_candidate_is_greedy(model):
    greedy = model.generate(PROMPTS, max_new_tokens=6)
    assert model.generate(PROMPTS, max_new_tokens=6, temperature=2.0, top_k=1) == greedy
    assert model.generate(PROMPTS, max_new_tokens=6, temperature=2.0, top_p=1e-6) == greedy
    assert model.generate(PROMPTS, max_new_tokens=6, temperature=2.0) != greedy


def test_repeated_pairs_can_be_forbidden(model):
    with torch.no_grad():  # every token is followed by itself
        model.transformer.lm_head.weight.copy_(model.input_embedding)
        for layer in model.transformer.base_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    (free,) = model.generate([[7, 9]], max_new_tokens=8)
    (limited,) = model.generate([[7, 9]], max_new_tokens=8, no_repeat_ngram_size=2)
    assert free == [9] * 8
    whole = [7, 9, *limited]
    assert len(set(pairwise(whole))) == len(whole) - 1


def test_special_tokens_that_the_folder_names_end_an_answer_and_others_do_not(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    model = ModelSpec(source=str(tiny_model_folder(tmp_path, tokenizer=tokenizer))).load()
    model.transformer.generation_config.eos_token_id = [turn, 77]
    assert end_ids(model.transformer, tokenizer) == {tokenizer.eos_token_id, turn}
    steps = iter([70, 77, turn, 71])

    def dictate(module, inputs, logits):
        return torch.zeros_like(logits).index_fill(-1, torch.tensor([next(steps)]), 9.0)

    model.transformer.lm_head.register_forward_hook(dictate)
    assert model.generate([[5, 6]], max_new_tokens=4) == [[70, 77]]


def test_the_mode_of_every_module_is_left_as_it_was_even_after_an_error(model, monkeypatch):
    model.train()
    model.transformer.lm_head.eval()
    modes = [module.training for module in model.modules()]
    own = model.transformer.generation_config
    model.generate(PROMPTS, max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes
    monkeypatch.setattr(model.transformer, "forward", None)
    with pytest.raises(TypeError):
        model.generate(PROMPTS, max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes
    assert model.transformer.generation_config is own


def test_the_head_gets_dense_inputs_while_generating_and_as_before_afterwards(model):
    dense = []
    model.transformer.lm_head.register_forward_hook(lambda _, inputs, __: dense.append(inputs[0].is_contiguous()))
    model.generate(PROMPTS, max_new_tokens=3, batch_size=5)
    assert dense and all(dense)
    model.transformer(torch.tensor(PROMPTS[:1] * 2), logits_to_keep=1)
    assert not dense[-1]


def test_dropout_is_off_while_generating(tmp_path):
    folder = tiny_model_folder(tmp_path, "gpt2", resid_pdrop=0.9, initializer_range=0.5)
    model = ModelSpec(source=str(folder)).load()
    expected = model.eval().generate(PROMPTS, max_new_tokens=6)
    assert model.train().generate(PROMPTS, max_new_tokens=6) == expected


def test_adapters_take_part_in_generation(folder):
    model = ModelSpec(source=str(folder), lora=Lora(rank=2)).load()
    before = model.generate(PROMPTS, max_new_tokens=6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_()
    assert model.generate(PROMPTS, max_new_tokens=6) != before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size is -2"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_settings_outside_their_range_are_refused(model, settings, words):
    with pytest.raises(ValueError, match=words):
        model.generate(PROMPTS, **({"max_new_tokens": 4} | settings))


def test_an_empty_prompt_is_named_by_its_number(model):
    with pytest.raises(ValueError, match="Prompt 1 has no tokens"):
        model.generate([[5], []], max_new_tokens=4)
    with pytest.raises(ValueError, match="Prompt 0 has no tokens"):
        list(model.stream([], **STREAM))


def test_a_prompt_that_passes_the_table_of_positions_is_refused_with_the_numbers(tmp_path):
    model = ModelSpec(source=str(tiny_model_folder(tmp_path, "gpt2", n_positions=16))).load()
    assert len(model.generate([[5] * 10], max_new_tokens=6)[0]) <= 6
    with pytest.raises(ValueError, match="Prompt 0 has 10 tokens.*7.*16 positions"):
        model.generate([[5] * 10], max_new_tokens=7)


def test_streaming_with_a_seed_leaves_the_global_generator_alone(model):
    settings = STREAM | {"temperature": 1.0, "seed": 5}
    before = torch.get_rng_state()
    text = "".join(model.stream(PROMPTS[0], **settings))
    assert torch.equal(torch.get_rng_state(), before)
    (answer,) = model.generate(PROMPTS[:1], max_new_tokens=8, temperature=1.0, seed=5)
    assert text == model.tokenizer.decode(answer, skip_special_tokens=True)


def test_an_error_while_streaming_reaches_the_reader(model, monkeypatch):
    monkeypatch.setattr(model.transformer, "forward", None)
    with pytest.raises(TypeError):
        list(model.stream(PROMPTS[0], **STREAM))


def test_a_stream_that_is_left_early_stops_working(model):
    steps, end = [], torch.tensor([model.tokenizer.eos_token_id])

    def never_end(module, inputs, logits):
        steps.append(1)
        return logits.index_fill(-1, end, -torch.inf)

    model.transformer.lm_head.register_forward_hook(never_end)
    pieces = model.stream(PROMPTS[0], **(STREAM | {"max_new_tokens": 2000, "temperature": 1.0}))
    next(pieces)
    assert "lit_llm stream" in {thread.name for thread in threading.enumerate()}
    pieces.close()
    assert "lit_llm stream" not in {thread.name for thread in threading.enumerate()}
    assert len(steps) < 2000


@pytest.mark.parametrize("batch_size", [1, 100])
def test_an_answer_ends_where_its_prompt_says_and_the_others_go_on(model, batch_size):
    whole = model.generate(PROMPTS, max_new_tokens=6)
    limits = [1, 6, 3, 2, 9]
    given = generation.generate(
        model.transformer,
        model.tokenizer,
        PROMPTS,
        generation.Sampling(6),
        batch_size,
        model.head.num_rows,
        until=lambda number, new: len(new) >= limits[number],
    )
    assert given == [answer[:limit] for answer, limit in zip(whole, limits, strict=True)]
