"""What tests of the scheduling share: no waiting for charts."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def reports_take_little(quick_charts: None) -> None:
    """Whole sweeps end with one."""
