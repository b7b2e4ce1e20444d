"""Datasets that are made of others, and images that are erased from all that have them."""

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.domain import LeftOut, LeftOutReason, VersionSource
from service.errors import GraftError, InvalidInput, OverQuota, Reason
from service.storage import dataset_rows, version_rows
from service.storage.blobs import Blobs
from service.storage.changes import Changes
from service.storage.collector import Collector
from service.storage.database import Database
from service.storage.dataset_edits import DatasetEdits
from service.storage.dataset_keeping import DatasetChanged, DatasetKeeper
from service.storage.datasets import DatasetRecord, DatasetStore
from tests.keys import BIRDS
from tests.unit.ingest.packing import tar_of
from tests.unit.storage.conftest import GUARD_S, TENANT, Publish, digest
from tests.unit.storage.test_datasets import IMAGES, Images, index_of, leftovers, stored, upload

OTHER = "acme"


@pytest.fixture
def forgotten() -> list[tuple[str, str]]:
    """Tenants and digests of the images whose features were forgotten."""
    return []


@pytest.fixture
def edits(
    database: Database, keeper: DatasetKeeper, forgotten: list[tuple[str, str]]
) -> DatasetEdits:
    return DatasetEdits(database, keeper, Changes(database), lambda *image: forgotten.append(image))


def add(
    datasets: DatasetStore, dataset_id: str, images: Images, **options: object
) -> DatasetRecord:
    sending = datasets.begin_adding(dataset_id, "", "", tenant=TENANT, **options)  # type: ignore[arg-type]
    try:
        for label, content, split in images:
            sending.add_image(label, content, "", split)
        return sending.finish()
    finally:
        sending.abort()


def contents(datasets: DatasetStore, dataset_id: str, tenant: str = TENANT) -> dict[bytes, str]:
    return {c: label for _, label, c in stored(datasets, dataset_id, tenant).values()}


def held(blobs: Blobs, database: Database) -> bytes:
    """Returns every byte that is kept, once nothing unneeded is."""
    collector = Collector(database, blobs._store, grace_s=0)
    collector.run()
    collector.run()
    names = list(blobs._store.names())
    return b"".join(blobs._store.path(name).read_bytes() for name in names)  # type: ignore[union-attr]


def test_more_images_make_a_dataset_that_shares_what_is_there(
    datasets: DatasetStore, tmp_path: Path
) -> None:
    first = upload(datasets, IMAGES)
    more = add(datasets, first.dataset_id, [("dog", b"PIC4", ""), ("cat", b"PIC1", "")])
    assert (more.display_name, more.image_count) == ("pets", 4)
    assert contents(datasets, more.dataset_id) == {
        b"PIC1": "cat", b"PIC2": "cat", b"PIC3": "dog", b"PIC4": "dog",
    }  # fmt: skip
    assert more.summary.left_out == [LeftOut(LeftOutReason.COPY, "cat", 1)]
    old, new = (index_of(datasets, each.dataset_id) for each in (first, more))
    assert len(new.packs) == 2 and set(old.packs) < set(new.packs)
    assert datasets.get(first.dataset_id, TENANT) == first
    # The same dataset as one that was sent whole.
    whole = upload(datasets, [*IMAGES, ("dog", b"PIC4", "")])
    assert whole.dataset_id == more.dataset_id
    assert len(index_of(datasets, more.dataset_id).packs) == 1
    assert leftovers(tmp_path) == []


def test_an_archive_is_added_too_and_what_was_added_stays_without_the_first(
    datasets: DatasetStore, blobs: Blobs, database: Database
) -> None:
    first = upload(datasets, IMAGES)
    sending = datasets.begin_adding(first.dataset_id, "all", "tar", tenant=TENANT)
    sending.write(tar_of({"dog/4.png": b"PIC4"}))
    more = sending.finish()
    datasets.delete(first.dataset_id, TENANT)
    held(blobs, database)
    assert more.display_name == "all"
    assert len(contents(datasets, more.dataset_id)) == 4


