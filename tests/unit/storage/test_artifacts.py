import errno
import os
from pathlib import Path

import pytest

from service.errors import Aborted, Damaged, Exhausted, Reason
from service.storage.artifacts import Artifacts
from tests.unit.storage.conftest import digest, write_result


def everything(artifacts: Artifacts) -> set[str]:
    root = artifacts.backbone_path("x").parents[1]
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


def test_a_result_is_stored_under_the_names_of_its_content(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    stored = artifacts.put(write_result(tmp_path / "out", "job-1"))
    assert stored.backbone_path.read_bytes() == b"backbone"
    assert stored.backbone_path.stem == digest(b"backbone") == stored.backbone_digest
    assert stored.head_path.read_bytes() == b"head of job-1"
    assert stored.head_digest == digest(b"head of job-1")
    assert artifacts.answers_path(stored.artifact_digest).read_bytes() == b"answers of job-1"
    assert artifacts.report(stored.artifact_digest, html=False) == b'{"job": "job-1"}'
    assert artifacts.report(stored.artifact_digest, html=True) == b"<p>job-1</p>"
    assert len(everything(artifacts)) == 6


def test_storing_the_same_result_again_changes_nothing(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    out_dir = write_result(tmp_path / "out", "job-1")
    first = artifacts.put(out_dir)
    before = everything(artifacts)
    assert artifacts.put(out_dir) == first
    assert everything(artifacts) == before


def test_a_backbone_that_is_stored_need_not_come_again(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    first = artifacts.put(write_result(tmp_path / "a", "job-1"))
    second = artifacts.put(write_result(tmp_path / "b", "job-2", backbone=None))
    assert second.backbone_path == first.backbone_path
    assert second.head_path != first.head_path


def test_a_backbone_that_neither_came_nor_is_stored_is_told(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    with pytest.raises(Aborted, match=r"brings no backbone\.onnx") as caught:
        artifacts.put(write_result(tmp_path / "out", "job-1", backbone=None))
    assert caught.value.reason is Reason.TRAINING_FAILED
    assert everything(artifacts) == set()


def test_a_backbone_with_another_digest_than_the_manifest_says_is_refused(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    out_dir = write_result(tmp_path / "out", "job-1", backbone_digest="0" * 64)
    with pytest.raises(Aborted, match="the manifest says 0000"):
        artifacts.put(out_dir)
    assert everything(artifacts) == set()


@pytest.mark.parametrize(
    "name",
    ["head.safetensors", "answers.safetensors", "manifest.json", "report.json", "report.html"],
)
def test_a_result_without_one_of_its_files_is_refused_and_leaves_no_version(
    artifacts: Artifacts, tmp_path: Path, name: str
) -> None:
    out_dir = write_result(tmp_path / "out", "job-1")
    (out_dir / name).unlink()
    with pytest.raises(Aborted, match=f"{name} is missing"):
        artifacts.put(out_dir)
    assert not [name for name in everything(artifacts) if not name.startswith("backbones/")]


def test_a_manifest_that_is_none_is_refused(artifacts: Artifacts, tmp_path: Path) -> None:
    out_dir = write_result(tmp_path / "out", "job-1")
    (out_dir / "manifest.json").write_text('{"model": 3}')
    with pytest.raises(Aborted, match="cannot be read"):
        artifacts.put(out_dir)


def test_the_sweep_takes_what_nobody_needs_and_what_a_crash_left(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    live = artifacts.put(write_result(tmp_path / "a", "job-1"))
    dead = artifacts.put(write_result(tmp_path / "b", "job-2", backbone=b"other"))
    leftover = dead.backbone_path.parents[1] / "tmp" / "0123"
    leftover.mkdir()
    (leftover / "head.safetensors").write_bytes(b"half")
    artifacts.sweep(versions={live.artifact_digest}, backbones={live.backbone_digest})
    assert live.head_path.exists()
    assert live.backbone_path.exists()
    assert len(everything(artifacts)) == 6


def test_a_version_whose_files_went_with_another_is_put_again(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    stored = artifacts.put(write_result(tmp_path / "a", "job-1"))
    artifacts.remove(versions=[stored.artifact_digest], backbones=[stored.backbone_digest])
    assert everything(artifacts) == set()
    artifacts.restore(stored)
    assert len(everything(artifacts)) == 6


def test_deleting_what_is_gone_is_harmless(artifacts: Artifacts) -> None:
    artifacts.remove(versions=["0" * 64], backbones=["0" * 64])


def test_a_report_that_is_gone_is_told_as_damage(artifacts: Artifacts) -> None:
    with pytest.raises(Damaged) as caught:
        artifacts.report("0" * 64, html=True)
    assert caught.value.reason is Reason.MODEL_UNLOADABLE


def test_a_full_disk_is_told_and_leaves_nothing_under_a_final_name(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    out_dir = write_result(tmp_path / "out", "job-1")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(Exhausted) as caught:
            artifacts.put(out_dir)
    assert caught.value.reason is Reason.STORAGE_FULL
    assert everything(artifacts) == set()
    artifacts.put(out_dir)


def test_a_damaged_backbone_is_replaced_by_the_same_one_whole(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    stored = artifacts.put(write_result(tmp_path / "one", "job-1"))
    stored.backbone_path.write_bytes(b"damaged!")
    assert not artifacts.has_backbone(stored.backbone_digest)
    artifacts.put(write_result(tmp_path / "two", "job-2"))
    assert stored.backbone_path.read_bytes() == b"backbone"
    assert artifacts.has_backbone(stored.backbone_digest)


def test_a_result_on_a_damaged_backbone_that_it_does_not_bring_is_not_whole(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    stored = artifacts.put(write_result(tmp_path / "one", "job-1"))
    stored.backbone_path.write_bytes(b"damaged!")
    with pytest.raises(Aborted, match="is not known, or damaged"):
        artifacts.put(write_result(tmp_path / "two", "job-2", backbone=None))
