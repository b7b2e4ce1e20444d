"""What callers are told of a trainer that was killed: for certain where the kernel says so."""

from collections.abc import Iterator

import pytest

from service.jobs.killed import Deaths
from service.ops import cgroups

GUESS = (
    "the trainer was killed (SIGKILL), as the system does when memory runs out: use less, or "
    "give the server more memory, unless somebody killed it"
)
CERTAIN = (
    "the system killed the trainer because memory ran out: use less, or give the server more memory"
)


@pytest.mark.parametrize(
    ("counts", "limit", "told"),
    [
        ((2, 3), None, CERTAIN),
        ((0, 1), 800 * 2**20, f"{CERTAIN} than the 800 MiB of its control group"),
        ((2, 2), 800 * 2**20, GUESS),
        # It was moved to another group meanwhile.
        ((2, 1), None, GUESS),
        ((None, 3), None, GUESS),
        ((2, None), None, GUESS),
        ((None, None), None, GUESS),
    ],
)
def test_it_is_certain_only_where_the_kernels_count_rose(
    counts: tuple[int | None, int | None],
    limit: int | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left: Iterator[int | None] = iter(counts)
    monkeypatch.setattr(cgroups, "kill_count", lambda: next(left))
    monkeypatch.setattr(cgroups, "limit_bytes", lambda: limit)
    assert Deaths().why_killed("use less") == told
