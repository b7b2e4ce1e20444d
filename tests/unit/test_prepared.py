"""Forms of a backbone that an environment keeps."""

import hashlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from service import prepared
from service.contract import REFERENCE_FILE, Exported, ExportedBackbone


def exported(out_dir: Path, content: bytes) -> Exported:
    digest = hashlib.sha256(content).hexdigest()
    out_dir.mkdir(exist_ok=True)
    (out_dir / f"{digest}.onnx").write_bytes(content)
    (out_dir / REFERENCE_FILE).write_bytes(b"reference of " + content)
    return Exported([ExportedBackbone("weights", digest, reference="of it")])


@pytest.fixture(autouse=True)
def _uncached() -> Iterator[None]:
    prepared._name.cache_clear()
    yield
    prepared._name.cache_clear()


def test_what_is_kept_last_is_found_whole(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    assert prepared.find(folder, "lite0") is None
    for content in (b"first", b"second"):
        forms = exported(tmp_path / "out", content)
        prepared.keep(folder, "lite0", forms, tmp_path / "out")
        found = prepared.find(folder, "lite0")
        assert found is not None
        assert found[0] == forms
        assert (found[1] / f"{forms.forms[0].digest}.onnx").read_bytes() == content
        assert (found[1] / REFERENCE_FILE).read_bytes() == b"reference of " + content
    assert prepared.find(folder, "lite1") is None
    assert len(list(folder.iterdir())) == 1


def test_what_is_not_kept_to_its_end_leaves_what_was_there(tmp_path: Path) -> None:
    first = exported(tmp_path / "out", b"first")
    prepared.keep(tmp_path / "kept", "lite0", first, tmp_path / "out")
    lost = Exported([ExportedBackbone("weights", "lost")])
    with pytest.raises(OSError, match="lost"):
        prepared.keep(tmp_path / "kept", "lite0", lost, tmp_path / "out")
    found = prepared.find(tmp_path / "kept", "lite0")
    assert found is not None
    assert found[0] == first


def test_other_versions_find_nothing_and_the_oldest_forms_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms, versions = exported(tmp_path / "out", b"form"), dict[str, str]()
    found = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or found(name))
    for number in range(6):
        versions["torch"] = f"99.{number}"
        prepared._name.cache_clear()
        assert prepared.find(tmp_path / "kept", "lite0") is None
        prepared.keep(tmp_path / "kept", "lite0", forms, tmp_path / "out")
        assert prepared.find(tmp_path / "kept", "lite0") is not None
    assert len(list((tmp_path / "kept").iterdir())) == 3
