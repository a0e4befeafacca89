"""Fixtures that several folders of tests share."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests import tiny

# A busy machine is slow, not wrong.
settings.register_profile("lit_llm", deadline=None)
settings.load_profile("lit_llm")


@pytest.fixture(scope="session")
def byte_level_tokenizer():
    """Byte-level BPE with 360 tokens; see `tests.tiny`."""
    return tiny.byte_level_tokenizer()


@pytest.fixture(scope="session")
def sentencepiece_tokenizer():
    """BPE with `▁` for spaces and byte fall-back; see `tests.tiny`."""
    return tiny.sentencepiece_tokenizer()
