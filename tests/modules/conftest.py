"""Fixtures of the modules' tests."""

from __future__ import annotations

import pytest

from any4d_fast import head_precision


@pytest.fixture
def fresh_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said once can be said again."""
    monkeypatch.setattr(head_precision, "_WARNED", set())
