"""Blobs are put before what names them, found by their digests, and checked when they are read."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.errors import Damaged, Reason
from service.storage.blob_cache import BlobCache, InPlace
from service.storage.blobs import Blob, BlobFolder, BlobGone, Blobs, DigestMismatch
from service.storage.collector import Collector
from service.storage.database import Database
from tests.unit.storage.conftest import digest

GUARD_S = 60.0


@pytest.fixture
def found() -> list[str]:
    """An entry for each blob that was found damaged."""
    return []


@pytest.fixture
def blobs(database: Database, store: BlobFolder, found: list[str]) -> Blobs:
    return Blobs(database, store, InPlace(store), lambda: found.append("damaged"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "head"
    path.write_bytes(b"a head")
    return path


def put(blobs: Blobs, folder: Path, content: bytes) -> Blob:
    path = folder / "content"
    path.write_bytes(content)
    return blobs.put(path)


def marked(database: Database) -> dict[str, bool]:
    """Whether each blob is marked, by its digest."""
    with database.read() as connection:
        found = connection.execute("SELECT * FROM blobs").fetchall()
    return {row["digest"]: row["doomed_s"] is not None for row in found}


def test_what_is_put_is_read_by_its_digest(blobs: Blobs, file: Path) -> None:
    blob = blobs.put(file)

    assert (blob.digest, blob.size_bytes) == (digest(b"a head"), 6)
    assert blobs.read(blob.digest, "head") == b"a head"
    with blobs.files([blob.digest]) as files:
        assert files[blob.digest].read_bytes() == b"a head"


def test_content_that_is_not_its_digest_is_not_stored(
    blobs: Blobs, store: BlobFolder, file: Path
) -> None:
    with pytest.raises(DigestMismatch):
        blobs.put(file, digest(b"another head"))

    assert list(store.names()) == []


def test_a_missing_blob_is_reported(blobs: Blobs, found: list[str]) -> None:
    with pytest.raises(Damaged, match="the head is missing") as raised:
        blobs.read(digest(b"nothing"), "head")

    assert raised.value.reason is Reason.MODEL_UNLOADABLE
    assert found == ["damaged"]


def test_a_damaged_blob_is_reported_and_whole_again_when_it_is_put(
    blobs: Blobs, store: BlobFolder, file: Path, found: list[str]
) -> None:
    blob = blobs.put(file)
    store.path(blob.name).write_bytes(b"A head")

    with pytest.raises(Damaged, match="the head is damaged"):
        blobs.read(blob.digest, "head")
    assert blobs.are_there([blob.digest]) == set()
    with pytest.raises(Damaged, match="missing"):
        blobs.read(blob.digest, "head")

    blobs.put(file)
    assert blobs.read(blob.digest, "head") == b"a head"
    assert found == ["damaged"], "it is reported once, however often it is found"


def test_what_was_collected_before_it_was_referenced_is_to_be_put_again(
    database: Database, store: BlobFolder, blobs: Blobs, file: Path
) -> None:
    blob = blobs.put(file)
    assert Collector(database, store, grace_s=0).run().deleted == 1

    with pytest.raises(BlobGone), database.transaction() as connection:
        blobs.reference(connection, [blob])

    again = blobs.put(file)
    with database.transaction() as connection:
        blobs.reference(connection, [again])


def test_what_another_intends_to_put_is_not_taken_for_what_was_seen(
    database: Database, store: BlobFolder, blobs: Blobs, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = blobs.put(file)
    Collector(database, store, grace_s=0).run()

    def dies(*_: object) -> None:
        raise OSError("no disk")

    # Another process has written its intent, and not yet its object.
    with monkeypatch.context() as patch:
        patch.setattr(store, "put", dies)
        with pytest.raises(OSError, match="no disk"):
            blobs.put(file)

    with pytest.raises(BlobGone), database.transaction() as connection:
        blobs.reference(connection, [seen])


def test_a_blob_that_is_there_is_found_and_referenced_again(
    database: Database, store: BlobFolder, blobs: Blobs, file: Path
) -> None:
    blob = blobs.put(file)

    found = blobs.find(blob.digest)

    assert found == blob
    with database.transaction() as connection:
        blobs.reference(connection, [found])
    store.delete(blob.name)
    assert blobs.find(blob.digest) is None
    assert blobs.find(digest(b"nothing")) is None


def test_content_that_is_put_while_it_is_deleted_is_another_object(
    database: Database, store: BlobFolder, blobs: Blobs, file: Path
) -> None:
    before = blobs.put(file)
    again: list[Blob] = []

    class Slow(BlobFolder):
        def delete(self, name: str) -> None:
            again.append(blobs.put(file))
            with database.transaction() as connection:
                blobs.reference(connection, again)
            super().delete(name)

    slow = Slow(store.path("ab").parent.parent)
    assert Collector(database, slow, grace_s=0).run().deleted == 1

    assert again[0].digest == before.digest
    assert list(store.names()) == [again[0].name] != [before.name]
    assert blobs.read(before.digest, "head") == b"a head"


class Remote:
    """A store that cannot be read in place, and counts what it hands out."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = contents
        self.gets: list[str] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_asked = threading.Event()

    def get(self, name: str, target: Path) -> str:
        wanted = name.removesuffix("-1")
        self.gets.append(wanted)
        self.is_asked.set()
        assert self.may_go_on.wait(GUARD_S)
        if wanted not in self.contents:
            raise FileNotFoundError(name)
        target.write_bytes(self.contents[wanted])
        return digest(self.contents[wanted])


