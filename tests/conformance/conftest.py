"""The real service as its own tests run it: with fakes for the trainer and the runtime alone."""

from pathlib import Path

import pytest

from tests.conformance.scenarios import image
from tests.rpc.conftest import make_service, read_here, unhurried

__all__ = ["images", "make_service", "read_here", "unhurried"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Folders of images, and in each what is left out: `first`, `more` and `target`."""
    for name, side in (("first", 40), ("more", 60), ("target", 80)):
        for label in ("cat", "dog"):
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(3):
                file = tmp_path / name / label / f"{number}.png"
                file.write_bytes(image("red" if label == "cat" else "blue", side + number))
        (tmp_path / name / "cat" / ".hidden").write_text("x")
        (tmp_path / name / "dog" / "link.png").symlink_to(tmp_path / name / "cat" / "0.png")
    return tmp_path
