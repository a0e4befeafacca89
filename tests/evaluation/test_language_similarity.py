"""Similarity of languages: the streamed statistic is the mean over all pairs, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_llm.evaluation.language_similarity import SimilarityReport, UnitVectors, aggregate, measure
from tests.reference.layer_moe_losses import pairwise_similarity
from tests.tiny import tiny_config

GROUPS = {"en": "old", "hu": "new", "tr": "new"}
PAD = 0


@pytest.fixture(scope="module")
def model() -> nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(vocab_size=50, layers=3)).eval()


def mlps(model: nn.Module) -> list[nn.Module]:
    return [layer.mlp for layer in model.model.layers]


def documents(seed: int = 0) -> dict[str, list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = {"en": (5, 9, 3, 7), "hu": (8, 2, 6), "tr": (4, 4, 11, 1, 3)}
    return {
        name: [torch.randint(2, 50, (n,), generator=generator).tolist() for n in of] for name, of in lengths.items()
    }


def states(model: nn.Module, texts: list[list[int]], layer: int) -> torch.Tensor:
    """(M, H) MLP inputs of texts run one by one."""
    seen: list[torch.Tensor] = []
    handle = mlps(model)[layer].register_forward_pre_hook(lambda _, given: seen.append(given[0][0].detach()))
    for text in texts:
        model.model(input_ids=torch.tensor([text]))
    handle.remove()
    return torch.cat(seen)


def measured(model: nn.Module, texts=None, **settings) -> tuple[SimilarityReport, dict]:
    vectors, found = measure(model.model, mlps(model), texts or documents(), GROUPS, **settings)
    means = {name: of.mean_LH for name, of in vectors.items()}
    return aggregate(means, GROUPS, found), found


@pytest.mark.parametrize("batch_tokens", [1, 12, 4096])
def test_the_stream_gives_the_mean_over_all_pairs_of_tokens(model, batch_tokens):
    report, found = measured(model, batch_tokens=batch_tokens)
    assert list(report.pairs) == ["hu-tr", "hu-en", "tr-en"]
    texts = documents()
    for pair, values in report.pairs.items():
        a, b = pair.split("-")
        for layer, value in enumerate(values):
            expected = pairwise_similarity(states(model, texts[a], layer), states(model, texts[b], layer))
            assert value == pytest.approx(expected, abs=1e-6)
    for layer, value in enumerate(report.similarity):
        new_old = (report.pairs["hu-en"][layer] + report.pairs["tr-en"][layer]) / 2
        assert value == pytest.approx((report.pairs["hu-tr"][layer] + new_old) / 2)
    assert {name: of.tokens for name, of in found.items()} == {"en": 24, "hu": 16, "tr": 23}


def test_special_tokens_are_seen_by_the_model_but_do_not_count(model):
    texts = {name: [[1, *text] for text in of] for name, of in documents().items()}
    report, found = measured(model, texts, skipped_ids=[1])
    kept = [states(model, [text], 0)[1:] for text in texts["hu"]]
    others = [states(model, [text], 0)[1:] for text in texts["tr"]]
    assert report.pairs["hu-tr"][0] == pytest.approx(pairwise_similarity(torch.cat(kept), torch.cat(others)), abs=1e-6)
    assert found["hu"].tokens == 16
    assert measured(model, texts)[1]["hu"].tokens == 19


def test_only_so_many_tokens_count_and_later_documents_are_not_read(model):
    read = []

    def texts():
        for text in documents()["en"]:
            read.append(len(text))
            yield text

    report, found = measured(model, {**documents(), "en": texts()}, tokens_per_language=7, batch_tokens=5, max_length=6)
    assert {name: of.tokens for name, of in found.items()} == {"en": 7, "hu": 7, "tr": 7}
    assert read == [5, 9, 3]  # 5 tokens, then 2 of the 6 that a document may have; the third was waiting
    expected = states(model, [documents()["en"][0], documents()["en"][1][:2]], 1)
    others = states(model, [documents()["hu"][0][:6], documents()["hu"][1][:1]], 1)
    assert report.pairs["hu-en"][1] == pytest.approx(pairwise_similarity(others, expected), abs=1e-6)


def test_neither_the_last_mlp_nor_the_head_is_run(model):
    def refuse(*_):
        raise AssertionError("was run")

    handles = [mlps(model)[-1].register_forward_hook(refuse), model.lm_head.register_forward_hook(refuse)]
    measured(model)
    for handle in handles:
        handle.remove()
    assert not any(mlp._forward_pre_hooks for mlp in mlps(model))


def test_the_model_is_measured_without_dropout_and_left_as_it_was(model):
    model.train()
    first, second = measured(model)[0], measured(model)[0]
    assert first == second and model.training
    model.eval()


def test_vectors_without_direction_are_left_out_and_counted():
    generator = torch.Generator().manual_seed(0)
    rows_MH = torch.randn(5, 4, generator=generator)
    rows_MH[2] = 0
    with_zero, without = UnitVectors("hu", 1, 4), UnitVectors("hu", 1, 4)
    with_zero.add(0, rows_MH)
    without.add(0, rows_MH[[0, 1, 3, 4]])
    torch.testing.assert_close(with_zero.mean_LH, without.mean_LH)
    assert with_zero.zeros_L.tolist() == [1] and with_zero.count_L.tolist() == [4]


def test_states_that_are_not_finite_are_refused_by_language_and_layer(model):
    def broken(module, arguments, output):
        return output * float("nan")

    handle = model.model.layers[0].mlp.register_forward_hook(broken)
    with pytest.raises(ValueError, match=r"hidden states of language 'en' are not finite at layer 1"):
        measured(model)
    handle.remove()


@pytest.mark.parametrize("texts", [[], [[]], [[1, 1]]])
def test_a_language_without_tokens_is_refused(model, texts):
    with pytest.raises(ValueError, match="'hu' has no token to measure"):
        measured(model, {**documents(), "hu": texts}, skipped_ids=[1])


def test_one_new_language_is_compared_with_the_old_ones_alone():
    means = {name: torch.nn.functional.normalize(torch.rand(2, 4), dim=-1) for name in ("en", "hu")}
    report = aggregate(means, GROUPS)
    assert report.new_new is None and report.similarity == report.new_old == report.pairs["hu-en"]
    with pytest.raises(ValueError, match="1 new and 0 old"):
        aggregate({"hu": means["hu"]}, GROUPS)


def test_a_report_comes_back_from_its_file_and_another_file_is_refused(model, tmp_path):
    report, _ = measured(model)
    report.write(tmp_path / "similarity.json")
    assert SimilarityReport.read(tmp_path / "similarity.json") == report
    assert len(report.text().splitlines()) == 3 + 1 + 2 + 3
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a similarity report"):
        SimilarityReport.read(tmp_path / "other.json")