def test_images_that_are_all_there_give_the_dataset_with_what_was_left_out(
    datasets: DatasetStore,
) -> None:
    first = upload(datasets, IMAGES)
    again = add(datasets, first.dataset_id, [("cat", b"PIC1", "")])
    assert again.dataset_id == first.dataset_id
    assert again.summary.left_out == [LeftOut(LeftOutReason.COPY, "cat", 1)]
    assert len(stored(datasets, first.dataset_id)) == 3


def test_what_two_datasets_share_is_stored_and_counted_once(
    datasets: DatasetStore, edits: DatasetEdits
) -> None:
    images: Images = [("cat", b"PIC%d" % n + b"." * 5000, "") for n in range(9)]
    first = upload(datasets, [*images, ("dog", b"PIC", "")])
    alone = datasets.stored_bytes(TENANT)
    assert 45_000 < alone < 60_000
    edits.relabel(first.dataset_id, {digest(b"PIC"): "wolf"}, TENANT)
    assert datasets.stored_bytes(TENANT) - alone < 5_000
    with pytest.raises(OverQuota):
        edits.relabel(first.dataset_id, {digest(b"PIC"): "fox"}, TENANT, max_stored_bytes=alone + 1)
    with pytest.raises(OverQuota):
        add(datasets, first.dataset_id, [("dog", b"PIC!", "")], max_stored_bytes=alone)


def test_removed_and_relabelled_images_make_datasets_and_move_no_bytes(
    datasets: DatasetStore, edits: DatasetEdits, tmp_path: Path
) -> None:
    first = upload(datasets, IMAGES)
    less = edits.remove(first.dataset_id, [digest(b"PIC2")], TENANT, display_name="less")
    assert contents(datasets, less.dataset_id) == {b"PIC1": "cat", b"PIC3": "dog"}
    moved = edits.relabel(less.dataset_id, {digest(b"PIC1"): "wolf"}, TENANT)
    assert contents(datasets, moved.dataset_id) == {b"PIC1": "wolf", b"PIC3": "dog"}
    assert [r.display_name for r in (first, less, moved)] == ["pets", "less", "less"]
    packs = [datasets.source(each.dataset_id, TENANT).packs for each in (first, less, moved)]
    assert packs[0] == packs[1] == packs[2]
    # Back again, it is the dataset that is there, as it was.
    back = edits.relabel(
        moved.dataset_id, {digest(b"PIC1"): "cat"}, TENANT, display_name="another name"
    )
    assert back == less
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("count", [0, 10_001])
def test_a_call_names_so_many_images(edits: DatasetEdits, count: int) -> None:
    named = [f"{n:064x}" for n in range(count)]
    for change in (
        lambda: edits.remove("ds", named, TENANT),
        lambda: edits.relabel("ds", dict.fromkeys(named, "cat"), TENANT),
    ):
        with pytest.raises(InvalidInput, match=f"names {count} images: name 1 to 10000"):
            change()


def test_images_are_listed_in_pages(datasets: DatasetStore, edits: DatasetEdits) -> None:
    images: Images = [("cat", b"PIC%d" % n, "") for n in range(7)]
    first = upload(datasets, images)
    found, token = [], ""
    while True:
        page, token = edits.images(first.dataset_id, 3, token, TENANT)
        found.append([image.digest for image in page])
        if not token:
            break
        # A page begins where the one before ended, though an image was erased meanwhile.
        if len(found) == 1:
            edits.erase(digest(b"PIC1"), TENANT)
    assert found == [[digest(content) for _, content, _ in images][n : n + 3] for n in (0, 3, 6)]
    other = upload(datasets, IMAGES)
    token = edits.images(first.dataset_id, 3, "", TENANT)[1]
    with pytest.raises(InvalidInput, match="page_token"):
        edits.images(other.dataset_id, 3, token, TENANT)


