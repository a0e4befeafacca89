"""Rows of a head beyond the tokenizer's ids: in no softmax, without gradient, never generated, still saved."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_llm.data.batch import DistillationBatch, collate_tokens
from lit_llm.losses.divergence import Divergence
from lit_llm.methods.dskd import DSKD
from lit_llm.methods.dskd_settings import Projectors
from lit_llm.methods.kd import KD
from lit_llm.methods.sft import SFT
from lit_llm.models.language_model import LanguageModel, ModelSpec
from tests.tiny import tiny_model_folder

TOKENS = 97
IDS = [[5, 6, 7, 8, 9, 96], [20, 21, 22, 90], [30, 95, 32]]


def tokenizer_of(size: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"</s>": 0, **{f"w{i}": i for i in range(1, size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", bos_token="</s>")


def set_rows(folder, rows: int) -> None:
    """Give the embedding and the head of a saved model so many rows; new ones are large, so that they would be seen."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        old = layer.weight.detach()
        new = 3.0 * torch.randn(1, old.shape[1], generator=torch.Generator().manual_seed(5)).repeat(rows, 1)
        new[1::2] *= -1  # so that some always have a large logit
        new[: min(rows, len(old))] = old[:rows]
        layer.weight = torch.nn.Parameter(new)
    model.config.vocab_size = rows
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders by who and how many rows; equal but for the rows beyond 97."""
    found = {}
    for who, family, width, padded, seed in (("student", "gpt2", 16, 100, 1), ("teacher", "llama", 32, 104, 2)):
        for rows in (TOKENS, padded):
            folder = tmp_path_factory.mktemp(f"{who}{rows}")
            dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if family == "gpt2" else {}
            sizes = {"hidden_size": width, "initializer_range": 0.3}
            tiny_model_folder(folder, family, tokenizer_of(TOKENS), seed=seed, **sizes, **dropout)
            set_rows(folder, rows)
            found[who, "cut" if rows == TOKENS else "padded"] = folder
    return found


def batch() -> DistillationBatch:
    tokens = collate_tokens(IDS, [1, 1, 1], 0)
    count = tokens.num_supervised
    return DistillationBatch(tokens, None, None, None, count, count, tokens.ids_BL.numel(), (0, 1, 2))


def methods():
    return {
        "sft": lambda student, teacher: SFT(student),
        "kd": lambda student, teacher: KD(student, teacher),
        "kd reverse": lambda student, teacher: KD(student, teacher, divergence=Divergence("reverse_kl")),
        "dskd": lambda student, teacher: DSKD(student, teacher),
        "dskd v1": lambda student, teacher: DSKD(student, teacher, projectors=Projectors(version="v1")),
    }


def loss_and_gradients(name: str, folders, kind: str, **settings):
    torch.manual_seed(0)
    specs = [ModelSpec(source=str(folders[who, kind]), **settings) for who in ("student", "teacher")]
    method = methods()[name](*specs)
    method.configure_model()
    method.double()
    ours = batch()
    if name == "sft":
        from lit_llm.losses.fused_head import cross_entropy

        loss = cross_entropy(method.student.hidden(ours.student), method.student.head, ours.student.target_T).loss
    elif name.startswith("kd"):
        loss = method.loss(ours, method.teacher_hidden(ours), ce_weight=0.5, kd_weight=0.5).loss
    else:
        method._trainer = type("T", (), {"global_step": 0})()
        loss = method.loss(ours, method.teacher_hidden(ours), ce_weight=0.5, kd_denominator=1.0).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in method.named_parameters()}


@pytest.mark.parametrize("name", list(methods()))
def test_the_loss_of_padded_heads_is_that_of_heads_cut_to_the_tokenizer(folders, name):
    cut_loss, cut = loss_and_gradients(name, folders, "cut")
    loss, padded = loss_and_gradients(name, folders, "padded")
    torch.testing.assert_close(loss, cut_loss, rtol=1e-9, atol=1e-9)
    assert padded.keys() == cut.keys()
    for parameter, expected in cut.items():
        gradient = padded[parameter]
        if gradient.shape != expected.shape:  # the shared embedding and head
            assert gradient.shape[0] == 100 and gradient[TOKENS:].abs().max() == 0
            gradient = gradient[:TOKENS]
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", list(methods()))
def test_padding_does_change_the_loss_where_it_is_left_in(folders, name):
    cut_loss, _ = loss_and_gradients(name, folders, "cut")
    loss, gradients = loss_and_gradients(name, folders, "padded", trim_head=False)
    assert abs(loss - cut_loss) > 1e-3
    assert any(len(g) == 100 and g[TOKENS:].abs().max() > 0 for g in gradients.values())


@pytest.fixture(params=["student", "teacher"])
def model(request, folders) -> LanguageModel:
    """A model that wants to say nothing but ids beyond its tokenizer."""
    model = ModelSpec(source=str(folders[request.param, "padded"])).load()
    with torch.no_grad():
        model.transformer.get_output_embeddings().weight[:TOKENS] *= 0.01
    assert model.eval().model(input_ids=torch.tensor(IDS[:1])).logits.argmax(-1).min() >= TOKENS
    return model


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 1}])
def test_generation_never_chooses_what_the_tokenizer_does_not_know(model, settings):
    answers = model.generate(IDS, max_new_tokens=8, **settings)
    assert max(i for answer in answers for i in answer) < TOKENS
    greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}
    assert "w" in "".join(model.stream(IDS[0], max_new_tokens=4, **greedy))


def test_the_saved_folder_has_all_rows_and_does_not_choose_them_either(model, tmp_path):
    rows = model.vocab_size
    model.save(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert plain.get_output_embeddings().weight.shape[0] == rows > TOKENS
    settings = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert settings["suppress_tokens"] == list(range(TOKENS, rows))
    new = plain.generate(torch.tensor(IDS[:1]), max_new_tokens=5, do_sample=False)[0, len(IDS[0]) :]
    assert new.max() < TOKENS


def test_the_head_shows_as_many_rows_as_the_tokenizer_has_ids(folders):
    model = ModelSpec(source=str(folders["teacher", "padded"])).load()
    assert (model.vocab_size, model.head.num_rows, model.num_tokens) == (104, TOKENS, TOKENS)
    assert ModelSpec(source=str(folders["teacher", "padded"]), trim_head=False).load().head.num_rows == 104
    model.check_head()
