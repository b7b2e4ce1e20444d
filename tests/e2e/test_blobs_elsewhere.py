"""A server whose blobs lie outside its data folder, with a cache of them inside."""

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path

import graftml
import pytest

from service import fsck
from tests.e2e.conftest import GUARD_S, Connect, ServiceProcess, StartService, register_small

pytestmark = pytest.mark.e2e

MIB = 2**20


def rot(cache: Path) -> None:
    """Damages every file of a cache, half of them without a change of size."""
    for number, path in enumerate(sorted(cache.iterdir())):
        content = path.read_bytes()
        flipped = bytes(byte ^ 1 for byte in content[:1]) + content[1:]
        path.write_bytes(flipped if number % 2 else b"")


def sound(cache: Path) -> set[str]:
    """Returns the digests of files that are what they should be."""
    return {
        path.name
        for path in cache.iterdir()
        if hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    }


def test_blobs_lie_elsewhere_and_a_cache_that_rots_is_filled_again(
    start_service: StartService, connect: Connect, digits: Path, tmp_path: Path
) -> None:
    elsewhere, cache = tmp_path / "elsewhere", tmp_path / "data" / "cache"

    def start() -> tuple[ServiceProcess, graftml.Client]:
        service = start_service(
            f"--blobs-dir={elsewhere}", "--blob-cache-mb=1", "--warm-trainers=0",
            # Else answers are rounded by who computes them, and with how many others.
            "--provider=cpu", "--threads=1", "--max-batch=1",
        )  # fmt: skip
        return service, connect(service)

    def learn(client: graftml.Client) -> int:
        job = client.fine_tune(digits, name="digits", backbone="onnx/small", seed=1)
        return job.wait(timeout_s=GUARD_S).version

    images = sorted(digits.rglob("*.png"))[::20]
    service, client = start()
    register_small(client, tmp_path, width=512)
    assert learn(client) == 1
    answers = client.predict(images, model="digits")
    report = client.get_report_html("digits")
    assert not (tmp_path / "data" / "blobs").exists()
    # The backbone, too large for the cache, was not kept there after its use.
    kept = {path.name: path.stat().st_size for path in cache.iterdir()}
    assert kept
    assert sum(kept.values()) <= MIB
    largest = max(elsewhere.glob("??/*"), key=lambda path: path.stat().st_size)
    assert largest.stat().st_size > MIB
    assert largest.name.partition("-")[0] not in kept

    assert sound(cache) == kept.keys()
    rot(cache)
    assert not sound(cache)
    assert client.get_report_html("digits") == report
    assert service.end() == 0

    # What rots while no server runs is noticed at its first use.
    rot(cache)
    service, client = start()
    assert client.predict(images, model="digits") == answers
    assert client.get_report_html("digits") == report
    assert learn(client) == 2
    with closing(sqlite3.connect(tmp_path / "data" / "graft.sqlite3")) as database:
        packs = {digest for (digest,) in database.execute("SELECT digest FROM dataset_packs")}
    assert packs <= sound(cache)
    assert service.end() == 0
    assert fsck.problems(tmp_path / "data", elsewhere) == []