def test_an_erased_image_is_gone_from_every_dataset_and_from_the_disk(
    datasets: DatasetStore,
    edits: DatasetEdits,
    blobs: Blobs,
    database: Database,
    forgotten: list[tuple[str, str]],
    tmp_path: Path,
) -> None:
    first = upload(datasets, IMAGES)
    more = add(datasets, first.dataset_id, [("dog", b"PIC4", "")])
    less = edits.remove(first.dataset_id, [digest(b"PIC1")], TENANT)
    beside = upload(datasets, [("cat", b"PIC8", ""), ("dog", b"PIC9", "")])
    before = datasets.source(beside.dataset_id, TENANT)
    erased = edits.erase(digest(b"PIC1"), TENANT)
    assert set(erased.dataset_ids) == {first.dataset_id, more.dataset_id}
    assert erased.versions == []
    assert forgotten == [(TENANT, digest(b"PIC1"))]
    for record in (first, more):
        now = datasets.get(record.dataset_id, TENANT)
        assert (now.digest, now.erased_count) == (record.digest, 1)
        assert now.image_count == record.image_count - 1
        assert now.size_bytes == record.size_bytes - 4
        assert b"PIC1" not in contents(datasets, record.dataset_id)
    # What shared the pack has its images still, and what did not is as it was.
    assert contents(datasets, less.dataset_id) == {b"PIC2": "cat", b"PIC3": "dog"}
    assert replace(datasets.get(less.dataset_id, TENANT), index_digest="") == replace(
        less, index_digest=""
    )
    assert datasets.source(beside.dataset_id, TENANT) == before
    kept = held(blobs, database)
    assert b"PIC1" not in kept and b"PIC2" in kept
    assert leftovers(tmp_path) == []
    # Again, it changes nothing and answers the same.
    assert set(edits.erase(digest(b"PIC1"), TENANT).dataset_ids) == set(erased.dataset_ids)


def test_the_last_image_of_a_pack_and_of_a_dataset_may_be_erased(
    datasets: DatasetStore, edits: DatasetEdits, blobs: Blobs, database: Database
) -> None:
    first = upload(datasets, [("cat", b"PIC1", "")])
    edits.erase(digest(b"PIC1"), TENANT)
    now = datasets.get(first.dataset_id, TENANT)
    assert (now.image_count, now.erased_count, now.classes) == (0, 1, [])
    assert datasets.source(first.dataset_id, TENANT).packs == []
    assert b"PIC1" not in held(blobs, database)
    more = add(datasets, first.dataset_id, [("cat", b"PIC1", ""), ("dog", b"PIC2", "")])
    assert more.summary.left_out == [LeftOut(LeftOutReason.ERASED, "cat", 1)]
    assert contents(datasets, more.dataset_id) == {b"PIC2": "dog"}


def test_bytes_that_no_dataset_names_any_more_are_erased_too(
    datasets: DatasetStore, edits: DatasetEdits, blobs: Blobs, database: Database
) -> None:
    first = upload(datasets, IMAGES)
    less = edits.remove(first.dataset_id, [digest(b"PIC1")], TENANT)
    datasets.delete(first.dataset_id, TENANT)
    assert b"PIC1" in held(blobs, database)
    assert edits.erase(digest(b"PIC1"), TENANT).dataset_ids == []
    assert b"PIC1" not in held(blobs, database)
    assert len(contents(datasets, less.dataset_id)) == 2


def test_of_the_same_images_of_another_tenant_none_is_erased(
    datasets: DatasetStore, edits: DatasetEdits
) -> None:
    mine = upload(datasets, IMAGES)
    sending = datasets.begin_upload("", "", tenant=OTHER)
    for label, content, split in IMAGES:
        sending.add_image(label, content, "", split)
    theirs = sending.finish()
    edits.erase(digest(b"PIC1"), TENANT)
    assert len(contents(datasets, mine.dataset_id)) == 2
    assert len(contents(datasets, theirs.dataset_id, OTHER)) == 3


