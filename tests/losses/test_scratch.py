"""Scratch memory is used again under the same name, and nowhere else."""

from __future__ import annotations

import threading

import pytest
import torch

from lit_llm.losses.scratch import best_tokens, release_scratch, scratch


@pytest.fixture(autouse=True)
def fresh():
    release_scratch()
    yield
    release_scratch()


def test_the_same_name_gives_the_same_memory_also_for_a_smaller_chunk():
    like = torch.empty(4, 6)
    first, second = scratch("logits", like), scratch("logits", like, (2, 5))
    assert first.data_ptr() == second.data_ptr() and second.shape == (2, 5)


def test_a_larger_chunk_gets_larger_memory_which_stays():
    scratch("logits", torch.empty(4, 6))
    large = scratch("logits", torch.empty(40, 6))
    assert scratch("logits", torch.empty(4, 6)).data_ptr() == large.data_ptr()


@pytest.mark.parametrize("other", [("teacher", torch.float32), ("logits", torch.float64)])
def test_other_names_and_types_do_not_overlap(other):
    one = scratch("logits", torch.empty(3, 3)).fill_(1)
    scratch(other[0], torch.empty(3, 3), dtype=other[1]).fill_(2)
    assert one.eq(1).all()


def test_threads_do_not_share():
    ours, theirs = scratch("logits", torch.empty(3, 3)), []
    thread = threading.Thread(target=lambda: theirs.append(scratch("logits", torch.empty(3, 3)).fill_(2)))
    thread.start()
    thread.join()
    assert theirs[0].data_ptr() != ours.data_ptr()


def test_results_may_be_changed_in_place_under_autograd():
    weight = torch.ones(3, requires_grad=True)
    (scratch("logits", torch.empty(3)).fill_(2).mul_(3) * weight).sum().backward()
    assert weight.grad.tolist() == [6, 6, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_best_token_is_the_first_of_the_largest(dtype):
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[7, [20, 90, 200]] = 100.0
    logits[8] = 0.0
    best = best_tokens(logits)
    assert best.tolist() == logits.argmax(-1).tolist() and best[7] == 20 and best[8] == 0
