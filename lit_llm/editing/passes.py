"""Forward passes over a body, whole or from the first place on that an edit changes.

What lies below the first edited block, and left of the first edited position, is the same in every step of an
optimisation. `Restarted` runs it once: it keeps the first edited block's input, the keys and values of the columns that
never change, and the arguments that the model gives to each block; a step then calls the remaining blocks only.

Shapes: R rows, T columns, C columns that are run again, d hidden size, m neurons.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.rows import Grid, Row, bunches, padded

MAX_TOKENS = 4096  # of one batch, padding included


class Pass(Protocol):
    """A forward pass that can be repeated.

    Attributes:
        first_column: column 0 of what hooks and results see.
        base: (R, C, d) last hidden states of the untouched model, without gradient.
        grid: the rows.
    """

    first_column: int
    base: Tensor
    grid: Grid

    def __call__(self) -> Tensor:
        """(R, C, d) last hidden states, under whatever hooks are open."""
        ...


class Whole:
    """Runs the whole body each time; the plain way that `Restarted` is compared with."""

    first_column = 0

    def __init__(self, body: FeedForwards, grid: Grid) -> None:
        self.body, self.grid = body, grid
        with torch.no_grad():
            self.base = self().detach()

    def __call__(self) -> Tensor:
        return run(self.body, self.grid)


class Restarted:
    """Runs the blocks from `first_layer` on, at the columns from `first_column` on.

    Args:
        body: the model; hooks that are open while this is built see the untouched pass.
        grid: rows padded on the right.
        first_layer: blocks below it never change.
        first_column: columns before it never change.

    Raises:
        ValueError: rows padded on the left, whose columns do not line up with positions.
    """

    def __init__(self, body: FeedForwards, grid: Grid, first_layer: int, first_column: int = 0) -> None:
        if grid.is_left_padded:
            raise ValueError("Rows are padded on the left, but a restarted pass needs them padded on the right.")
        self.body, self.grid, self.first_column = body, grid, first_column
        self._blocks = body.blocks[first_layer:]
        with torch.no_grad():
            cache = _keys_and_values(body, grid.ids_RT[:, :first_column]) if first_column else None
            self._kept = None if cache is None else _Kept(cache)
            with _watched(self._blocks) as calls:
                self.base = _hidden(body, grid.ids_RT[:, first_column:], past_key_values=cache)
        self._entry = calls[0][0]
        self._calls = [(self._swapped(args, cache), self._swapped(kwargs, cache)) for _, args, kwargs in calls]

    def __call__(self) -> Tensor:
        hidden = self._entry
        for block, (args, kwargs) in zip(self._blocks, self._calls, strict=True):
            hidden = block(hidden, *args, **kwargs)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.body.final_norm(hidden)

    def _swapped(self, arguments, cache):
        """The arguments with the model's growing cache replaced by one that stays as it is."""
        if isinstance(arguments, dict):
            return {name: self._swapped_one(value, cache) for name, value in arguments.items()}
        return tuple(self._swapped_one(value, cache) for value in arguments)

    def _swapped_one(self, value, cache):
        return self._kept if cache is not None and value is cache else value


class _Kept:
    """Keys and values of the unchanged columns; what a block adds is used once and not kept."""

    def __init__(self, cache) -> None:
        self._pairs = [(layer.keys, layer.values) for layer in cache.layers]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        kept_keys, kept_values = self._pairs[layer_idx]
        return torch.cat([kept_keys, keys], -2), torch.cat([kept_values, values], -2)


class _Enough(Exception):
    """Ends a forward pass when nothing above is wanted."""


def run(body: FeedForwards, grid: Grid) -> Tensor:
    """(R, T, d) last hidden states; padding on either side changes nothing at real positions."""
    if not grid.is_left_padded:
        return _hidden(body, grid.ids_RT)
    mask_RT = grid.mask()
    positions = {}
    if "position_ids" in inspect.signature(body.transformer.base_model.forward).parameters:
        positions["position_ids"] = (mask_RT.cumsum(-1) - 1).clamp(min=0)
    return _hidden(body, grid.ids_RT, attention_mask=mask_RT, **positions)


def run_until(body: FeedForwards, grid: Grid, last_layer: int) -> None:
    """Run up to and including a block, for the sake of hooks that are open."""

    def stop(*_: Any) -> None:
        raise _Enough

    handle = body.blocks[last_layer].register_forward_hook(stop)  # after the hooks that are open already
    try:
        run(body, grid)
    except _Enough:
        pass
    finally:
        handle.remove()


@torch.no_grad()
def neurons_at(
    body: FeedForwards, rows: Sequence[Row], layers: Sequence[int], *, position: str = "subject_last"
) -> dict[int, Tensor]:
    """Neurons of every row's prompt, (rows, m) for each layer.

    Args:
        position: `subject_last` reads the lookup position, `prompt_last` the last token, `mean` the mean over all tokens
            from the lookup position on.

    Raises:
        ValueError: another position.
    """
    if position not in ("subject_last", "prompt_last", "mean"):
        raise ValueError(f"position is {position!r}; it is one of subject_last, prompt_last, mean.")
    found = {layer: torch.empty(len(rows), body.width, dtype=body.dtype, device=body.device) for layer in layers}
    for chosen in bunches([(len(row.prompt), len(row.prompt)) for row in rows], MAX_TOKENS):
        grid = padded([rows[index].prompt for index in chosen], body.device)
        first = [len(rows[i].prompt) - 1 if position == "prompt_last" else rows[i].lookup for i in chosen]
        weight_RT = _reading_weights(grid, first, position == "mean").to(body.dtype)

        def read(layer: int, chosen=chosen, grid=grid, weight_RT=weight_RT):
            def keep(neurons_Nm: Tensor) -> None:
                neurons_RTm = neurons_Nm.view(*grid.ids_RT.shape, -1)
                found[layer][chosen] = torch.einsum("rt,rtm->rm", weight_RT, neurons_RTm)

            return keep

        with body.at_inputs({layer: read(layer) for layer in layers}):
            run_until(body, grid, max(layers))
    return found


def _reading_weights(grid: Grid, first_R: list[int], to_the_end: bool) -> Tensor:
    position_T = torch.arange(grid.ids_RT.shape[1], device=grid.ids_RT.device)
    first_R1 = torch.tensor(first_R, device=grid.ids_RT.device)[:, None]
    if not to_the_end:
        return (position_T == first_R1).float()
    inside_RT = ((position_T >= first_R1) & (position_T < grid.length_R[:, None])).float()
    return inside_RT / inside_RT.sum(-1, keepdim=True)


@contextmanager
def _watched(blocks: Sequence[nn.Module]):
    """Yields a list that fills with (hidden states, other arguments, keyword arguments) of each block's call."""
    calls: list[tuple] = []

    def keep(module, args, kwargs) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        calls.append((hidden.detach(), tuple(args[1:]), kwargs))

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _keys_and_values(body: FeedForwards, ids_RT: Tensor):
    return body.transformer.base_model(input_ids=ids_RT, use_cache=True).past_key_values


def _hidden(body: FeedForwards, ids_RT: Tensor, **settings: Any) -> Tensor:
    use_cache = settings.get("past_key_values") is not None
    return body.transformer.base_model(input_ids=ids_RT, use_cache=use_cache, **settings).last_hidden_state