def test_an_erased_image_stays_erased_when_all_are_sent_again(
    datasets: DatasetStore, edits: DatasetEdits, blobs: Blobs, database: Database
) -> None:
    first = upload(datasets, IMAGES)
    edits.erase(digest(b"PIC1"), TENANT)
    again = upload(datasets, IMAGES, "again")
    assert (again.dataset_id, again.digest) == (first.dataset_id, first.digest)
    assert (again.image_count, again.erased_count, again.display_name) == (2, 1, "again")
    assert again.summary.left_out == [LeftOut(LeftOutReason.ERASED, "cat", 1)]
    assert contents(datasets, first.dataset_id) == {b"PIC2": "cat", b"PIC3": "dog"}
    assert b"PIC1" not in held(blobs, database)
    # In another dataset it may come again.
    assert len(contents(datasets, upload(datasets, IMAGES[:2]).dataset_id)) == 2


def test_an_erasure_waits_for_no_change_and_misses_none(
    datasets: DatasetStore,
    keeper: DatasetKeeper,
    edits: DatasetEdits,
    blobs: Blobs,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dataset that is made of one while an image is erased from it has not got the image."""
    first = upload(datasets, IMAGES)
    made: list[DatasetRecord] = []
    put, is_first = keeper._put, iter([True])

    def putting(*what: object) -> object:
        found = put(*what)  # type: ignore[arg-type]
        if next(is_first, False):
            made.append(edits.relabel(first.dataset_id, {digest(b"PIC3"): "wolf"}, TENANT))
        return found

    monkeypatch.setattr(keeper, "_put", putting)
    made_of = edits.erase(digest(b"PIC1"), TENANT)
    assert len(made) == 1
    assert set(made_of.dataset_ids) == {first.dataset_id, made[0].dataset_id}
    assert contents(datasets, made[0].dataset_id) == {b"PIC2": "cat", b"PIC3": "wolf"}
    assert b"PIC1" not in held(blobs, database)


def test_a_change_of_a_dataset_that_is_erased_from_meanwhile_is_made_again(
    datasets: DatasetStore,
    keeper: DatasetKeeper,
    edits: DatasetEdits,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = upload(datasets, IMAGES)
    keep, tries = keeper.keep, []

    def keeping(*what: object, **options: object) -> DatasetRecord:
        tries.append(what)
        if len(tries) == 1:
            edits.erase(digest(b"PIC1"), TENANT)
        return keep(*what, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(keeper, "keep", keeping)
    moved = edits.relabel(first.dataset_id, {digest(b"PIC3"): "wolf"}, TENANT)
    assert len(tries) == 2
    assert contents(datasets, moved.dataset_id) == {b"PIC2": "cat", b"PIC3": "wolf"}
    tries.clear()
    # An upload cannot be read anew: it is sent again.
    monkeypatch.setattr(
        keeper, "keep", lambda *a, **o: edits.erase(digest(b"PIC2"), TENANT) and keep(*a, **o)
    )
    with pytest.raises(DatasetChanged) as caught:
        add(datasets, first.dataset_id, [("dog", b"PIC5", "")])
    assert caught.value.reason is Reason.STORAGE_BUSY
    assert caught.value.retry_after_s


def test_many_erasures_and_changes_at_once_leave_no_byte(
    datasets: DatasetStore, edits: DatasetEdits, blobs: Blobs, database: Database
) -> None:
    images: Images = [("cat", b"PIC%02d" % n, "") for n in range(20)]
    first = upload(datasets, [*images, ("dog", b"PIC dog", "")])
    gone = [content for _, content, _ in images[:6]]
    start = threading.Barrier(8)

    def erase(content: bytes) -> None:
        start.wait(GUARD_S)
        while True:
            try:
                edits.erase(digest(content), TENANT)
            except DatasetChanged:
                continue
            return

    def relabel(number: int) -> None:
        start.wait(GUARD_S)
        label = {digest(images[10 + number][1]): f"wolf {number}"}
        while True:
            try:
                edits.relabel(first.dataset_id, label, TENANT)
            except DatasetChanged:
                continue
            return

    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(erase, content) for content in gone]
        calls += [pool.submit(relabel, number) for number in range(2)]
        for call in calls:
            call.result(GUARD_S)
    records, _ = datasets.list(0, "", TENANT)
    assert len(records) == 3
    for record in records:
        assert record.erased_count == len(gone)
        assert len(contents(datasets, record.dataset_id)) == 15
    kept = held(blobs, database)
    assert not any(content in kept for content in gone)


def test_an_erasure_whose_pack_another_writes_anew_meanwhile_begins_anew(
    datasets: DatasetStore,
    keeper: DatasetKeeper,
    edits: DatasetEdits,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = upload(datasets, IMAGES)
    holding = keeper._holding
    looks: list[str] = []

    def found(image_digest: str, *others: Any) -> list[str]:
        packs = holding(image_digest, *others)
        looks.append(image_digest)
        if len(looks) == 1:
            edits.erase(digest(b"PIC2"), TENANT)
        return packs

    monkeypatch.setattr(keeper, "_holding", found)
    assert edits.erase(digest(b"PIC1"), TENANT).dataset_ids == [first.dataset_id]
    assert not {b"PIC1", b"PIC2"} & contents(datasets, first.dataset_id).keys()


def test_versions_that_were_trained_on_an_image_are_named_and_counted_when_it_is_erased(
    datasets: DatasetStore, edits: DatasetEdits, database: Database, publish: Publish
) -> None:
    first = upload(datasets, IMAGES)
    less = edits.remove(first.dataset_id, [digest(b"PIC1")], TENANT)

    def trained_on(number: int, *sources: VersionSource) -> None:
        publish(BIRDS, f"job-{number}")
        with database.transaction() as connection:
            version_rows.note_sources(connection, TENANT, BIRDS.name, number, sources)

    def counts() -> list[int]:
        with database.read() as connection:
            rows = connection.execute("SELECT erased_images FROM versions ORDER BY version")
            return [row["erased_images"] for row in rows]

    trained_on(1, VersionSource("source", first.dataset_id), VersionSource("source", "", "/x"))
    trained_on(2, VersionSource("source", less.dataset_id))
    trained_on(
        3, VersionSource("source", less.dataset_id), VersionSource("target", first.dataset_id)
    )
    begun_s = time.time()
    erased = edits.erase(digest(b"PIC1"), TENANT)
    assert erased.versions == [("birds", 1), ("birds", 3)]
    assert counts() == [1, 0, 1]
    # One that is published later did not have it, unless its job began before.
    trained_on(4, VersionSource("source", first.dataset_id))
    assert edits.erase(digest(b"PIC1"), TENANT) == erased
    assert edits.erase(digest(b"PIC2"), TENANT).versions == [("birds", n) for n in (1, 2, 3, 4)]
    assert counts() == [2, 1, 2, 1]
    both = [first.dataset_id, less.dataset_id]
    with database.read() as connection:
        assert dataset_rows.erased_since(connection, both, TENANT, begun_s) == 2
        assert dataset_rows.erased_since(connection, both[1:], TENANT, begun_s) == 1
        assert dataset_rows.erased_since(connection, both, TENANT, time.time() + 1) == 0
        assert dataset_rows.erased_since(connection, [], TENANT, 0.0) == 0


@pytest.mark.parametrize("asked", ["", "abc", "A" * 64, "0" * 63 + "\n", "../" + "0" * 61])
def test_what_is_no_digest_is_told(edits: DatasetEdits, asked: str) -> None:
    with pytest.raises(GraftError, match="is not a sha256") as caught:
        edits.erase(asked, TENANT)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "image_digest")


def test_a_digest_is_of_the_bytes_that_were_sent(datasets: DatasetStore) -> None:
    record = upload(datasets, IMAGES)
    assert {image.digest for image in index_of(datasets, record.dataset_id).images} == {
        hashlib.sha256(content).hexdigest() for _, content, _ in IMAGES
    }
