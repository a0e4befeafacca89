"""Rows of several examples and micro-batches by tokens: nothing is lost, nothing passes the limit, epochs are equally long."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_llm.data.batch import collate_pairs, collate_tokens
from lit_llm.data.packing import divided, packed_rows, padded_groups
from lit_llm.data.step_sampler import StepLoader, StepSampler

RANDOM = random.Random(7)
LENGTHS = [RANDOM.randint(3, 60) for _ in range(157)]
SUPERVISED = [length // 2 for length in LENGTHS]
PAIRS = [length // 3 for length in LENGTHS]
SETTINGS = {
    "packed": {"pack_to": 64, "batch_size": 3},
    "one row": {"pack_to": 64, "batch_size": 1},
    "budget": {"batch_tokens": 128},
    "tight budget": {"batch_tokens": 60},
}


def sampler(kind: str, lengths=LENGTHS, **more) -> StepSampler:
    supervised = [length // 2 for length in lengths]
    pairs = [length // 3 for length in lengths]
    return StepSampler(lengths, supervised, pairs, **{"shuffle": True, "bucket": 2, **SETTINGS[kind], **more})


def rows_of(micro) -> list[list[int]]:
    examples = iter(micro.examples)
    return [[next(examples) for _ in range(size)] for size in micro.row_sizes or [1] * len(micro.examples)]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_first_fit_decreasing_is_that_of_the_textbook(lengths):
    rows: list[list[int]] = []
    for example in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = (row for row in rows if sum(lengths[i] for i in row) + lengths[example] <= 20)
        row = next(room, None)
        if row is None:
            rows.append(row := [])
        row.append(example)
    assert packed_rows(range(len(lengths)), lengths, 20) == rows


@given(st.lists(st.integers(1, 20), min_size=1, max_size=9))
def test_no_other_division_within_the_budget_has_fewer_groups(lengths):
    def fewest(left: tuple[int, ...]) -> int:  # the longest, with any choice of others: the next longest are no worse
        if not left:
            return 0
        size = 24 // left[0]
        return 1 + min(fewest(left[taken:]) for taken in range(1, size + 1))

    groups = padded_groups(range(len(lengths)), lengths, 24)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(max(lengths[i] for i in group) * len(group) <= 24 for group in groups)
    assert len(groups) == fewest(tuple(sorted(lengths, reverse=True)))


def test_groups_are_divided_until_there_are_enough():
    groups = divided([[1, 2, 3, 4], [5], [6, 7]], 5)
    assert len(groups) == 5 and sorted(i for group in groups for i in group) == list(range(1, 8))
    assert sorted(divided([[1], [2]], 5)) == [[1], [2]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", SETTINGS)
def test_every_epoch_holds_every_example_once_in_as_many_rounds_within_the_limit(kind, world_size):
    samplers = [sampler(kind, rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch in range(25):
        plans = [ours.plan(epoch) for ours in samplers]
        assert {len(plan) for plan in plans} == {len(samplers[0])}  # every rank, every epoch
        seen = sorted(i for plan in plans for micro in plan for i in micro.examples)
        assert seen == list(range(len(LENGTHS)))
        for micro in (micro for plan in plans for micro in plan):
            lengths = [sum(LENGTHS[i] for i in row) for row in rows_of(micro)]
            if "budget" in kind:
                assert micro.row_sizes is None
                assert max(lengths) * len(lengths) <= SETTINGS[kind]["batch_tokens"]
            else:
                assert sum(micro.row_sizes) == len(micro.examples)
                assert max(lengths) <= 64 and len(lengths) <= SETTINGS[kind]["batch_size"]


@pytest.mark.parametrize("kind", SETTINGS)
def test_totals_are_those_of_the_whole_step_over_all_ranks(kind):
    plans = [sampler(kind, rank=rank, world_size=2, accumulate=3).plan(4) for rank in (0, 1)]
    for start in range(0, len(plans[0]), 3):
        step = [micro for plan in plans for micro in plan[start : start + 3]]
        members = [i for micro in step for i in micro.examples]
        assert {micro.step_tokens for micro in step} == {sum(SUPERVISED[i] for i in members)}
        assert {micro.step_pairs for micro in step} == {sum(PAIRS[i] for i in members)}


@pytest.mark.parametrize("kind", ["packed", "budget"])
def test_companions_change_from_epoch_to_epoch_and_repeat_by_seed(kind):
    ours = sampler(kind, seed=1)
    assert ours.plan(3) == sampler(kind, seed=1).plan(3)
    assert ours.plan(3) != sampler(kind, seed=2).plan(3)
    groups = [{frozenset(row) for micro in ours.plan(epoch) for row in [micro.examples]} for epoch in (0, 1)]
    assert len(groups[0] & groups[1]) < 0.2 * len(groups[0])


def test_the_rows_are_nearly_full():
    assert sampler("packed", pack_to=256, bucket=8).fill > 0.95
    assert sampler("budget", bucket=8).fill > 0.85
    assert StepSampler(LENGTHS, SUPERVISED, PAIRS, batch_size=3, shuffle=True).fill < 0.75


@pytest.mark.parametrize(("number", "world_size"), [(1, 1), (2, 2), (3, 2), (5, 2), (7, 3), (9, 4)])
@pytest.mark.parametrize("kind", SETTINGS)
def test_few_examples_still_give_every_rank_a_micro_batch_in_every_round(kind, number, world_size):
    for lengths in ([60] * number, [3] * number, LENGTHS[:number]):
        for epoch in range(6):
            samplers = [sampler(kind, lengths, rank=rank, world_size=world_size) for rank in range(world_size)]
            plans = [ours.plan(epoch) for ours in samplers]
            assert {len(plan) for plan in plans} == {len(samplers[0])} and len(samplers[0]) >= 1
            assert all(micro.examples for plan in plans for micro in plan)
            seen = [i for plan in plans for micro in plan for i in micro.examples]
            assert len(seen) == len(set(seen))


@pytest.mark.parametrize(("kind", "setting"), [("packed", "pack_to"), ("budget", "batch_tokens")])
def test_an_example_longer_than_the_limit_is_refused_with_both_values(kind, setting):
    with pytest.raises(ValueError, match=f"{setting} is {SETTINGS[kind][setting]}, but example 1 has 129 tokens"):
        sampler(kind, [5, 129, 7])


def test_fewer_examples_than_processes_are_refused():
    with pytest.raises(ValueError, match="2 training examples for 3 processes"):
        sampler("budget", [5, 6], world_size=3)


class Echo:
    def __getitem__(self, micro):
        return micro


@pytest.mark.parametrize("kind", ["packed", "budget"])
def test_a_loader_continues_inside_an_epoch_and_into_the_next(kind):
    unbroken = StepLoader(Echo(), sampler(kind))
    expected = list(unbroken)
    unbroken.sampler.set_epoch(1)
    expected += list(unbroken)
    stopped = StepLoader(Echo(), sampler(kind))
    iterator = iter(stopped)
    seen = [next(iterator) for _ in range(5)]
    resumed = StepLoader(Echo(), sampler(kind))
    resumed.load_state_dict(stopped.state_dict())
    seen += list(resumed)
    resumed.sampler.set_epoch(1)
    assert seen + list(resumed) == expected


def test_a_packed_row_restarts_positions_and_supervises_the_same_tokens():
    ids, prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]], [1, 1, 2]
    packed, alone = collate_tokens(ids, prompts, 0, [2, 1]), collate_tokens(ids, prompts, 0)
    assert packed.ids_BL.tolist() == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 0]]
    assert packed.position_ids_RL.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert packed.length_B.tolist() == [3, 2, 4] and packed.longest == 4
    assert packed.ids_BL.flatten()[packed.position_T].tolist() == [5, 6, 8, 11, 12]
    assert torch.equal(packed.target_T, alone.target_T) and torch.equal(packed.sequence_T, alone.sequence_T)
    assert alone.position_ids_RL is None


def test_pairs_point_at_the_same_tokens_in_packed_rows():
    ids, prompts, pairs = [[1, 2, 3], [1, 2, 3, 4]], [1, 1], [[1], [0, 2]]
    packed = [collate_tokens(ids, prompts, 0, [2]) for _ in "st"]
    alone = [collate_tokens(ids, prompts, 0) for _ in "st"]
    for ours, theirs in zip(collate_pairs(*packed, pairs, pairs), collate_pairs(*alone, pairs, pairs), strict=True):
        assert torch.equal(ours, theirs)
