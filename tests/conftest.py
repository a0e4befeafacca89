"""Fixtures that several folders of tests share."""

from __future__ import annotations

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def byte_level_tokenizer():
    """Byte-level BPE with 360 tokens; see `tests.tiny`."""
    return tiny.byte_level_tokenizer()


@pytest.fixture(scope="session")
def sentencepiece_tokenizer():
    """BPE with `▁` for spaces and byte fall-back; see `tests.tiny`."""
    return tiny.sentencepiece_tokenizer()
