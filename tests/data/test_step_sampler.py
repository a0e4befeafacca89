"""Optimizer steps are planned the same way on every rank, and resume where they stopped."""

import pytest
from torch.utils.data import DataLoader, IterableDataset

from lit_llm.data.step_sampler import StepLoader, StepSampler, batches_here
from tests.tiny_runs import fit, tiny_config

LENGTHS = [5, 9, 3, 7, 8, 2, 6, 4, 10, 11, 12, 1, 13]
SUPERVISED = [length - 1 for length in LENGTHS]
PAIRS = [length // 2 for length in LENGTHS]


def sampler(**settings):
    return StepSampler(LENGTHS, SUPERVISED, PAIRS, **{"batch_size": 2, **settings})


class Echo:
    def __getitem__(self, micro):
        return micro


def test_an_epoch_holds_every_example_once():
    for settings in ({}, {"shuffle": True}, {"shuffle": True, "bucket": 3}, {"bucket": 100}):
        examples = [example for micro in sampler(**settings) for example in micro.examples]
        assert sorted(examples) == list(range(len(LENGTHS)))


def test_a_rank_knows_its_batches_where_others_have_more():
    """The length is that of the rank that has most, so that shares of it are the same everywhere."""
    examples = len(LENGTHS)
    for world_size in (1, 2, 3, 4):
        loaders = [
            DataLoader(Echo(), sampler=sampler(rank=rank, world_size=world_size), batch_size=None)
            for rank in range(world_size)
        ]
        assert [batches_here(loader) for loader in loaders] == [len(list(loader)) for loader in loaders]
        assert {len(loader) for loader in loaders} == {-(-examples // (2 * world_size))}


def test_a_loader_without_a_length_is_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            yield from ()

    with pytest.raises(ValueError, match="DataLoader to evaluate has no length"):
        batches_here(DataLoader(Endless()))


def test_ranks_share_an_epoch_without_overlap_and_know_the_same_totals():
    ranks = [sampler(rank=rank, world_size=2, shuffle=True, accumulate=2, drop_last=True).plan(4) for rank in (0, 1)]
    seen = [example for plan in ranks for micro in plan for example in micro.examples]
    assert len(seen) == len(set(seen)) == 12
    assert [(m.step_tokens, m.step_pairs) for m in ranks[0]] == [(m.step_tokens, m.step_pairs) for m in ranks[1]]


def test_the_order_of_a_run_follows_its_seed_unless_the_data_have_their_own(tmp_path):
    config = tiny_config(tmp_path, "sft", max_steps=1)

    def order(*options):
        return [micro.examples for micro in fit(config, *options).datamodule.train_dataloader().sampler.plan(0)]

    assert order("--seed_everything=5") == order("--seed_everything=6", "--data.init_args.seed=5")
    assert order("--seed_everything=5") != order("--seed_everything=6")


def test_step_totals_are_those_of_all_micro_batches_of_the_step():
    plan = sampler(accumulate=3, shuffle=True, seed=5).plan(0)
    for start in range(0, len(plan), 3):
        step = plan[start : start + 3]
        members = [example for micro in step for example in micro.examples]
        assert {micro.step_tokens for micro in step} == {sum(SUPERVISED[i] for i in members)}
        assert {micro.step_pairs for micro in step} == {sum(PAIRS[i] for i in members)}


def test_one_step_of_eight_has_the_same_examples_as_four_of_two():
    whole = sampler(batch_size=8, shuffle=True, drop_last=True).plan(1)[0]
    parts = sampler(batch_size=2, accumulate=4, shuffle=True, drop_last=True).plan(1)[:4]
    assert list(whole.examples) == [example for micro in parts for example in micro.examples]
    assert {whole.step_tokens} == {micro.step_tokens for micro in parts}


def test_epochs_differ_and_repeat_by_seed():
    first, again = sampler(shuffle=True, seed=1), sampler(shuffle=True, seed=1)
    assert first.plan(0) == again.plan(0)
    assert first.plan(0) != first.plan(1)
    assert first.plan(0) != sampler(shuffle=True, seed=2).plan(0)


def test_length_buckets_save_padding():
    def padded(plan):
        return sum(max(LENGTHS[i] for i in micro.examples) * len(micro.examples) for micro in plan)

    assert padded(sampler(shuffle=True, bucket=6).plan(0)) < padded(sampler(shuffle=True).plan(0))


def test_a_loader_continues_after_the_batches_it_has_handed_out():
    unbroken = list(StepLoader(Echo(), sampler(shuffle=True)))
    stopped = StepLoader(Echo(), sampler(shuffle=True))
    iterator = iter(stopped)
    first = [next(iterator) for _ in range(3)]

    resumed = StepLoader(Echo(), sampler(shuffle=True))
    resumed.load_state_dict(stopped.state_dict())
    assert first + list(resumed) == unbroken


def test_a_loader_with_workers_hands_out_the_same_batches():
    assert list(StepLoader(Echo(), sampler(shuffle=True), num_workers=2)) == list(sampler(shuffle=True))
