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

from tests.client.test_cli import Run, lines, run  # noqa: F401 - a fixture

PAIRS = [("cat", b"1", "tom"), ("cat", b"2"), ("dog", b"3")]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def contents(server: FakeGraft, dataset: graftml.Dataset) -> dict[bytes, str]:
    """Returns the classes of a dataset's images, by their bytes."""
    return {content: label for _, label, content in server.images(dataset.dataset_id)}


def test_more_images_make_another_dataset_and_come_alone(client: Any, server: FakeGraft) -> None:
    first = client.upload_dataset(PAIRS, display_name="pets")
    sent: list[tuple[int, int | None]] = []
    more = client.add_images(
        first, [("dog", b"4"), ("cat", b"2")], on_progress=lambda *counts: sent.append(counts)
    )
    assert more.dataset_id != first.dataset_id
    assert contents(server, more) == {b"1": "cat", b"2": "cat", b"3": "dog", b"4": "dog"}
    assert more.display_name == "pets"
    assert [row.reason for row in more.summary.left_out] == ["copy"]
    assert sent == [(1, None), (2, None)]
    assert client.get_dataset(first.dataset_id) == first


def test_a_folder_is_added_as_it_is_uploaded(client: Any, server: FakeGraft, folder: Path) -> None:
    first = client.upload_dataset(PAIRS)
    more = client.add_images(first.dataset_id, folder, display_name="all")
    assert (more.image_count, more.display_name) == (9, "all")
    # A stream that breaks is sent again, as nothing of it was stored.
    server.fail("AddImages", graftml.Unavailable("stopping", reason="SHUTTING_DOWN"))
    assert client.add_images(first.dataset_id, folder, display_name="all") == more


def test_no_label_is_sent_to_an_unlabelled_dataset(client: Any, server: FakeGraft) -> None:
    first = client.upload_dataset([b"1", b"2"], is_unlabelled=True)
    more = client.add_images(first, [("cat", b"3"), b"4"])
    by_id = client.add_images(first.dataset_id, [("cat", b"3"), b"4"], is_unlabelled=True)
    assert contents(server, more) == dict.fromkeys((b"1", b"2", b"3", b"4"), "")
    assert more.is_unlabelled
    assert by_id == more


def test_images_are_removed_and_put_into_other_classes(client: Any, server: FakeGraft) -> None:
    first = client.upload_dataset(PAIRS)
    less = client.remove_images(first, [digest(b"2")])
    assert contents(server, less) == {b"1": "cat", b"3": "dog"}
    other = client.relabel_images(less.dataset_id, {digest(b"1"): "wolf"}, display_name="mended")
    assert contents(server, other) == {b"1": "wolf", b"3": "dog"}
    assert (other.display_name, [c.label for c in other.classes]) == ("mended", ["dog", "wolf"])
    for change in (
        lambda: client.remove_images(first, ["0" * 64]),
        lambda: client.relabel_images(first, {"0" * 64: "cat"}),
    ):
        with pytest.raises(graftml.NotFound) as caught:
            change()
        assert caught.value.reason == graftml.Reason.IMAGE_NOT_FOUND


def test_the_images_of_a_dataset_are_listed_page_by_page(client: Any, server: FakeGraft) -> None:
    images = list(client.list_images(client.upload_dataset(PAIRS)))
    assert images[0] == graftml.DatasetImage(digest(b"1"), "", "cat", "", "tom", 1)
    assert [image.digest for image in images] == [digest(b"1"), digest(b"2"), digest(b"3")]
    many = client.upload_dataset([("cat", b"%d" % n) for n in range(1001)])
    assert len(list(client.list_images(many.dataset_id))) == 1001
    assert [r.page_token for r in server.requests("ListImages")] == ["", "", "1000"]


def test_an_image_is_erased_from_every_dataset(client: Any) -> None:
    first = client.upload_dataset(PAIRS)
    more = client.add_images(first, [("dog", b"4")])
    client.upload_dataset([("cat", b"5"), ("dog", b"6")])
    erased = client.erase_image(digest(b"2"))
    assert set(erased.dataset_ids) == {first.dataset_id, more.dataset_id}
    assert erased.versions == ()
    now = client.get_dataset(first.dataset_id)
    assert (now.image_count, now.erased_image_count, now.digest) == (2, 1, first.digest)
    (gone,) = (image for image in client.list_images(first) if image.is_erased)
    assert (gone.digest, gone.size_bytes) == (digest(b"2"), 0)
    with pytest.raises(graftml.NotFound) as caught:
        client.erase_image("0" * 64)
    assert caught.value.reason == graftml.Reason.IMAGE_NOT_FOUND


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
    run: Run,  # noqa: F811
    folder: Path,
    tmp_path: Path,
) -> None:
    [first] = lines(run("datasets", "upload", folder, "--json")[1])
    (tmp_path / "more" / "cat").mkdir(parents=True)
    (tmp_path / "more" / "cat" / "new.jpg").write_bytes(b"new")
    dataset_id, new = first["dataset_id"], digest(b"new")
    code, out, _ = run("datasets", "add", dataset_id, tmp_path / "more", "--name", "n", "--json")
    [more] = lines(out)
    assert (code, more["image_count"], more["display_name"]) == (0, 7, "n")
    [moved] = lines(run("datasets", "relabel", more["dataset_id"], f"{new}=dog", "--json")[1])
    listed = lines(run("datasets", "images", moved["dataset_id"], "--json")[1])
    assert {i["digest"]: i["label"] for i in listed}[new] == "dog"
    assert new in run("datasets", "images", moved["dataset_id"])[1].replace("\n", "")
    [less] = lines(run("datasets", "remove", moved["dataset_id"], new, "--json")[1])
    assert less["digest"] == first["digest"]
    code, out, _ = run("datasets", "erase", new)
    assert code == 0
    assert out.split() == ["erased", new, "from", f"{more['dataset_id']},", moved["dataset_id"]]
    assert json.loads(run("datasets", "erase", new, "--json")[1])["versions"] == []
    assert "erased" in run("datasets", "images", moved["dataset_id"])[1]
    code, _, err = run("datasets", "relabel", dataset_id, "no equals sign")
    assert code == 2
    assert "is no DIGEST=CLASS" in err
    code, _, err = run("datasets", "remove", dataset_id, new)
    assert "IMAGE_NOT_FOUND" in err
