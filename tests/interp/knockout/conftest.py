"""Lanes multiply by oneDNN however few their rows are: those of tiny models would hardly ever be enough."""

import pytest

from hooks import linears


@pytest.fixture(autouse=True)
def _onednn_from_the_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "ROWS", 1)
