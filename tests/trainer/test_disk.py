"""A real full device, /dev/full, under what the trainer writes with."""

import errno
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from service.contract import ExitCode, Failed, FeatureBased, ImageSource, JobSpec, Record
from service.errors import Reason
from trainer import __main__ as program
from trainer import disk, train

FULL = Path("/dev/full")


def with_python() -> None:
    FULL.write_bytes(b"x")


def with_torch() -> None:
    with FULL.open("wb") as file:
        torch.save(torch.zeros(100_000), file)


def with_sqlite() -> None:
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("PRAGMA max_page_count = 2")
        connection.execute("CREATE TABLE t (x)")
        connection.execute("INSERT INTO t VALUES (zeroblob(100000))")
    finally:
        connection.close()


def with_json() -> None:
    with FULL.open("w") as file:
        json.dump({"x": "y" * 100_000}, file)


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "write",
    [with_python, with_torch, with_sqlite, with_json],
)
def test_a_full_disk_shows_whoever_writes(write: Any) -> None:
    with pytest.raises(Exception) as caught:
        write()
    assert disk.is_full(caught.value), repr(caught.value)


def test_a_full_disk_shows_in_the_words_of_safetensors() -> None:
    # It writes beside a file and renames, which must not be tried on a device.
    error = SafetensorError("I/O error: No space left on device (os error 28)")
    assert disk.is_full(error)


def test_another_error_is_none_of_a_full_disk() -> None:
    for error in (OSError(errno.EIO, os.strerror(errno.EIO)), KeyError("full"), MemoryError()):
        assert not disk.is_full(error)


def test_an_error_beside_a_full_disk_that_was_dealt_with_is_another_one() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def raised(error: Exception, *, cause: Exception | None = None) -> Exception:
        # What `raise error` and `raise error from cause` do while `full` is handled.
        error.__context__ = full
        if cause is not None:
            error.__cause__ = cause
        return error

    assert not disk.is_full(raised(ValueError("no such class")))
    assert not disk.is_full(raised(OSError(errno.EIO, "broken"), cause=KeyError("x")))
    assert disk.is_full(raised(ValueError("not written"), cause=full))
    # As a library raises while it closes what it could not write.
    assert disk.is_full(raised(OSError("not written")))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), Reason.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: no"), Reason.OUT_OF_MEMORY),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), Reason.STORAGE_FULL),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), Reason.STORAGE_FULL),
    ],
)
def test_training_that_lacks_memory_or_room_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: Reason
) -> None:
    def run(*_: object) -> None:
        raise error

    monkeypatch.setattr(train, "run", run)
    spec = JobSpec(
        job_id="job-1",
        model="m",
        data=ImageSource(folder="d"),
        out_dir="o",
        method=FeatureBased(),
        weights_dir="w",
    )
    sent: list[Record] = []
    assert program._train(spec, sent.append) == ExitCode.FAILED
    [failed] = sent
    assert isinstance(failed, Failed)
    assert failed.reason is reason
