"""A language model under edits that come and go: cached values while a block is open, changes of weights composed anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lit_llm.editing.deltas import Edit, base_digest
from lit_llm.editing.edit_cache import CachedEdit, EditCache
from lit_llm.editing.edit_stack import EditStack
from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.triggers import Trigger
from lit_llm.models.language_model import LanguageModel

EDITS_FILE = "edits.safetensors"


class EditedModel:
    """A model whose base stays as it is, whatever acts on it.

    Args:
        model: as it is before any edit, in eval mode.
        trigger: of cached edits that were stored with a threshold for their relation; the others are triggered by the
            subject alone.

    Attributes:
        digest: of the base's weights.
        body: the base's feed-forward blocks; between blocks of `under`, its weights are those of `rest`.

    Raises:
        ValueError: an architecture that cannot be edited.
    """

    def __init__(self, model: LanguageModel, trigger: Trigger | None = None) -> None:
        self.model, self.trigger = model, trigger or Trigger()
        self.body = FeedForwards(model.transformer)
        self.digest = base_digest(self.body)
        self._stack = EditStack(self.body)

    @contextmanager
    def under(self, edits: Iterable[Edit], prompt_lengths: Sequence[int] | None = None) -> Iterator[EditCache | None]:
        """While open, the model answers with these edits and no others; afterwards it is the base, bit for bit.

        Args:
            edits: cached ones act where their trigger says, the others everywhere.
            prompt_lengths: see `EditCache.active`.

        Raises:
            ValueError: cached edits in different layers, or edits of another model.

        Yields:
            The cache of the cached ones, whose `firings` say what the trigger did with each row of the last pass; None without
            any.
        """
        edits = list(edits)
        with ExitStack() as opened:
            of_weights = [edit for edit in edits if not isinstance(edit, CachedEdit)]
            if of_weights:
                opened.callback(self._stack.undo)
                self._stack.apply(of_weights)
            cached = [edit for edit in edits if isinstance(edit, CachedEdit)]
            # one for all, so that at most one edit acts on a text
            cache = EditCache(self.body, self.model.tokenizer, cached, self.trigger) if cached else None
            if cache is not None:
                opened.enter_context(cache.active(prompt_lengths=prompt_lengths))
            yield cache

    def save(self, edits: Sequence[Edit], folder: Path) -> None:
        """Write the model under changes of weights as a plain Hugging Face folder.

        Raises:
            ValueError: cached edits, which no folder of weights can hold.
        """
        if cached := [edit for edit in edits if isinstance(edit, CachedEdit)]:
            raise ValueError(
                f"{len(cached)} edits are cached values, e.g. {cached[0].fact.id!r}: they are added to neurons where a text is "
                f"about their subject, which a Hugging Face folder of weights cannot say. Keep the file {EDITS_FILE} beside the "
                f"base model, where `ask` reads both, or let `bake` approximate them by a change of the weights."
            )
        with self.under(edits):
            self.model.save(folder)