ONE, TWO, THREE = (
    Blob(digest(content), len(content), "1") for content in (b"one", b"two", b"three")
)


@pytest.fixture
def remote() -> Remote:
    return Remote({ONE.digest: b"one", TWO.digest: b"two", THREE.digest: b"three"})


def cache(remote: Remote, tmp_path: Path, max_bytes: int = 100) -> BlobCache:
    return BlobCache(remote, tmp_path / "cache", max_bytes)  # type: ignore[arg-type]


def test_a_cache_fetches_each_blob_once(remote: Remote, tmp_path: Path) -> None:
    cached = cache(remote, tmp_path)

    assert [cached.read(ONE), cached.read(ONE), cached.read(TWO)] == [b"one", b"one", b"two"]
    assert remote.gets == [ONE.digest, TWO.digest]
    # And another process finds it there.
    assert cache(remote, tmp_path).read(ONE) == b"one"
    assert remote.gets == [ONE.digest, TWO.digest]


def test_many_who_want_the_same_wait_for_one_fetch(remote: Remote, tmp_path: Path) -> None:
    cached = cache(remote, tmp_path)
    remote.may_go_on.clear()
    got: list[bytes] = []
    threads = [threading.Thread(target=lambda: got.append(cached.read(ONE))) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert remote.is_asked.wait(GUARD_S)
    remote.may_go_on.set()
    for thread in threads:
        thread.join(GUARD_S)

    assert got == [b"one"] * 8
    assert remote.gets == [ONE.digest]


def test_a_failed_fetch_fails_all_who_wait_and_is_tried_again_by_the_next(
    remote: Remote, tmp_path: Path
) -> None:
    cached = cache(remote, tmp_path)
    content = remote.contents.pop(ONE.digest)

    with pytest.raises(FileNotFoundError):
        cached.read(ONE)
    remote.contents[ONE.digest] = content

    assert cached.read(ONE) == b"one"


def test_a_cache_keeps_what_was_used_last_and_what_is_in_use(
    remote: Remote, tmp_path: Path
) -> None:
    cached = cache(remote, tmp_path, max_bytes=6)
    cached.read(ONE)
    cached.read(TWO)
    cached.read(ONE)
    with cached.files([THREE]) as files:
        assert files[THREE.digest].read_bytes() == b"three"
        assert cached.nbytes == 11
    # `three` was used last, and `one` does not fit beside it.
    assert cached.nbytes == 5
    cached.read(THREE)
    assert remote.gets == [ONE.digest, TWO.digest, THREE.digest]


def test_a_file_that_is_damaged_in_the_cache_is_fetched_again(
    remote: Remote, tmp_path: Path
) -> None:
    cached = cache(remote, tmp_path)
    cached.read(ONE)
    (tmp_path / "cache" / ONE.digest).write_bytes(b"0ne")

    assert cached.read(ONE) == b"one"
    assert remote.gets == [ONE.digest, ONE.digest]


@pytest.mark.parametrize("content", [b"0ne", b"", None])
def test_a_file_that_is_damaged_before_a_start_is_fetched_before_its_first_use(
    remote: Remote, tmp_path: Path, content: bytes | None
) -> None:
    cache(remote, tmp_path).read(ONE)
    file = tmp_path / "cache" / ONE.digest
    cached = cache(remote, tmp_path)
    file.unlink() if content is None else file.write_bytes(content)

    with cached.files([ONE]) as files:
        assert files[ONE.digest].read_bytes() == b"one"
    assert cached.nbytes == 3
    # From then on its size alone is looked at, which costs nothing.
    os.truncate(file, 1)
    with cached.files([ONE]) as files:
        assert files[ONE.digest].read_bytes() == b"one"
    assert remote.gets == [ONE.digest] * 3


def test_what_comes_damaged_is_fetched_twice_and_then_reported(
    remote: Remote, tmp_path: Path, database: Database, store: BlobFolder
) -> None:
    remote.contents[ONE.digest] = b"0ne"
    blobs = Blobs(database, store, cache(remote, tmp_path))
    with database.transaction() as connection:
        connection.execute(
            "INSERT INTO blobs (digest, size_bytes, generation, touched_s) VALUES (?, 3, '1', 0)",
            (ONE.digest,),
        )

    with pytest.raises(Damaged, match="the backbone is damaged"):
        blobs.read(ONE.digest, "backbone")

    assert remote.gets == [ONE.digest, ONE.digest]
    assert list((tmp_path / "cache").iterdir()) == []


@contextmanager
def needing(database: Database) -> Iterator[None]:
    """A table of the test's own, whose rows need blobs: the collector finds it by its key."""
    with database.transaction() as connection:
        connection.execute("CREATE TABLE needs (digest TEXT REFERENCES blobs (digest))")
    yield


def test_only_what_no_row_names_is_collected_and_only_after_two_times_the_grace(
    database: Database, store: BlobFolder, blobs: Blobs, tmp_path: Path
) -> None:
    kept, dropped = (put(blobs, tmp_path, content) for content in (b"kept", b"dropped"))
    with needing(database), database.transaction() as connection:
        blobs.reference(connection, [kept])
        connection.execute("INSERT INTO needs VALUES (?)", (kept.digest,))

    def an_hour_passes() -> None:
        with database.transaction() as connection:
            connection.execute(
                "UPDATE blobs SET touched_s = touched_s - 3600, doomed_s = doomed_s - 3600"
            )

    collector = Collector(database, store, grace_s=3600)
    assert collector.run().marked == 0
    an_hour_passes()
    assert (collector.run().marked, len(marked(database))) == (1, 2)
    assert collector.run().deleted == 0
    an_hour_passes()
    assert collector.run().deleted == 1

    assert marked(database) == {kept.digest: False}
    assert blobs.are_there([kept.digest, dropped.digest]) == {kept.digest}


def test_an_object_without_a_row_is_deleted(
    database: Database, store: BlobFolder, blobs: Blobs, file: Path
) -> None:
    blob = blobs.put(file)
    store.put(f"{blob.digest}-00000000", file, blob.digest)

    assert Collector(database, store, grace_s=3600).run().stray == 1

    assert list(store.names()) == [blob.name]


def test_copies_of_what_was_collected_are_deleted_unless_somebody_uses_them(
    database: Database, store: BlobFolder, tmp_path: Path
) -> None:
    local = BlobCache(store, tmp_path / "cache", 100)
    blobs = Blobs(database, store, local)
    kept, gone = (put(blobs, tmp_path, content) for content in (b"kept", b"gone"))
    with blobs.files([kept.digest, gone.digest]) as files, needing(database):
        with database.transaction() as connection:
            blobs.reference(connection, [kept])
            connection.execute("INSERT INTO needs VALUES (?)", (kept.digest,))
        collector = Collector(database, store, grace_s=0)
        collector.run()
        collector.run()
        blobs.trim()
        assert files[gone.digest].read_bytes() == b"gone"
    blobs.trim()
    assert local.held() == [kept.digest]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [kept.digest]
