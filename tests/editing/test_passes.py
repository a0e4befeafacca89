"""A restarted pass is the plain pass, in every family."""

from __future__ import annotations

import pytest
import torch

from lit_llm.editing.passes import Restarted, Whole, run, run_until
from lit_llm.editing.rows import Row, bunches, padded
from tests.editing import models

SEQUENCES = [(5, 6, 7, 8, 9, 10, 11), (12, 13, 14, 15, 16), (20, 21, 22, 23, 24, 25)]


@pytest.mark.parametrize("first_column", [0, 3])
@pytest.mark.parametrize("family", models.EVERY)
def test_a_restarted_pass_gives_what_the_whole_pass_gives(family, first_column):
    body, _ = models.body_and_head(family, dtype=torch.float64)
    grid, layer = padded(SEQUENCES), 2
    restarted, whole = Restarted(body, grid, layer, first_column), Whole(body, grid)
    real = grid.mask()[:, first_column:].bool()

    def change(columns: int):
        def add(neurons_Nm):
            changed = neurons_Nm.view(len(SEQUENCES), columns, -1).clone()
            changed[:, columns - 4 :] += 0.3  # the columns from 3 on
            return changed.view_as(neurons_Nm)

        return add

    with torch.no_grad():
        torch.testing.assert_close(restarted()[real], whole.base[:, first_column:][real])
        for _ in range(2):  # nothing is left over from one step to the next
            with body.at_inputs({layer: change(7 - first_column)}):
                again = restarted()
            with body.at_inputs({layer: change(7)}):
                wanted = whole()
            torch.testing.assert_close(again[real], wanted[:, first_column:][real])
        assert (again[real] - restarted()[real]).abs().max() > 1e-3
    torch.testing.assert_close(restarted.base[real], whole.base[:, first_column:][real])


def test_a_window_of_attention_shorter_than_the_prompt_is_kept():
    body, _ = models.body_and_head("mistral", dtype=torch.float64, sliding_window=3)
    grid = padded([SEQUENCES[0]])
    restarted = Restarted(body, grid, 1, 5)
    with torch.no_grad():
        torch.testing.assert_close(restarted(), run(body, grid)[:, 5:])


def test_blocks_below_the_first_edited_one_do_not_run_again():
    body, _ = models.body_and_head()
    restarted = Restarted(body, padded(SEQUENCES), 2, 3)
    ran = []
    with body.at_inputs({layer: (lambda h, at=layer: ran.append((at, len(h)))) for layer in range(4)}):
        restarted()
    assert ran == [(2, 3 * 4), (3, 3 * 4)]


def test_rows_padded_on_the_left_cannot_be_restarted():
    body, _ = models.body_and_head()
    with pytest.raises(ValueError, match="padded on the right"):
        Restarted(body, padded(SEQUENCES, side="left"), 1)


@pytest.mark.parametrize("family", models.EVERY)
def test_padding_on_the_left_changes_nothing_at_real_positions(family):
    body, _ = models.body_and_head(family)  # eager attention masks whole rows in float32 only
    right, left = padded(SEQUENCES), padded(SEQUENCES, side="left")
    assert left.is_left_padded and not right.is_left_padded
    with torch.no_grad():
        found_right = run(body, right)[right.mask().bool()]
        found_left = run(body, left)[left.mask().bool()]
    torch.testing.assert_close(found_left, found_right, atol=1e-4, rtol=1e-4)


def test_a_pass_ends_after_the_last_block_that_is_wanted():
    body, _ = models.body_and_head()
    ran = []
    with torch.no_grad(), body.at_inputs({layer: (lambda h, at=layer: ran.append(at)) for layer in range(4)}):
        run_until(body, padded(SEQUENCES), 1)
    assert ran == [0, 1]
    assert not any(block._forward_hooks for block in body.blocks)


def test_a_row_knows_its_parts():
    row = Row([4, 5, 6], 1, [7, 8])
    assert row.inputs == (4, 5, 6, 7)
    assert row.first_changed("tail") == row.first_changed("lookup") == 1
    assert row.first_changed("prompt_last") == 2
    for lookup in (-1, 3):
        with pytest.raises(ValueError, match="lookup position"):
            Row((1, 2, 3), lookup)
    with pytest.raises(ValueError, match="no target tokens"):
        Row((1,), 0).require_target()


def test_bunches_hold_every_item_once_within_the_limit():
    costs = [(n % 3, 1 + n % 7) for n in range(40)]
    made = list(bunches(costs, 12))
    assert sorted(index for bunch in made for index in bunch) == list(range(40))
    assert all(len(bunch) * max(costs[i][1] for i in bunch) <= 12 for bunch in made)
    assert list(bunches([(0, 50)], 12)) == [[0]]
