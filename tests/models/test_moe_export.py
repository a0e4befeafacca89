"""Export of uniform expansions to MoE architectures of transformers, and why others do not fit."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_llm.models.language_model import ModelSpec
from lit_llm.models.moe_export import export_moe
from lit_llm.models.surgery import add_classifiers, dense_plan, expand
from tests.models.test_surgery import dense, disturb, expanded, ids
from tests.tiny import tiny_model_folder


@pytest.mark.parametrize(
    ("family", "experts", "type_name"),
    [
        ("llama", (3, 3, 3), "mixtral"),
        ("mistral", (2, 2, 2), "mixtral"),
        ("qwen3", (4, 4, 4), "qwen3_moe"),
        ("qwen3", (3, 1, 3), "qwen3_moe"),
    ],
)
def test_a_uniform_expansion_runs_without_lit_llm(family, experts, type_name, tmp_path, byte_level_tokenizer):
    model = disturb(expanded(family, experts)).eval()
    assert export_moe(model, tmp_path / "exported", byte_level_tokenizer) == type_name
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    assert type(plain).__module__.startswith("transformers.") and plain.config.model_type == type_name
    torch.testing.assert_close(plain(ids()).logits, model(ids()).logits, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "exported" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("family", "experts", "reason"),
    [
        ("llama", (3, 2, 3), "2 to 3 experts where mixtral has one number.*no bias"),
        ("llama", (3, 1, 3), "1 to 3 experts"),
        ("gemma2", (2, 2, 2), "no MoE for the attention and norms of gemma2"),
    ],
)
def test_what_fits_nowhere_is_refused_with_the_reason(family, experts, reason, tmp_path):
    with pytest.raises(ValueError, match=rf"cannot be exported.*{reason}.*save_pretrained"):
        export_moe(expanded(family, experts), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_classifiers_and_dense_models_are_refused_too(tmp_path):
    model = expanded(experts=(3, 3, 3))
    add_classifiers(model, [1])
    with pytest.raises(ValueError, match=r"nothing for the classifiers of the layers \[1\]"):
        export_moe(model, tmp_path / "exported")
    with pytest.raises(ValueError, match="is dense"):
        export_moe(dense(), tmp_path / "exported")


def test_biases_that_the_other_architecture_lacks_are_noticed(tmp_path):
    model = disturb(expanded("llama", (3, 3, 3), attention_bias=True))
    with pytest.raises(ValueError, match="cannot be exported.*Unexpected"):
        export_moe(model, tmp_path / "exported")


def test_the_command_writes_what_plain_transformers_runs_and_says_why_it_cannot(tmp_path, byte_level_tokenizer, capsys):
    from lit_llm.cli import main

    dense_folder = tiny_model_folder(tmp_path / "dense", tokenizer=byte_level_tokenizer, layers=3)
    for name, experts in (("even", [3, 3, 3]), ("uneven", [3, 2, 3])):
        student = ModelSpec(source=str(dense_folder)).load()
        model = student.transformer
        expand(model, dense_plan(model, languages=["en"]).with_group("new", ["hu"], experts))
        student.save(tmp_path / name)
    main(["as_moe", "--model", str(tmp_path / "even"), "--to", str(tmp_path / "moe")])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe").config.model_type == "mixtral"
    for model, to, words in (("even", "moe", "moe exists"), ("uneven", "other", "2 to 3 experts")):
        with pytest.raises(SystemExit):
            main(["as_moe", "--model", str(tmp_path / model), "--to", str(tmp_path / to)])
        assert words in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
