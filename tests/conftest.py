"""Fixtures of all tests."""

import pytest

from tests.copies import Copies
from tests.loopback_hub import connect_clients, serve_hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on which this process, and those it starts, are logged in."""
    with serve_hub() as loopback:
        connect_clients(monkeypatch, loopback, tmp_path / "home")
        yield loopback


@pytest.fixture(scope="session")
def copies():
    """Runs Python commands without the seconds that their imports take: `copies.run(command)`."""
    with Copies() as running:
        yield running
