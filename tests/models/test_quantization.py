"""Quantised bodies: adapters train on them, checkpoints leave them out, and what is saved is a plain model again."""

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_llm.data.batch import collate_tokens
from lit_llm.methods.sft import SFT
from lit_llm.models.language_model import Frozen, LanguageModel, Lora, ModelSpec
from tests.tiny import tiny_model_folder

INSTALLED = find_spec("bitsandbytes") is not None and find_spec("accelerate") is not None
needs_bitsandbytes = pytest.mark.skipif(not INSTALLED, reason="bitsandbytes or accelerate is not installed")
SEQUENCES = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22], [30, 31, 32, 33, 34]]
IDS = torch.tensor(SEQUENCES[:1])
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen2"])
def folder(request, tmp_path_factory):
    more = {"initializer_range": 0.2, **(NO_DROPOUT if request.param == "gpt2" else {})}
    return tiny_model_folder(tmp_path_factory.mktemp(request.param), request.param, hidden_size=64, **more)


@pytest.fixture(params=["nf4", "int8"])
def kind(request) -> str:
    return request.param


def loaded(folder, kind, **settings) -> LanguageModel:
    return ModelSpec(source=str(folder), quantization=kind, **settings).load()


def with_adapters(folder, kind, **settings) -> LanguageModel:
    model = loaded(folder, kind, lora=Lora(rank=2, target_modules="all-linear"), **settings)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.skipif(INSTALLED, reason="bitsandbytes is installed")
def test_without_bitsandbytes_the_error_names_the_package_and_the_command(folder, kind):
    with pytest.raises(ValueError, match=rf"(?s)'{kind}'.*package bitsandbytes.*lit-llm\[quantization\]"):
        loaded(folder, kind)


@needs_bitsandbytes
def test_without_a_device_for_it_the_error_says_so(folder, kind, monkeypatch):
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"hpu"})
    with pytest.raises(ValueError, match=rf"(?s)'{kind}'.*no device of this machine.*CUDA: "):
        loaded(folder, kind)


def test_a_quantised_student_without_adapters_is_refused_with_both_keys(folder, kind):
    with pytest.raises(ValueError, match=rf"student.quantization is '{kind}', but model.student.lora is not set"):
        SFT(ModelSpec(source=str(folder), quantization=kind))


def test_a_random_start_cannot_be_quantised(kind):
    with pytest.raises(ValueError, match=f"`quantization` \\({kind}\\).*`config` is a random start"):
        ModelSpec(config={"model_type": "llama"}, tokenizer="a", quantization=kind)


@needs_bitsandbytes
def test_the_body_is_quantised_and_the_head_and_the_embedding_are_not(folder, kind):
    model = loaded(folder, kind)
    plain = ModelSpec(source=str(folder)).load()
    assert model.head.weight_VD.dtype == torch.float32
    assert torch.equal(model.head.weight_VD, plain.head.weight_VD)
    assert torch.equal(model.input_embedding, plain.input_embedding)
    size = {"nf4": torch.uint8, "int8": torch.int8}[kind]
    assert sum(p.dtype == size for p in model.parameters()) >= 8
    batch = collate_tokens(SEQUENCES, [0, 0, 0], 0)
    ours, theirs = (which.eval().hidden(batch) for which in (model, plain))
    assert 1e-5 < (ours - theirs).abs().mean() < 0.5 * theirs.abs().mean()


@needs_bitsandbytes
def test_only_adapters_get_gradients_with_and_without_checkpointing(folder, kind):
    batch, found = collate_tokens(SEQUENCES, [0, 0, 0], 0), []
    for checkpointing in (False, True):
        model = with_adapters(folder, kind, gradient_checkpointing=checkpointing)
        model.hidden(batch).pow(2).sum().backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert trained and all("lora" in name for name in trained)
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in trained.values())
        found.append(trained)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)


@needs_bitsandbytes
def test_a_state_holds_the_adapters_alone_and_is_loaded_strictly(folder, kind):
    model = with_adapters(folder, kind)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert state and all("lora" in name for name in state)
    fresh = loaded(folder, kind, lora=Lora(rank=2, target_modules="all-linear"))
    parent = torch.nn.ModuleDict({"student": fresh, "other": torch.nn.Linear(2, 2)})
    whole = {f"student.{name}": value for name, value in state.items()} | {
        f"other.{name}": value for name, value in parent["other"].state_dict().items()
    }
    parent.load_state_dict(whole)
    batch = collate_tokens(SEQUENCES, [0, 0, 0], 0)
    assert torch.equal(fresh.eval().hidden(batch), model.eval().hidden(batch))
    with pytest.raises(RuntimeError, match="lora"):
        parent.load_state_dict({name: value for name, value in whole.items() if "lora_A" not in name})


@needs_bitsandbytes
def test_the_saved_folder_is_a_plain_model_that_computes_the_same(folder, kind, tmp_path):
    model = with_adapters(folder, kind).eval()
    batch = collate_tokens(SEQUENCES, [0, 0, 0], 0)
    expected = model.hidden(batch)
    model.save(tmp_path / "saved")
    assert torch.equal(model.hidden(batch), expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert getattr(plain.config, "quantization_config", None) is None and plain.dtype == torch.float32
    again = ModelSpec(source=str(tmp_path / "saved")).load().eval().hidden(batch)
    # int8 rounds its inputs too, the saved weights no longer do
    tolerance = 1e-4 if kind == "nf4" else 0.05 * expected.abs().max().item()
    torch.testing.assert_close(again, expected, rtol=tolerance, atol=tolerance)


@needs_bitsandbytes
def test_a_frozen_teacher_may_be_quantised_without_adapters(folder, kind):
    parent = torch.nn.Module()
    parent.teacher = Frozen(loaded(folder, kind))
    assert not parent.state_dict() and not list(parent.parameters())
    answers = parent.teacher.model.generate(SEQUENCES, max_new_tokens=3)
    assert len(answers) == 3
