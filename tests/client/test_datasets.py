"""Datasets that are made of others, and images that are erased, by client and command."""

import hashlib
import json
from pathlib import Path
from typing import Any

import graftml
import pytest
from graftml import _answers
from graftml.testing import FakeGraft
from graftml_stubs.v1 import dataset_pb2 as pb

from tests.client.conftest import Run, arrived
from tests.client.test_cli import lines

PAIRS = [("cat", b"1", "tom"), ("cat", b"2"), ("dog", b"3")]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_more_images_come_alone(client: Any, server: FakeGraft) -> None:
    first = client.upload_dataset(PAIRS, display_name="pets")
    told: list[tuple[int, int | None]] = []
    pairs = [("dog", b"4"), ("cat", b"2")]
    more = client.add_images(first, pairs, on_progress=lambda *counts: told.append(counts))
    [sent] = server.requests("AddImages")
    assert sent[0].header.dataset_id == first.dataset_id
    assert arrived(sent) == pairs
    assert sent[-1].end.message_count == 2
    assert (more.dataset_id != first.dataset_id, more.display_name) == (True, "pets")
    assert told == [(1, None), (2, None)]


def test_a_folder_is_added_as_it_is_uploaded(client: Any, server: FakeGraft, folder: Path) -> None:
    first = client.upload_dataset(folder)
    # A stream that breaks is sent again, as nothing of it was stored.
    server.fail("AddImages", graftml.Unavailable("stopping", reason="SHUTTING_DOWN"))
    more = client.add_images(first.dataset_id, folder, display_name="all")
    assert more.display_name == "all"
    sent = server.requests("AddImages")[-1]
    assert arrived(sent) == arrived(server.requests("UploadDataset")[0])


def test_no_label_is_sent_to_an_unlabelled_dataset(client: Any, server: FakeGraft) -> None:
    first = client.upload_dataset([b"1", b"2"], is_unlabelled=True)
    client.add_images(first, [("cat", b"3"), b"4"])
    client.add_images(first.dataset_id, [("cat", b"3"), b"4"], is_unlabelled=True)
    for sent in server.requests("AddImages"):
        assert arrived(sent) == [("", b"3"), ("", b"4")]


def test_images_are_removed_and_put_into_other_classes(client: Any, server: FakeGraft) -> None:
    first = client.upload_dataset(PAIRS)
    less = client.remove_images(first, [digest(b"2")])
    other = client.relabel_images(less.dataset_id, {digest(b"1"): "wolf"}, display_name="fixed")
    assert (other.dataset_id != less.dataset_id, other.display_name) == (True, "fixed")
    [removed], [moved] = server.requests("RemoveImages"), server.requests("RelabelImages")
    assert (removed.dataset_id, list(removed.digests)) == (first.dataset_id, [digest(b"2")])
    assert (moved.dataset_id, dict(moved.labels)) == (less.dataset_id, {digest(b"1"): "wolf"})


def test_the_images_of_a_dataset_are_listed_page_by_page(client: Any, server: FakeGraft) -> None:
    rows = [pb.DatasetImage(digest="d", name="a", label="cat", group="tom", size_bytes=1)] * 3
    server.answer(
        "ListImages",
        lambda request: pb.ListImagesResponse(
            images=rows[:2] if not request.page_token else rows[2:],
            next_page_token="" if request.page_token else "2",
        ),
    )
    images = list(client.list_images("ds-1"))
    assert images == [graftml.DatasetImage("d", "a", "cat", "", "tom", 1)] * 3
    asked = [(r.page_token, r.page_size) for r in server.requests("ListImages")]
    assert asked == [("", 1000), ("2", 1000)]


def test_versions_that_learned_from_an_erased_image_are_named() -> None:
    answer = pb.EraseImageResponse(
        dataset_ids=["ds-1"], versions=[pb.AffectedVersion(model="pets", version=3)]
    )
    found = graftml.Erasure(("ds-1",), (graftml.AffectedVersion("pets", 3),))
    assert _answers.erasure(answer) == found


@pytest.mark.parametrize("dataset", [7, None, b"ds-1"])
def test_what_is_no_dataset_is_told(client: Any, dataset: Any) -> None:
    with pytest.raises(graftml.InvalidArgument, match="give a Dataset, or its id"):
        client.remove_images(dataset, [])


def test_the_command_adds_removes_relabels_lists_and_erases(
    run: Run,
    server: FakeGraft,
    folder: Path,
) -> None:
    [first] = lines(run("datasets", "upload", folder, "--json")[1])
    dataset_id, new = first["dataset_id"], digest(b"new")
    code, out, _ = run("datasets", "add", dataset_id, folder, "--name", "n", "--json")
    [more] = lines(out)
    assert (code, more["image_count"], more["display_name"]) == (0, 6, "n")
    [moved] = lines(run("datasets", "relabel", more["dataset_id"], f"{new}=dog", "--json")[1])
    [relabelled] = server.requests("RelabelImages")
    assert dict(relabelled.labels) == {new: "dog"}
    server.answer(
        "ListImages",
        pb.ListImagesResponse(images=[pb.DatasetImage(digest=new, label="dog", is_erased=True)]),
    )
    listed = lines(run("datasets", "images", moved["dataset_id"], "--json")[1])
    assert {i["digest"]: i["label"] for i in listed} == {new: "dog"}
    table = run("datasets", "images", moved["dataset_id"])[1]
    assert new in table.replace("\n", "")
    assert "erased" in table
    assert run("datasets", "remove", moved["dataset_id"], new)[0] == 0
    [removed] = server.requests("RemoveImages")
    assert list(removed.digests) == [new]
    server.answer("EraseImage", pb.EraseImageResponse(dataset_ids=["ds-1", "ds-2"]))
    code, out, _ = run("datasets", "erase", new)
    assert (code, out.split()) == (0, ["erased", new, "from", "ds-1,", "ds-2"])
    assert json.loads(run("datasets", "erase", new, "--json")[1])["versions"] == []
    code, _, err = run("datasets", "relabel", dataset_id, "no equals sign")
    assert code == 2
    assert "is not a DIGEST=CLASS" in err
    missing = graftml.NotFound("no such image", reason=graftml.Reason.IMAGE_NOT_FOUND)
    server.fail("RemoveImages", missing)
    code, _, err = run("datasets", "remove", dataset_id, new)
    assert "IMAGE_NOT_FOUND" in err
