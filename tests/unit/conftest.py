"""A data folder with a bit of everything in it, for what works on whole ones."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stays as it is: a test gets a copy of it, `data`."""
    from tests.data_folder import make_data_folder

    return make_data_folder(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "data")
