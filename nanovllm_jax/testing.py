"""Pytest fixtures for code that runs the engine: `pytest_plugins = ["nanovllm_jax.testing"]`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nanovllm_jax.inspection.recompile import no_recompile as guard


@pytest.fixture
def no_recompile() -> Iterator[None]:
    """The test fails if anything compiles after this fixture is set up; ask for it after those that warm up."""
    with guard():
        yield
