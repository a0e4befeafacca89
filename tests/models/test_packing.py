"""Sequences in one row know nothing of each other, in every supported family and under every kind of attention."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from lit_llm.data.batch import collate_tokens
from lit_llm.models.language_model import LanguageModel, Lora, ModelSpec
from tests.tiny import tiny_model_folder

FAMILIES = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
SEQUENCES = [[*range(5, 15)], [20, 21, 22], [30, 31, 32, 33, 34, 35], [40, 41], [50, 51, 52, 53, 54, 55, 56]]
PROMPTS = [2, 1, 0, 1, 3]
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def settings_of(family: str) -> dict:
    if family == "gpt2":
        return NO_DROPOUT
    if family in ("qwen2", "qwen3"):
        return {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 4}
    return {"sliding_window": 4} if family != "llama" else {}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    family = request.param
    return tiny_model_folder(tmp_path_factory.mktemp(family), family, layers=4, **settings_of(family))


def loaded(folder, attention=None, **settings) -> LanguageModel:
    if attention == "sdpa" and "gemma2" in str(folder):
        pytest.skip("transformers has no sdpa for Gemma 2: it caps attention scores")
    return ModelSpec(source=str(folder), attention=attention, **settings).load().double()


def packed():
    return collate_tokens(SEQUENCES, PROMPTS, 0, [3, 2])


def gradients(model: LanguageModel, hidden_TD: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (hidden_TD * torch.linspace(-1, 1, hidden_TD.numel(), dtype=hidden_TD.dtype).view_as(hidden_TD)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: LanguageModel, tolerance: float) -> None:
    """Packed, in train mode: the hidden states and gradients of each sequence alone."""
    assert model.training
    together = model.hidden(packed())
    alone = torch.cat([model.hidden(collate_tokens([one], [n], 0)) for one, n in zip(SEQUENCES, PROMPTS, strict=True)])
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)
    ours, theirs = gradients(model, together), gradients(model, alone)
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)


# whatever the weights are, eager attention forms its probabilities in float32, and Gemma's norms scale in it
@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-6), ("eager", 1e-4)])
def test_packed_hidden_states_and_gradients_are_those_of_each_sequence_alone(folder, attention, tolerance):
    assert_same(loaded(folder, attention), tolerance)


def test_packing_goes_with_gradient_checkpointing_and_adapters(folder):
    assert_same(loaded(folder, "eager", gradient_checkpointing=True, lora=Lora(rank=2)), 1e-4)


def test_without_positions_the_sequences_of_a_row_would_mix(folder):
    model, batch = loaded(folder), packed()
    batch.position_ids_RL = None
    assert not torch.allclose(model.hidden(batch), model.hidden(packed()), atol=1e-3)


def test_one_sequence_a_row_is_what_it_is_without_packing(folder):
    model = loaded(folder)
    alone, rows = collate_tokens(SEQUENCES, PROMPTS, 0), collate_tokens(SEQUENCES, PROMPTS, 0, [1] * 5)
    torch.testing.assert_close(model.hidden(rows), model.hidden(alone), rtol=2e-5, atol=2e-5)


def test_packing_itself_can_be_checked(folder):
    loaded(folder).check_packing()


def varlen_attention(module, query, key, value, attention_mask, **settings):
    """What flash attention does with packed rows, in plain torch: sequences are told by positions in a single row."""
    assert attention_mask is None and len(query) == 1
    (starts, _), _ = prepare_fa_kwargs_from_position_ids(settings["position_ids"])
    groups, window = query.shape[1] // key.shape[1], settings.get("sliding_window")
    scaling, cap = settings.get("scaling") or query.shape[-1] ** -0.5, settings.get("softcap")
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    pieces = []
    for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        span = slice(start, end)
        scores = query[:, :, span] @ key[:, :, span].mT * scaling
        scores = scores if cap is None else (scores / cap).tanh() * cap
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (distance < 0) | (distance >= (window or end))
        pieces.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value[:, :, span])
    return torch.cat(pieces, 2).transpose(1, 2).contiguous(), None


def test_flash_attention_is_given_one_row_whose_positions_tell_the_sequences(folder):
    AttentionInterface.register("flash_in_plain_torch", varlen_attention)
    AttentionMaskInterface.register("flash_in_plain_torch", flash_attention_mask)
    expected, model = loaded(folder).hidden(packed()), loaded(folder)
    model.transformer.config._attn_implementation = "flash_in_plain_torch"
    torch.testing.assert_close(model.hidden(packed()), expected, rtol=2e-5, atol=2e-5)


def test_a_row_may_be_longer_than_the_table_of_positions_but_a_sequence_may_not(tmp_path):
    model = ModelSpec(source=str(tiny_model_folder(tmp_path, "gpt2", n_positions=16))).load()
    model.hidden(collate_tokens([[5] * 16, [6] * 16], [0, 0], 0, [2]))
    with pytest.raises(ValueError, match="17 tokens.*16 positions"):
        model.hidden(collate_tokens([[5] * 3, [6] * 17], [0, 0], 0, [2]))


SMALL = {"vocab_size": 360, "hidden_size": 16, "num_hidden_layers": 2}


def test_an_architecture_outside_the_tested_ones_is_checked_before_its_first_packed_row(tmp_path):
    tiny_model_folder(tmp_path / "tokenizer")
    config = {"model_type": "olmo2", "num_attention_heads": 2, "intermediate_size": 16, "pad_token_id": 0, **SMALL}
    model = ModelSpec(config=config, tokenizer=str(tmp_path / "tokenizer")).load().double()
    assert_same(model, 1e-9)


def test_an_architecture_that_mixes_the_sequences_of_a_row_is_refused(tmp_path):
    tiny_model_folder(tmp_path / "tokenizer")
    config = {"model_type": "mamba", "state_size": 4, **SMALL}
    model = ModelSpec(config=config, tokenizer=str(tmp_path / "tokenizer")).load()
    model.hidden(collate_tokens(SEQUENCES, PROMPTS, 0))
    with pytest.raises(ValueError, match=r"MambaForCausalLM(.|\n)*pack_to: null"):
        model.hidden(packed())
