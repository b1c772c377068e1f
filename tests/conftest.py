"""Fixtures that several rooms share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text and models kept beside the project; tests that need them skip where they are not."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the shared data folder is not beside the project")
    return path
