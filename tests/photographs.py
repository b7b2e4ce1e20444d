"""Real photographs to measure quality with; tests that need them skip where they are not.

Looked for in the folder that GRAFT_TEST_DATA names, else in `shared/data` beside the
repository: `hymenoptera_data` (ants and bees) and `pacs-small` (photo, cartoon).
"""

import os
from pathlib import Path

import pytest

_BESIDE = Path(__file__).parents[2] / "shared" / "data"


def folder(name: str) -> Path:
    """The folder of that name; skips the test where there is none."""
    root = Path(os.environ.get("GRAFT_TEST_DATA", _BESIDE)).resolve()
    if not (root / name).is_dir():
        pytest.skip(f"there is no {name} in {root}: set GRAFT_TEST_DATA to the folder that has it")
    return root / name
