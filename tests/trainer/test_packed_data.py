"""Datasets that are an index over packs: read from where their bytes lie, erased ones left out."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from service.contract import ImageSource, Note
from service.errors import InvalidInput, Reason, WrongState
from service.ingest import index as indexes
from service.ingest import reader
from service.ingest.archives import Limits
from service.ingest.index import IndexedImage
from service.ingest.reader import INDEX_FILE, PACK_FILE, RAW_FILE, Given, ReadRequest
from tests.trainer.conftest import MakeFolder, MakeSpec, Told, source_of
from trainer import data
from trainer.data import Source
from trainer.train import run

Pack = Callable[..., Path]


def packed(folder: Path, work: Path, *, is_labelled: bool = True) -> Path:
    """Reads the images of a folder as an upload of them is; returns where its files lie."""
    work.mkdir()
    given, raw = [], b""
    for path in sorted(folder.rglob("*.png")):
        content = path.read_bytes()
        label = path.parent.name
        given.append(Given(path.name, label, "", len(raw), len(content)))
        raw += content
    (work / RAW_FILE).write_bytes(raw)
    limits = Limits(2**30, 2**30, 10_000)
    request = ReadRequest(work=str(work), given=given, limits=limits, is_labelled=is_labelled)
    reader.read(request, reader.inspect_here, 2)
    return work


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def named(*works: Path) -> tuple[list[ImageSource], dict[str, str]]:
    """Names stored datasets as a spec does, and their files on this machine."""
    sources, files = [], {}
    for work in works:
        digests = [digest_of(work / name) for name in (INDEX_FILE, PACK_FILE)]
        sources.append(ImageSource(index=digests[0], packs=digests[1:]))
        paths = (str(work / INDEX_FILE), str(work / PACK_FILE))
        files |= dict(zip(digests, paths, strict=True))
    return sources, files


def source(work: Path) -> Source:
    (found,), files = named(work)
    return Source.of(found, files)


def rewrite(work: Path, change: Callable[[IndexedImage], IndexedImage]) -> None:
    """Writes the index again with other images."""
    index = indexes.load(work / INDEX_FILE)
    images = [change(image) for image in index.images]
    indexes.save(msgspec.structs.replace(index, images=images), work / INDEX_FILE)


def erase(work: Path, count: int) -> list[str]:
    """Erases the first images; returns their digests."""
    gone = [image.digest for image in indexes.load(work / INDEX_FILE).images[:count]]
    rewrite(work, lambda image: image.erased() if image.digest in gone else image)
    return gone


def test_packed_images_are_the_same_as_those_of_the_folder(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder(per_class=5)
    of_folder = data.load(folder).train
    loaded = data.load(source(packed(folder, tmp_path / "work")))
    assert loaded.digest == data.load(folder).digest
    assert {at.path for at in loaded.train.locations} == {tmp_path / "work" / PACK_FILE}
    order = [loaded.train.digests.index(digest) for digest in of_folder.digests]
    assert (loaded.train.decode(order) == of_folder.decode()).all()
    assert loaded.train.encoded(order[0]) == of_folder.encoded(0)


def test_a_pack_that_is_damaged_or_cut_is_told_by_the_image_s_digest(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    work = packed(make_folder(per_class=2), tmp_path / "work")
    loaded = data.load(source(work))
    whole = (work / PACK_FILE).read_bytes()
    last = loaded.train.locations[-1]
    for damaged in (
        whole[: last.offset] + b"\xff" + whole[last.offset + 1 :], whole[: last.offset + 9]
    ):  # fmt: skip
        (work / PACK_FILE).write_bytes(damaged)
        with pytest.raises(InvalidInput, match=loaded.train.digests[-1]) as caught:
            loaded.train.decode()
        assert caught.value.reason is Reason.DATASET_UNUSABLE


def test_a_job_that_has_begun_goes_on_with_a_pack_that_is_deleted(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    work = packed(make_folder(per_class=2), tmp_path / "work")
    part = data.load(source(work)).train
    before = part.decode([0])
    (work / PACK_FILE).unlink()
    assert (part.decode()[:1] == before).all()


def test_erased_images_are_not_learned_from_and_count_in_the_digest(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    work = packed(make_folder(per_class=5), tmp_path / "work")
    before = data.load(source(work))
    gone = erase(work, 2)
    after = data.load(source(work))
    assert set(before.train.digests) - set(after.train.digests) == set(gone)
    assert after.digest == before.digest
    (warning,) = after.warnings
    assert warning.startswith("2 images were erased")
    # A base is as it was, though some of it is erased; with others in their place it is not.
    own = make_folder("own", per_class=3, classes=("green",), seed=1)
    data.load(own, bases=[source(work)], base_digest=before.digest)
    rewrite(work, lambda i: msgspec.structs.replace(i, digest="0" * 64) if i.is_erased else i)
    with pytest.raises(WrongState, match="not as they were"):
        data.load(own, bases=[source(work)], base_digest=before.digest)


def test_a_class_of_which_all_images_are_erased_is_none_any_more(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder(classes=("blue", "green", "red"), per_class=3)
    work = packed(folder, tmp_path / "work")
    erase(work, 3)
    assert data.load(source(work)).classes == ("green", "red")
    erase(work, 6)
    with pytest.raises(InvalidInput, match="1 class"):
        data.load(source(work))


def test_erased_images_of_a_target_are_left_out(make_folder: MakeFolder, tmp_path: Path) -> None:
    work = packed(make_folder(per_class=4), tmp_path / "work", is_labelled=False)
    before = data.load_unlabelled(source(work))
    erase(work, 3)
    after = data.load_unlabelled(source(work))
    assert (len(before), len(after)) == (8, 5)
    assert (before.erased_count, after.erased_count) == (0, 3)
    assert after.digest == before.digest


def test_an_image_of_a_shared_pack_is_the_base_s_where_both_datasets_have_it(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder(per_class=5)
    work = packed(folder, tmp_path / "work")
    loaded = data.load(source(work), bases=[source(work)])
    assert len(loaded.train) == 10
    assert set(loaded.train.ages) == {0}
    assert loaded.summary.used == 0


@pytest.mark.usefixtures("small_network")
def test_a_job_on_packs_ends_as_one_on_the_folder_and_says_what_was_erased(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    folder = make_folder(per_class=8)
    work = packed(folder, tmp_path / "work")
    (found,), files = named(work)
    of_folder = run(make_spec(folder, out_dir=str(tmp_path / "first")), told.append)
    spec = make_spec(folder, data=found, files=files)
    of_packs = run(spec, told.append)
    assert (of_packs.train_count, of_packs.dataset_digest) == (16, of_folder.dataset_digest)
    assert of_packs.figures == of_folder.figures
    gone = erase(work, 1)
    (found,), files = named(work)
    spec = make_spec(folder, data=found, files=files, out_dir=str(tmp_path / "erased"))
    erased = run(spec, told.append)
    assert (erased.train_count, erased.dataset_digest) == (15, of_folder.dataset_digest)
    warnings = [n.text for n in told.of(Note) if isinstance(n, Note) and n.level == "warning"]
    assert sum("1 image was erased" in text for text in warnings) == 1
    assert gone[0] not in (tmp_path / "erased" / "report.json").read_text()


def test_a_folder_with_an_index_is_read_where_it_lies(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder(per_class=2)
    index = tmp_path / "index"
    indexes.save(reader.read_folder(folder), index)
    asked = msgspec.structs.replace(source_of(folder), index_file=str(index), name="own")
    loaded = data.load(Source.of(asked, {}))
    assert [at.path.parent.parent for at in loaded.train.locations] == [folder] * 4
    assert loaded.train.names[0] == "blue/0.png"
    assert np.array_equal(loaded.train.decode(), data.load(folder).train.decode())
