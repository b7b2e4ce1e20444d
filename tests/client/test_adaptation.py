"""A target domain's images travel beside the data: without labels, unless they measure."""

import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graftml
import numpy as np
import pytest
from graftml.testing import FakeGraft
from graftml_stubs.v1 import fine_tuning_pb2 as pb

from tests.client.conftest import arrived


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Images at any depth; what an upload must leave out."""
    root = tmp_path / "phone"
    (root / "2024" / "may").mkdir(parents=True)
    (root / "a.jpg").write_bytes(b"a")
    (root / "2024" / "b.jpg").write_bytes(b"b")
    (root / "2024" / "may" / "c.jpg").write_bytes(b"c")
    (root / ".hidden.jpg").write_bytes(b"x")
    return root


def adapted(
    client: Any, server: FakeGraft, folder: Path, **options: Any
) -> tuple[Any, list[tuple[str, bytes]]]:
    """The method as the job of an adaptation says it, and what was sent of its target."""
    job = client.fine_tune(folder, "pets", method=graftml.DomainAdaptation(**options))
    assert job.wait().method == "domain_adaptation"
    sent = server.requests("UploadDataset")[-1]
    assert sent[0].header.is_unlabelled
    return job.job.request.domain_adaptation, arrived(sent)


def test_a_folder_of_the_target_arrives_without_labels(
    client: Any, server: FakeGraft, folder: Path, target: Path
) -> None:
    method, sent = adapted(client, server, folder, target=target, technique="coral")
    assert method.technique == pb.ADAPTATION_TECHNIQUE_CORAL
    assert sent == [("a.jpg", b"a"), ("2024/b.jpg", b"b"), ("2024/may/c.jpg", b"c")]
    assert client.get_dataset(method.target_dataset_id).display_name == "phone"


def test_an_archive_of_the_target_is_sent_as_it_is(
    client: Any, server: FakeGraft, folder: Path, target: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "phone.zip", "w") as zipped:
        zipped.write(target / "a.jpg", "deep/down/a.jpg")
    _, sent = adapted(client, server, folder, target=str(tmp_path / "phone.zip"))
    assert sent == [("deep/down/a.jpg", b"a")]


def test_a_target_may_be_images_of_any_kind_and_labels_beside_them_are_left_out(
    client: Any, server: FakeGraft, folder: Path, target: Path
) -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    mixed = [target / "a.jpg", str(target / "2024" / "b.jpg"), b"c", pixels, ("cat", b"d")]
    _, sent = adapted(client, server, folder, target=mixed)
    assert sent[:3] == [("", b"a"), ("", b"b"), ("", b"c")]
    assert (sent[3][0], sent[3][1][:4]) == ("", b"\x89PNG")
    assert sent[4:] == [("", b"d")]


def test_a_batch_in_an_array_is_a_target(client: Any, server: FakeGraft, folder: Path) -> None:
    batch = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3)
    client.fine_tune(folder, "pets", method="domain_adaptation", target=batch)
    assert len(arrived(server.requests("UploadDataset")[1])) == 2


def test_a_target_that_measures_keeps_its_labels(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    pairs = [("cat", b"1"), ("dog", b"2")]
    assert adapted(client, server, folder, target=pairs, evaluate_on_target=True)[1] == pairs


def test_a_target_that_measures_may_have_one_known_class_and_images_without_one(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    mixed = [("cat", b"1"), ("", b"2"), b"3"]
    _, sent = adapted(client, server, folder, target=mixed, evaluate_on_target=True)
    assert sent == [("cat", b"1"), ("", b"2"), ("", b"3")]


def test_a_target_that_the_service_has_already_is_not_uploaded(
    client: Any, server: FakeGraft, folder: Path, target: Path
) -> None:
    source = client.upload_dataset(folder)
    dataset = client.upload_dataset(target, is_unlabelled=True)
    for given in (dataset, dataset.dataset_id, source, graftml.ServerPath("/target")):
        client.fine_tune(source, "pets", method=graftml.DomainAdaptation(target=given))
    assert [call.method for call in server.calls].count("UploadDataset") == 2
    requests = server.requests("FineTune")
    assert [request.domain_adaptation.WhichOneof("target") for request in requests] == [
        "target_dataset_id",
        "target_dataset_id",
        "target_dataset_id",
        "target_path",
    ]


def test_a_target_that_is_not_there_is_found_out_before_anything_is_uploaded(
    client: Any, server: FakeGraft, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        client.fine_tune(folder, "pets", method="domain_adaptation", target=tmp_path / "nope")
    (tmp_path / "empty").mkdir()
    with pytest.raises(graftml.InvalidArgument, match="put the images there, at any depth"):
        client.fine_tune(folder, "pets", method="domain_adaptation", target=tmp_path / "empty")
    assert server.calls == []


def test_images_of_a_target_are_read_on_a_worker_thread(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    threads: set[threading.Thread] = set()

    def images() -> Iterator[bytes]:
        threads.add(threading.current_thread())
        yield b"a"

    adapted(client, server, folder, target=images())
    assert threads
    assert threading.main_thread() not in threads


def test_a_target_that_is_gone_is_named(client: Any, server: FakeGraft, folder: Path) -> None:
    with pytest.raises(graftml.NotFound) as caught:
        client.fine_tune(folder, "pets", method="domain_adaptation", target="ds-gone")
    assert caught.value.reason == graftml.Reason.DATASET_NOT_FOUND
