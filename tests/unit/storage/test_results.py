"""Trainers' results on their way in, and reports on their way out with the version's number."""

import errno
import json
import os
from pathlib import Path

import msgspec
import pytest

from service.contract import REPORT_STANDING_MARK, REPORT_VERSION_MARK
from service.domain import DEFAULT_DECODING, GateCheck
from service.errors import Aborted, Damaged, Exhausted, Reason
from service.storage import results
from service.storage.blobs import BlobFolder, Blobs
from service.storage.version_rows import VersionRecord
from tests.keys import BIRDS
from tests.unit.storage.conftest import digest, object_of, write_result


def record(number: int, is_candidate: bool, failures: list[str]) -> VersionRecord:
    checks = [
        GateCheck(
            name="accuracy", verdict="failed", passed=False, value=0.8, bound=0.9, detail=detail
        )
        for detail in failures
    ]
    digests = dict.fromkeys(
        ("manifest", "head", "backbone", "answers", "report_json", "report_html"), "0" * 64
    )
    return VersionRecord(
        model=BIRDS,
        version=number,
        create_time_s=0.0,
        job_id="job-1",
        **{f"{name}_digest": each for name, each in digests.items()},
        backbone="resnet18",
        decoding=DEFAULT_DECODING,
        gate_checks=tuple(checks),
        aliases=(),
        is_candidate=is_candidate,
        erased_images=0,
    )


def test_a_result_is_stored_by_its_content_and_again_changes_nothing(
    blobs: Blobs, store: BlobFolder, tmp_path: Path
) -> None:
    out_dir = write_result(tmp_path / "out", "job-1")
    stored = results.put(blobs, out_dir)
    assert stored.head.digest == digest(b"head of job-1")
    assert stored.backbone.digest == digest(b"backbone")
    assert blobs.read(stored.answers.digest, "answers") == b"answers of job-1"
    assert blobs.read(stored.report_json.digest, "report") == b'{"job": "job-1"}'
    assert blobs.read(stored.report_html.digest, "report") == b"<p>job-1</p>"
    assert msgspec.json.decode(blobs.read(stored.manifest_blob.digest, "manifest"))["seed"] == 0
    before = sorted(store.names())
    assert len(before) == 6
    assert results.put(blobs, out_dir) == stored
    assert sorted(store.names()) == before


def test_a_backbone_that_is_stored_need_not_come_again(blobs: Blobs, tmp_path: Path) -> None:
    first = results.put(blobs, write_result(tmp_path / "a", "job-1"))
    second = results.put(blobs, write_result(tmp_path / "b", "job-2", backbone=None))
    assert second.backbone == first.backbone
    assert second.head != first.head


def test_a_backbone_that_neither_came_nor_is_stored_is_missed(
    blobs: Blobs, store: BlobFolder, tmp_path: Path
) -> None:
    out_dir = write_result(tmp_path / "out", "job-1", backbone=None)
    with pytest.raises(Aborted, match=r"brings no backbone\.onnx") as caught:
        results.put(blobs, out_dir)
    assert caught.value.reason is Reason.TRAINING_FAILED
    stored = results.put(blobs, write_result(tmp_path / "whole", "job-2"))
    object_of(store, stored.backbone.digest).unlink()
    with pytest.raises(Aborted, match="is not stored"):
        results.put(blobs, out_dir)


def test_a_backbone_with_another_digest_than_the_manifest_says_is_refused(
    blobs: Blobs, tmp_path: Path
) -> None:
    out_dir = write_result(tmp_path / "out", "job-1", backbone_digest="0" * 64)
    with pytest.raises(Aborted, match="the manifest says 0000"):
        results.put(blobs, out_dir)


@pytest.mark.parametrize(
    "name",
    ["head.safetensors", "answers.safetensors", "manifest.json", "report.json", "report.html"],
)
def test_a_result_without_one_of_its_files_is_refused(
    blobs: Blobs, store: BlobFolder, tmp_path: Path, name: str
) -> None:
    out_dir = write_result(tmp_path / "out", "job-1")
    (out_dir / name).unlink()
    with pytest.raises(Aborted, match=f"{name} is missing"):
        results.put(blobs, out_dir)
    assert list(store.names()) == []


def test_a_manifest_that_is_none_is_refused(blobs: Blobs, tmp_path: Path) -> None:
    out_dir = write_result(tmp_path / "out", "job-1")
    (out_dir / "manifest.json").write_text('{"model": 3}')
    with pytest.raises(Aborted, match="cannot be read"):
        results.put(blobs, out_dir)


def test_a_full_disk_is_reported_and_the_result_can_be_put_later(
    blobs: Blobs, store: BlobFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    out_dir = write_result(tmp_path / "out", "job-1")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(Exhausted) as caught:
            results.put(blobs, out_dir)
    assert caught.value.reason is Reason.STORAGE_FULL
    assert list(store.names()) == []
    results.put(blobs, out_dir)


PAGE = (
    "<title>birds: report</title>"
    f"<h1>birds{REPORT_VERSION_MARK}</h1>{REPORT_STANDING_MARK}<svg><title>a dot</title></svg>"
).encode()


def test_a_published_version_has_its_number_in_title_and_heading() -> None:
    page = results.filled_html(PAGE, record(3, False, [])).decode()
    assert page == (
        "<title>birds: report, version 3</title><h1>birds version 3</h1>"
        "<svg><title>a dot</title></svg>"
    )


def test_a_candidate_is_called_one_and_says_why() -> None:
    page = results.filled_html(PAGE, record(3, True, ["0.8 < 0.9"])).decode()
    assert "<title>birds: report, version 3 (candidate)</title>" in page
    assert "<h1>birds version 3 (candidate)</h1>" in page
    assert "it did not pass its gate, and no alias moved to it. 0.8 &lt; 0.9." in page


def test_a_candidate_that_was_promoted_says_so() -> None:
    page = results.filled_html(PAGE, record(3, False, ["too slow"])).decode()
    assert "(candidate)" not in page
    assert "did not pass its gate and was published by hand. too slow." in page


def test_the_json_has_the_same_and_keeps_everything_else() -> None:
    content = b'{"format": 1, "version": null, "metrics": {"accuracy": 0.123456789012345678}}'
    filled = results.filled_json(content, record(7, True, ["too slow"]))
    assert b"0.123456789012345678" in filled
    assert json.loads(filled) == {
        "format": 1,
        "version": 7,
        "metrics": {"accuracy": 0.12345678901234568},
        "is_candidate": True,
        "gate_failures": ["too slow"],
    }


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"format": 1', b"\xff"])
def test_a_report_that_is_no_json_object_is_damaged(content: bytes) -> None:
    with pytest.raises(Damaged) as error:
        results.filled_json(content, record(1, False, []))
    assert error.value.reason == Reason.MODEL_UNLOADABLE


def test_a_page_that_is_no_text_is_damaged() -> None:
    with pytest.raises(Damaged) as error:
        results.filled_html(b"\xff\xfe", record(1, False, []))
    assert error.value.reason == Reason.MODEL_UNLOADABLE
