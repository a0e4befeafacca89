"""GGUF files become Hugging Face folders with the same weights, tokens and settings."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lit_llm.models.gguf import _byte_level_bpe, convert_gguf, gguf_tokenizer
from tests.models.tiny_gguf import write_gguf
from tests.tiny import SENTENCES, byte_level_tokenizer, sentencepiece_tokenizer, tiny_model_folder

KINDS = {"llama": "llama", "gemma3": "gemma3_text"}


class Keys(dict):
    """The metadata of a file that is not there."""

    def architecture_value(self, key, default=None):
        return self.get(key, default)


@pytest.fixture(scope="module", params=KINDS)
def converted(request, tmp_path_factory):
    """The original folder, its GGUF file, and what became of that."""
    place = tmp_path_factory.mktemp(request.param)
    more = (
        {"tie_word_embeddings": False}
        if request.param == "llama"
        else {"sliding_window": 4, "query_pre_attn_scalar": 8}
    )
    original = tiny_model_folder(place / "original", KINDS[request.param], layers=3, **more)
    write_gguf(original, place / "model.gguf", kind=request.param)
    (place / "made").mkdir()
    convert_gguf(place / "model.gguf", place / "made")
    return original, place / "model.gguf", place / "made"


def test_every_weight_comes_back_bit_for_bit(converted):
    original, _, made = converted
    before = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_logits_come_back_bit_for_bit(converted):
    original, _, made = converted
    ids = torch.arange(5, 25)[None]
    logits = [AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits for folder in (original, made)]
    assert torch.equal(*logits)


def test_weights_are_those_of_transformers_own_conversion(converted):
    _, file, made = converted
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_tokens_come_back(converted):
    original, _, made = converted
    before, after = (PreTrainedTokenizerFast.from_pretrained(folder) for folder in (original, made))
    assert before.get_vocab() == after.get_vocab()
    for text in [*SENTENCES, "<|endoftext|>a<|endoftext|>", " 12  34"]:
        assert before(text)["input_ids"] == after(text)["input_ids"]
        assert after.decode(after(text)["input_ids"]) == text


def test_special_tokens_stand_in_the_tokenizer_and_in_the_generation_settings(converted):
    _, _, made = converted
    tokenizer = PreTrainedTokenizerFast.from_pretrained(made)
    settings = json.loads((made / "generation_config.json").read_text())
    assert tokenizer.eos_token_id == settings["eos_token_id"] == 0
    assert "quantization_config" not in json.loads((made / "config.json").read_text())


def test_the_chat_template_and_a_leading_bos_are_kept(tmp_path):
    original = tiny_model_folder(tmp_path / "original")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    keys = {"tokenizer.chat_template": template, "tokenizer.ggml.add_bos_token": True}
    write_gguf(original, tmp_path / "model.gguf", **keys)
    (tmp_path / "made").mkdir()
    convert_gguf(tmp_path / "model.gguf", tmp_path / "made")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "made")
    assert tokenizer.chat_template == template
    assert tokenizer("cat")["input_ids"][0] == tokenizer.bos_token_id


def test_the_smollm_rule_splits_digits_even_after_spaces():
    plain = byte_level_tokenizer()
    model = json.loads(plain.backend_tokenizer.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "12"]
    merges = [" ".join(merge) for merge in model["merges"]] + ["1 2"]
    keys = Keys({"tokenizer.ggml.merges": merges, "tokenizer.ggml.pre": "smollm"})
    assert _byte_level_bpe(keys, tokens).encode("a 12").tokens == ["a", "Ġ", "1", "2"]
    assert "12" in _byte_level_bpe(Keys(keys | {"tokenizer.ggml.pre": "gpt-2"}), tokens).encode("12").tokens


def test_a_sentencepiece_vocabulary_with_scores_gives_the_same_tokens():
    original = sentencepiece_tokenizer()
    model = json.loads(original.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    rank = {"".join(merge): -float(number) for number, merge in enumerate(model["merges"])}
    kinds = [3 if t in original.all_special_tokens else 6 if t.startswith("<0x") else 1 for t in tokens]
    keys = Keys(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [rank.get(token, -1e9) for token in tokens],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.bos_token_id": original.bos_token_id,
            "tokenizer.ggml.eos_token_id": original.eos_token_id,
            "tokenizer.ggml.unknown_token_id": original.unk_token_id,
            "tokenizer.ggml.padding_token_id": original.pad_token_id,
            "context_length": 64,
        }
    )
    made = gguf_tokenizer(keys)
    for text in SENTENCES:
        assert made(text)["input_ids"] == [original.bos_token_id, *original(text)["input_ids"]]
        assert made.decode(made(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tokenizer.ggml.pre": "llama-bpe"}, "rule 'llama-bpe'"),
        ({"tokenizer.ggml.model": "bert"}, "kind 'bert'"),
        ({"tokenizer.ggml.tokens": None}, "no 'tokenizer.ggml.tokens'"),
        ({"llama.rope.scaling.type": "linear"}, "scaled rotary"),
        ({"llama.rope.dimension_count": 4}, "partly rotary"),
        ({"llama.expert_count": 8}, "experts"),
        ({"llama.block_count": 1}, "unexpected.*layers.1"),
        ({"llama.block_count": 3}, "missing.*layers.2"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_words(tmp_path, keys, words):
    write_gguf(tiny_model_folder(tmp_path / "original"), tmp_path / "model.gguf", **keys)
    with pytest.raises(ValueError, match=words):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "made")


def test_another_architecture_is_named(tmp_path):
    file = write_gguf(tiny_model_folder(tmp_path / "a"), tmp_path / "model.gguf", **{"general.architecture": None})
    data = file.read_bytes().replace(b"llama", b"bloom")
    file.write_bytes(data)
    with pytest.raises(ValueError, match="'bloom'.*llama and gemma3"):
        convert_gguf(file, tmp_path / "made")


@pytest.mark.parametrize("content", [b"", b"not a GGUF file at all", b"GGUF\x03\x00\x00\x00"])
def test_a_file_that_is_not_gguf_is_refused(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="model.gguf"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "made")
