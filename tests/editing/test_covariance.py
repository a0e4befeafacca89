"""Second moments: exact, stopped and reported, kept on disk by model and text."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lit_llm.editing.covariance import kept_second_moments, second_moments
from lit_llm.editing.passes import run
from lit_llm.editing.rows import padded
from tests.editing import models

GENERATOR = torch.Generator().manual_seed(0)
TEXTS = [torch.randint(3, 61, (3 + n % 9,), generator=GENERATOR).tolist() for n in range(60)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_they_are_the_mean_over_all_real_tokens_of_each_text_alone(family):
    body, _ = models.body_and_head(family)
    found = second_moments(body, TEXTS, [1, 3], max_tokens=10**6, batch_tokens=64)
    seen, tokens = [], sum(len(ids) for ids in TEXTS)
    for ids in TEXTS:
        with torch.no_grad(), body.at_inputs({3: seen.append}):
            run(body, padded([ids]))
    total = sum(h.double().T @ h.double() for h in seen)
    assert found.tokens == tokens
    torch.testing.assert_close(found.moments[3], total / tokens, atol=1e-6, rtol=1e-5)
    assert found.moments[3].dtype == torch.float64


def test_the_last_text_is_cut_where_the_tokens_are_enough():
    body, _ = models.body_and_head()
    found = second_moments(body, TEXTS, [1], max_tokens=50, batch_tokens=32)
    assert found.tokens == 50
    exact = [*TEXTS[:7], TEXTS[7][: 50 - sum(map(len, TEXTS[:7]))]]
    again = second_moments(body, [ids for ids in exact if ids], [1], batch_tokens=32)
    assert again.tokens == 50
    torch.testing.assert_close(again.moments[1], found.moments[1])


def test_the_reported_error_is_about_the_real_one_and_falls_with_more_tokens():
    body, _ = models.body_and_head()
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, 61, (8,), generator=generator).tolist() for _ in range(3000)]
    truth = second_moments(body, texts, [2], max_tokens=10**6).moments[2]
    few = second_moments(body, texts, [2], max_tokens=1000, batch_tokens=64)
    more = second_moments(body, texts, [2], max_tokens=8000, batch_tokens=64)
    real = ((few.moments[2] - truth).norm() / truth.norm()).item()
    assert real / 2 < few.split_error[2] < 2 * real
    assert more.split_error[2] < few.split_error[2]
    tokens = [at for at, _ in more.curve[2]]
    assert all(later >= 2 * earlier for earlier, later in pairwise(tokens)) and len(tokens) >= 4
    assert more.curve[2][-1][1] < more.curve[2][0][1]


def test_a_few_tokens_make_enough_batches_for_an_error():
    body, _ = models.body_and_head()
    found = second_moments(body, TEXTS, [1], max_tokens=300)
    assert 0 < found.split_error[1] < 1 and found.curve[1]


def test_they_stop_when_doubling_changes_little():
    body, _ = models.body_and_head()
    texts = [TEXTS[n % 60] for n in range(600)]
    found = second_moments(body, texts, [1, 2], max_tokens=10**6, batch_tokens=64, stop_change=0.2)
    whole = second_moments(body, texts, [1, 2], max_tokens=10**6, batch_tokens=64)
    assert found.tokens < whole.tokens
    assert all(found.curve[layer][-1][1] < 0.2 for layer in (1, 2))


def test_they_are_computed_once_for_a_model_and_its_text(tmp_path, monkeypatch):
    body, _ = models.body_and_head()
    first = kept_second_moments(body, TEXTS, [1, 2], folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1

    def fails(*args, **kwargs):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr("lit_llm.editing.covariance.second_moments", fails)
        again = kept_second_moments(body, TEXTS, [1, 2], folder=tmp_path)
        assert all(torch.equal(again.moments[layer], first.moments[layer]) for layer in (1, 2))
        assert (again.tokens, again.curve) == (first.tokens, first.curve)
        for other in ({"texts": TEXTS[1:]}, {"layers": [1]}, {"max_tokens": 30}):
            with pytest.raises(AssertionError, match="computed again"):
                kept_second_moments(body, **({"texts": TEXTS, "layers": [1, 2], "folder": tmp_path} | other))
        with torch.no_grad():
            body.weight(0)[0, 0] += 1
        with pytest.raises(AssertionError, match="computed again"):
            kept_second_moments(body, TEXTS, [1, 2], folder=tmp_path)


def test_no_tokens_are_refused():
    body, _ = models.body_and_head()
    with pytest.raises(ValueError, match="ordinary text"):
        second_moments(body, [[], []], [1])
