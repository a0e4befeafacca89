"""Saved models are plain, whole, and the same; what is frozen or adapted is so in every respect."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_llm.data.batch import collate_tokens
from lit_llm.models.language_model import Frozen, LanguageModel, Lora, ModelSpec
from tests.tiny import tiny_model_folder

IDS = torch.arange(5, 17)[None]


def loaded(folder, **settings) -> LanguageModel:
    return ModelSpec(source=str(folder), **settings).load()


@pytest.fixture(params=["tied", "untied"])
def folder(request, tmp_path):
    return tiny_model_folder(tmp_path / "source", tie_word_embeddings=request.param == "tied")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_saved_model_is_a_plain_folder_with_the_same_bits(folder, tmp_path, dtype):
    model = loaded(folder, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save(tmp_path / "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "source"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert plain.dtype == getattr(torch, dtype)
    live, back = model.transformer.state_dict(), plain.state_dict()
    assert live.keys() == back.keys() and all(torch.equal(live[name], back[name]) for name in live)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer("the cat")["input_ids"] == model.tokenizer("the cat")["input_ids"]
    assert "generation_config.json" in {path.name for path in (tmp_path / "saved").iterdir()}


def test_weights_that_are_not_numbers_are_saved_as_they_are(folder, tmp_path):
    model = loaded(folder)
    with torch.no_grad():
        model.head.weight_VD[3] = float("nan")
    model.save(tmp_path / "saved")
    assert loaded(tmp_path / "saved").head.weight_VD[3].isnan().all()


def test_a_model_that_would_not_come_back_is_not_saved(folder, tmp_path):
    model = loaded(folder)
    model.transformer.extra = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="would not come back.*extra"):
        model.save(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_saving_over_a_model_replaces_it_whole(folder, tmp_path):
    loaded(folder).save(tmp_path / "saved")
    (tmp_path / "saved" / "leftover").touch()
    loaded(folder, keep_layers=[1]).save(tmp_path / "saved")
    assert loaded(tmp_path / "saved").transformer.config.num_hidden_layers == 1
    assert not (tmp_path / "saved" / "leftover").exists()


@pytest.mark.parametrize("settings", [{"temperature": 0.6, "top_p": 0.9}, {"top_k": 5, "do_sample": True}])
def test_generation_settings_that_contradict_themselves_do_not_stop_saving(folder, tmp_path, settings):
    (folder / "generation_config.json").write_text(json.dumps(settings))
    loaded(folder).save(tmp_path / "saved")


def test_a_saved_model_ends_its_answers_where_ours_end(folder, tmp_path):
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 77, "pad_token_id": None}))
    model = loaded(folder)
    model.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == model.tokenizer.eos_token_id == 0
    assert saved["pad_token_id"] == model.tokenizer.pad_token_id


def test_a_cut_may_reorder_layers(folder, tmp_path):
    whole, cut = loaded(folder), loaded(folder, keep_layers=[1, 0])
    cut.save(tmp_path / "saved")
    again = loaded(tmp_path / "saved").transformer.base_model.layers
    for position, layer in enumerate([1, 0]):
        original = whole.transformer.base_model.layers[layer].state_dict()
        assert all(torch.equal(weight, again[position].state_dict()[name]) for name, weight in original.items())


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen3"])
def test_a_cut_takes_the_kinds_of_its_layers_along(family, tmp_path):
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    more = {"use_sliding_window": True, "max_window_layers": 0} if family == "qwen3" else {}
    source = tiny_model_folder(tmp_path / "a", family, layers=4, layer_types=kinds, sliding_window=3, **more)
    cut = loaded(source, keep_layers=[1, 2]).eval()
    assert list(cut.transformer.config.layer_types) == ["full_attention", "sliding_attention"]
    whole = loaded(source).eval()
    by_hand = whole.transformer.base_model
    by_hand.layers = torch.nn.ModuleList([by_hand.layers[1], by_hand.layers[2]])
    by_hand.config.num_hidden_layers, by_hand.config.layer_types = 2, ["full_attention", "sliding_attention"]
    assert torch.equal(cut.transformer(input_ids=IDS).logits, whole.transformer(input_ids=IDS, use_cache=False).logits)
    cut.save(tmp_path / "cut")
    again = loaded(tmp_path / "cut").eval()
    assert torch.equal(again.transformer(input_ids=IDS).logits, cut.transformer(input_ids=IDS).logits)


def test_merging_adapters_for_a_save_leaves_the_live_model_alone(folder, tmp_path):
    model = loaded(folder, lora=Lora(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save(tmp_path / "saved")
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "saved" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["q_proj", "v_porj"], "'v_porj'.*no such layer.*v_proj"),
        (["lm_head"], "'lm_head', the head or the embedding"),
        (["embed_tokens"], "'embed_tokens', the head or the embedding"),
        (["mlp"], "does not fit"),
    ],
)
def test_adapters_where_they_cannot_be_are_refused(tmp_path, names, words):
    folder = tiny_model_folder(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        loaded(folder, lora=Lora(target_modules=names))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_linear_layers_but_the_head_can_be_adapted(family, tmp_path):
    model = loaded(
        tiny_model_folder(tmp_path, family, tie_word_embeddings=False), lora=Lora(target_modules="all-linear")
    )
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    llama = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted == (llama if family == "llama" else {"c_attn", "c_proj", "c_fc"})


@pytest.mark.parametrize("settings", [{"rank": 0}, {"dropout": 1.0}, {"alpha": 0.0}, {"target_modules": []}])
def test_adapter_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=f"lora.{next(iter(settings))}"):
        Lora(**settings)


def test_adapters_train_under_gradient_checkpointing(folder):
    batch = collate_tokens([[5, 6, 7], [8, 9, 10, 11]], [0, 0], pad_id=0)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = loaded(folder, lora=Lora(rank=2), gradient_checkpointing=checkpointing)
        model.hidden(batch).pow(2).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0].values())


def test_a_frozen_model_gives_hidden_states_without_a_graph_and_survives_copying(folder):
    parent = torch.nn.Module()
    parent.teacher, parent.own = Frozen(loaded(folder)), torch.nn.Linear(2, 2)
    assert set(parent.state_dict()) == {"own.weight", "own.bias"}
    assert len(list(parent.parameters())) == 2
    parent.train().requires_grad_(True)
    hidden_TD = parent.teacher.model.hidden(collate_tokens([[5, 6, 7]], [0], pad_id=0))
    assert not hidden_TD.requires_grad
    parent.teacher.model.generate([[5, 6]], max_new_tokens=2)
    assert not parent.teacher.model.training
    other = copy.deepcopy(parent).to(torch.float64)
    assert other.teacher.model.head.weight_VD.dtype == torch.float64
    assert parent.teacher.model.head.weight_VD.dtype == torch.float32
    parent.to("meta")
    assert parent.teacher.model.head.weight_VD.device.type == "meta"
