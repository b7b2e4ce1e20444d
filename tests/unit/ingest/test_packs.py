"""Packs: what is written is found again, and written again without some of it."""

import hashlib
import tarfile
from pathlib import Path

import pytest

from service.ingest.folder import read_plain
from service.ingest.packs import Location, PackWriter, members, without

CONTENTS = [b"", b"PIC", bytes(512), bytes(range(256)) * 5]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write(path: Path, contents: list[bytes]) -> tuple[str, dict[str, Location]]:
    with PackWriter(path) as writer:
        added = {
            digest(data): Location(path, writer.add(digest(data), data), len(data))
            for data in contents
        }
        return writer.finish(), added


def test_what_is_added_lies_where_it_was_said_to_and_any_tar_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "pack"
    whole, added = write(path, CONTENTS)
    assert whole == digest(path.read_bytes())
    assert [read_plain(at) for at in added.values()] == CONTENTS
    assert list(members(path)) == list(added.items())
    with tarfile.open(path, "r:") as tar:
        assert [member.name for member in tar.getmembers()] == list(added)
        assert [tar.extractfile(m).read() for m in tar.getmembers()] == CONTENTS  # type: ignore[union-attr]


def test_the_same_images_make_the_same_pack(tmp_path: Path) -> None:
    assert write(tmp_path / "1", CONTENTS)[0] == write(tmp_path / "2", CONTENTS)[0]
    assert write(tmp_path / "3", CONTENTS[::-1])[0] != write(tmp_path / "1", CONTENTS)[0]


def test_a_pack_without_some_images_is_as_if_they_had_never_been_there(tmp_path: Path) -> None:
    whole, gone = tmp_path / "whole", {digest(CONTENTS[1])}
    write(whole, CONTENTS)
    seen: list[None] = []
    found = without(whole, tmp_path / "less", gone, lambda: seen.append(None))
    kept = [data for data in CONTENTS if digest(data) not in gone]
    other, added = write(tmp_path / "other", kept)
    assert (tmp_path / "less").read_bytes() == (tmp_path / "other").read_bytes()
    assert found == (other, {name: at.offset for name, at in added.items()})
    assert len(seen) == len(CONTENTS)


@pytest.mark.parametrize("cut", [100, 512, 1024, 1600])
def test_a_pack_that_is_cut_or_no_pack_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "pack"
    write(path, CONTENTS)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="it is not a pack"):
        list(members(path))
    with pytest.raises(ValueError, match="it is not a pack"):
        without(path, tmp_path / "less", (), lambda: None)
