"""How the whole suite runs: computing on one thread a process, and what takes longest first."""

import os

import pytest

# Before anything imports NumPy or PyTorch. As many files are tested at once as there are cores,
# and threads of one process beside another's spin while they wait for each other: twice the
# processor time, and many times the clock's. Processes that are started inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

_LONGEST_FIRST = ("e2e", "trainer", "rpc")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the folders whose files take longest first: at the end only short files are left."""

    def place(item: pytest.Item) -> int:
        folders = item.path.parts
        return next((n for n, name in enumerate(_LONGEST_FIRST) if name in folders), 9)

    items.sort(key=place)
