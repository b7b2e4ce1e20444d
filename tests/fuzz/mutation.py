"""Seeds damaged at random by hypothesis: for the suite, and where there is no atheris."""

import hashlib
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.promise import Target

_NUMBERS = [b"\0", b"\xff", b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\x80", b"../", b"[" * 50]


def damaged(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """A seed with up to six changes: bytes replaced, put in, left out, cut off or repeated."""
    change = st.tuples(
        st.sampled_from(["put", "insert", "delete", "cut", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=4) | st.sampled_from(_NUMBERS),
    )
    changes = st.lists(change, min_size=1, max_size=6)
    return st.builds(_changed, st.sampled_from(seeds), changes)


def _changed(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, part, piece in changes:
        at = int(part * len(data))
        before, after = data[:at], data[at:]
        if kind == "put":
            data = before + piece + after[len(piece) :]
        elif kind == "insert":
            data = before + piece + after
        elif kind == "delete":
            data = before + after[len(piece) :]
        elif kind == "cut":
            data = before or data
        else:
            data = before + after[:64] + after
    return data


def check(target: Target, runs: int, found: Path | None = None) -> int:
    """Runs so many inputs, the same every time; writes one that breaks a promise to `found`."""
    ran = 0

    @settings(
        max_examples=runs,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(target.seeds()))
    def one(data: bytes) -> None:
        nonlocal ran
        ran += 1
        try:
            target.keeps_its_promise(data)
        except BaseException:
            if found is not None:
                digest = hashlib.sha256(data).hexdigest()[:16]
                (found / f"{target.name}-{digest}").write_bytes(data)
            raise

    one()
    return ran
