"""Groups of examples of unequal length: rows that hold several examples, and micro-batches within a budget of tokens.

Both are planned anew for every epoch, yet every epoch has the same number of rounds (one micro-batch for every rank), so
that the length of a run and its learning-rate schedule are known before it starts.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

Groups = list[list[int]]
Grouper = Callable[[Sequence[int], Sequence[int], int], Groups]


def packed_rows(examples: Sequence[int], lengths: Sequence[int], limit: int) -> Groups:
    """Rows of at most `limit` tokens by first-fit decreasing: the longest first, each into the first row with room.

    Args:
        examples: indices; the earlier of two equally long ones is placed first.
        lengths: tokens of each example of the whole set, none above the limit.
        limit: tokens of a row.
    """
    leaves = 1 << max(len(examples) - 1, 0).bit_length()
    room = [limit] * (2 * leaves)  # a tree of maxima: node n has the children 2n and 2n + 1, row r is leaf leaves + r
    rows: Groups = []
    for example in sorted(examples, key=lambda i: -lengths[i]):
        node, length = 1, lengths[example]
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(example)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def padded_groups(examples: Sequence[int], lengths: Sequence[int], limit: int) -> Groups:
    """Groups of similar length whose longest member times their size stays within `limit` tokens.

    No division into such groups has fewer of them (the longest example decides how many may stand beside it).
    """
    ordered = sorted(examples, key=lambda i: -lengths[i])
    groups: Groups = []
    start = 0
    while start < len(ordered):
        size = limit // lengths[ordered[start]]
        groups.append(ordered[start : start + size])
        start += size
    return groups


class Limit(NamedTuple):
    """How many tokens a group may have.

    Attributes:
        setting: the config key, for messages.
        tokens: its value.
        group: how examples are grouped under it.
    """

    setting: str
    tokens: int
    group: Grouper


class Grouping:
    """Divides the examples of an epoch into groups, in the same number of rounds for every epoch.

    Groups are formed within windows of the epoch's order. Where an order needs more groups than there are places, the
    windows grow until they hold everything, which needs a number of groups that depends on the lengths alone; where it
    needs too few, the largest groups are divided. So no example is left out, unless there are fewer examples than the
    ranks need.

    Args:
        lengths: tokens of each example.
        limit: tokens of a group.
        first_order: the order of epoch 0, which decides the number of rounds.
        per_rank: groups in the micro-batch of one rank.
        world_size: ranks; every one has a group in every round.
        bucket: a window holds about as many examples as this many rounds.

    Raises:
        ValueError: an example longer than the limit, or fewer examples than ranks.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        limit: Limit,
        first_order: Sequence[int],
        *,
        per_rank: int,
        world_size: int,
        bucket: int,
    ) -> None:
        longest = max(range(len(lengths)), key=lambda i: lengths[i])
        if lengths[longest] > limit.tokens:
            raise ValueError(
                f"{limit.setting} is {limit.tokens}, but example {longest} has {lengths[longest]} tokens and cannot be "
                f"divided.\n  Raise {limit.setting} to {lengths[longest]} or more, or lower data.max_length."
            )
        if len(lengths) < world_size:
            raise ValueError(
                f"There are {len(lengths)} training examples for {world_size} processes. Lower trainer.devices."
            )
        self.lengths, self.limit, self.world_size = lengths, limit, world_size
        self.per_round = per_rank * world_size
        per_group = limit.tokens * len(lengths) // sum(lengths)
        self.window = bucket * self.per_round * max(per_group, 1)
        together = max(len(self._grouped(first_order, self.window)), len(self._grouped(first_order, len(lengths))))
        self.num_rounds = -(-together // self.per_round)
        self._places = self.num_rounds * self.per_round
        if len(lengths) < self._fewest():  # hardly two examples fit together: the last round cannot serve every rank
            self.num_rounds -= 1

    def rounds(self, order: Sequence[int], shuffle: Callable[[int], Sequence[int]]) -> list[Groups]:
        """The groups of every round of an epoch; `world_size` groups or more in each.

        Args:
            order: of the epoch's examples.
            shuffle: gives a permutation of so many groups.
        """
        window = self.window
        groups = self._grouped(order, window)
        while len(groups) > self._places:
            window *= 2
            groups = self._grouped(order, window)
        groups = divided(groups, self._fewest())
        groups = [groups[i] for i in shuffle(len(groups))][: self.num_rounds * self.per_round]
        return [groups[start : start + self.per_round] for start in range(0, len(groups), self.per_round)]

    def _fewest(self) -> int:
        """Groups that fill all rounds but the last, which has one for every rank."""
        return (self.num_rounds - 1) * self.per_round + self.world_size

    def _grouped(self, order: Sequence[int], window: int) -> Groups:
        pieces = (order[start : start + window] for start in range(0, len(order), window))
        return [group for piece in pieces for group in self.limit.group(piece, self.lengths, self.limit.tokens)]


def divided(groups: Groups, at_least: int) -> Groups:
    """At least so many groups, by halving the largest ones; fewer where every group is down to one example."""
    heap = [(-len(group), number, group) for number, group in enumerate(groups)]
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) < at_least and -heap[0][0] > 1:
        _, _, group = heapq.heappop(heap)
        for half in (group[: len(group) // 2], group[len(group) // 2 :]):
            heapq.heappush(heap, (-len(half), number, half))
            number += 1
    return [group for _, _, group in sorted(heap, key=lambda entry: entry[1])]
