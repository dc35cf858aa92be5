"""A search without recorded configurations."""

from __future__ import annotations

import pytest

from foldrace.search_spaces import portfolio


@pytest.fixture
def nothing_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sampler does depends on no table of the product."""
    monkeypatch.setattr(portfolio, "recorded", lambda: {"scratch": [], "pretrained": []})
