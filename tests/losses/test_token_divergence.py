"""The divergence per position against autograd over whole logits."""

from __future__ import annotations

import pytest
import torch

from lit_llm.losses.divergence import Divergence
from lit_llm.losses.head import Head
from lit_llm.losses.token_divergence import log_probs_and_divergence, token_divergence


def parts(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return random(7, 5), Head(random(11, 5), random(11), softcap=3.0), random(7, 4), Head(random(11, 4))


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "js"])
def test_values_and_gradients_are_those_over_whole_logits(name, chunk_size):
    hidden, head, reference, reference_head = parts()
    divergence = Divergence(name=name, temperature=1.0)
    weight = torch.linspace(0.1, 2.0, 7, dtype=torch.float64)
    ours = hidden.clone().requires_grad_()
    found = token_divergence(ours, head, reference, reference_head, divergence, chunk_size=chunk_size)
    (found * weight).sum().backward()
    plain = hidden.clone().requires_grad_()
    wanted = divergence(head(plain), reference_head(reference))
    (wanted * weight).sum().backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ours.grad, plain.grad)


def test_logits_that_are_kept_serve_for_their_head_and_stay_as_they_are():
    hidden, head, reference, reference_head = parts()
    divergence, kept = Divergence("reverse_kl", temperature=1.0), reference_head(reference)
    found = []
    for other in ((reference, reference_head), (kept, None), (kept, None)):
        ours = hidden.clone().requires_grad_()
        value = token_divergence(ours, head, *other, divergence)
        value.sum().backward()
        found.append((value.detach(), ours.grad))
    for value, gradient in found[1:]:
        assert torch.equal(value, found[0][0]) and torch.equal(gradient, found[0][1])
    with pytest.raises(ValueError, match="over 10 tokens"):
        token_divergence(hidden, head, kept[:, :10], None, divergence)


def test_equal_predictions_have_no_divergence_and_no_positions_have_none():
    hidden, head, _, _ = parts()
    same = token_divergence(hidden, head, hidden, head, Divergence("reverse_kl", temperature=1.0))
    assert same.abs().max() < 1e-12
    nothing = token_divergence(hidden[:0], head, hidden[:0], head, Divergence("reverse_kl", temperature=1.0))
    assert nothing.shape == (0,)


def test_sides_that_do_not_match_are_refused():
    hidden, head, reference, reference_head = parts()
    with pytest.raises(ValueError, match="7 positions over 11 tokens.*6 positions"):
        token_divergence(hidden, head, reference[:6], reference_head, Divergence())
    with pytest.raises(ValueError, match="over 10 tokens"):
        token_divergence(hidden, head, reference, reference_head.rows(10), Divergence())


@pytest.mark.parametrize("answers", [0, 4, 7], ids=["no answers", "both", "nothing compared"])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_log_probabilities_and_a_divergence_from_one_product_are_those_of_two(chunk_size, answers):
    hidden, head, reference, reference_head = parts()
    divergence, kept = Divergence("reverse_kl", temperature=1.0), reference_head(reference)[answers:]
    before, target = kept.clone(), torch.arange(answers)
    weight = torch.linspace(0.1, 2.0, 7, dtype=torch.float64)

    ours = hidden.clone().requires_grad_()
    found = log_probs_and_divergence(
        ours[:answers], target, ours[answers:], kept, head, divergence, chunk_size=chunk_size
    )
    (torch.cat(found) * weight).sum().backward()
    plain = hidden.clone().requires_grad_()
    wanted = head(plain[:answers]).log_softmax(-1)[range(answers), target], divergence(head(plain[answers:]), kept)
    (torch.cat(wanted) * weight).sum().backward()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(ours.grad, plain.grad)
    assert torch.equal(kept, before)
    with torch.no_grad():
        alone = log_probs_and_divergence(hidden[:answers], target, hidden[answers:], kept, head, divergence)
    torch.testing.assert_close(torch.cat(alone), torch.cat(wanted))
    with pytest.raises(ValueError, match="both must agree"):
        log_probs_and_divergence(hidden[:answers], target, hidden[answers:], kept[:, :10], head, divergence)
