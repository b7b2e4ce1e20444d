"""A job's images come on top of its base's."""

import shutil
from pathlib import Path

import pytest

from service.domain import LeftOutReason
from service.errors import InvalidInput, Reason, WrongState
from service.ingest import index as indexes
from service.ingest import reader
from tests.trainer.conftest import MakeFolder, left_out
from trainer import data
from trainer.data import Data, Files, Source


def grown(own: Path, *bases: Path, case_sensitive: bool = False) -> Data:
    """Loads a folder after those of its bases, each under its folder's name."""
    sources = [Source(base, name=base.name) for base in bases]
    return data.load(own, bases=sources, case_sensitive=case_sensitive)


def paths(files: Files) -> list[Path]:
    return [at.path for at in files.locations]


def own_count(found: Data) -> int:
    """Counts the images that came on top of one base."""
    return int((found.train.ages == 1).sum() + (found.validation.ages == 1).sum())


def test_the_images_come_on_top_of_the_bases(make_folder: MakeFolder) -> None:
    base = make_folder("base", per_class=20)
    own = make_folder("own", per_class=10, classes=("green", "red"), seed=1)
    alone = data.load(base)
    found = grown(own, base)
    counts = [(c.label, c.train, c.validation) for c in found.counts()]
    assert counts == [("blue", 20, 0), ("green", 10, 0), ("red", 30, 0)]
    assert set(alone.train.digests) <= set(found.train.digests)
    assert found.digest != alone.digest
    names = set(found.train.names)
    assert any(name.startswith("base/blue/") for name in names)
    assert any(name.startswith("green/") for name in names)
    assert (found.summary.seen, found.summary.used) == (20, 20)
    assert found.warnings == ()
    # The oldest decides on which side what belongs together lies.
    by_age = dict(zip(paths(found.train), found.train.ages, strict=True))
    assert {int(by_age[path]) for path in by_age if path.is_relative_to(base)} == {0}
    assert {int(by_age[path]) for path in by_age if path.is_relative_to(own)} == {1}


def test_a_base_of_one_class_can_be_grown(make_folder: MakeFolder) -> None:
    base = make_folder("base", per_class=5, classes=("red",))
    own = make_folder("own", per_class=5, classes=("blue",), seed=1)
    assert grown(own, base).classes == ("blue", "red")


def test_what_the_base_holds_already_is_used_once_and_told(make_folder: MakeFolder) -> None:
    base = make_folder("base", per_class=20)
    own = make_folder("own", per_class=5, seed=1)
    before = data.load(base)
    for n, path in enumerate(paths(before.train)[:2]):
        shutil.copy(path, own / path.parent.name / f"again{n}.png")
    found = grown(own, base)
    assert left_out(found.summary, LeftOutReason.COPY) == {"blue/again0.png", "blue/again1.png"}
    assert (found.summary.seen, found.summary.used) == (12, 10)
    assert len(found.train) == len({*found.train.digests}) == 50


def test_the_bases_own_images_sent_again_are_still_the_bases(make_folder: MakeFolder) -> None:
    base = make_folder("base", per_class=10)
    found = grown(base, base)
    assert set(found.train.ages) == {0}
    assert found.summary.used == 0
    assert found.train.digests == data.load(base).train.digests


def test_what_a_base_was_measured_on_is_not_learned_from_under_another_name(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    base = make_folder("base/train", per_class=10).parent
    make_folder("base/val", per_class=4, seed=3)
    held = data.load(base).validation
    make_folder("own/train", per_class=5, seed=1)
    make_folder("own/val", per_class=2, seed=2)
    label = paths(held)[0].parent.name
    shutil.copy(paths(held)[0], tmp_path / "own/train" / label / "again.png")
    found = grown(tmp_path / "own", base)
    assert not set(held.digests) & set(found.train.digests)
    assert "again.png" in found.warnings[0]
    assert left_out(found.summary, LeftOutReason.COPY) == {f"train/{label}/again.png"}
    assert (found.summary.seen, found.summary.used) == (15, own_count(found))


def test_what_a_base_learned_from_is_no_more_once_it_is_to_be_tested_on(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    base = make_folder("base/train", per_class=10).parent
    make_folder("base/val", per_class=4, seed=3)
    before = data.load(base)
    make_folder("own/train", per_class=5, seed=1)
    make_folder("own/test", per_class=2, seed=2)
    taken = {
        paths(before.train)[0]: "learned.png", paths(before.validation)[0]: "measured.png",
    }  # fmt: skip
    for path, name in taken.items():
        shutil.copy(path, tmp_path / "own/test" / path.parent.name / name)
    found = grown(tmp_path / "own", base)
    assert len(found.test) == 6
    assert not set(found.test.digests) & {*found.train.digests, *found.validation.digests}
    assert set(found.test.names) >= {
        "test/blue/learned.png", "test/blue/measured.png",
    }  # fmt: skip
    assert ["training" in warning for warning in found.warnings] == [False, True]


def test_a_bases_test_part_stays_one(make_folder: MakeFolder, tmp_path: Path) -> None:
    make_folder("base/train", per_class=10)
    make_folder("base/test", per_class=3, seed=1)
    own = make_folder("own", per_class=5, seed=2)
    shutil.copy(tmp_path / "base/test/red/0.png", own / "red" / "again.png")
    found = grown(own, tmp_path / "base")
    assert {name.split("/")[1] for name in found.test.names} == {"test"}
    assert [c.test for c in found.counts()] == [3, 3]
    assert left_out(found.summary, LeftOutReason.COPY) == {"red/again.png"}


def test_the_summary_is_of_the_jobs_own_files(make_folder: MakeFolder) -> None:
    base, own = make_folder("base"), make_folder("own", seed=1)
    (base / "red" / "bad.png").write_bytes(b"no")
    (own / "red" / "worse.png").write_bytes(b"no")
    assert left_out(grown(own, base).summary) == {"red/worse.png"}


def test_an_image_that_comes_again_under_another_class_does_not_shift_its_bases_division(
    make_folder: MakeFolder,
) -> None:
    base = make_folder("base", per_class=20)
    own, last = make_folder("own", per_class=5, seed=1), make_folder("last", per_class=5, seed=2)
    before = grown(own, base)
    again = next(path for path in paths(before.train) if path.parent == base / "red")
    shutil.copy(again, last / "blue" / "again.png")
    found = grown(last, base, own)
    (dropped,) = set(before.train.digests) - set(found.train.digests)
    assert dropped == before.train.digests[paths(before.train).index(again)]
    assert left_out(found.summary, LeftOutReason.CONTRADICTION) == {"blue/again.png"}
    assert (found.summary.seen, found.summary.used) == (11, 10)


def test_a_base_whose_images_are_not_as_they_were_is_refused(make_folder: MakeFolder) -> None:
    base, own = make_folder("base"), make_folder("own", seed=1)
    last = make_folder("last", seed=2)
    digest = grown(own, base).digest
    bases = [Source(base), Source(own)]
    data.load(last, bases=bases, base_digest=digest)
    (base / "red" / "0.png").unlink()
    with pytest.raises(WrongState, match="not as they were") as caught:
        data.load(last, bases=bases, base_digest=digest)
    assert caught.value.reason is Reason.BASE_DATA_GONE


@pytest.mark.parametrize(
    ("label", "says"), [("Red", "differ in upper and lower case alone"), ("re\u200bd", "look the")]
)
def test_class_names_of_base_and_job_that_people_take_for_one_are_refused(
    make_folder: MakeFolder, label: str, says: str
) -> None:
    base = make_folder("base")
    own = make_folder("own", classes=("red",), seed=1)
    (own / "red").rename(own / label)
    with pytest.raises(InvalidInput, match=says) as caught:
        grown(own, base)
    assert caught.value.reason is Reason.DATASET_UNUSABLE
    assert "'red'" in caught.value.message
    assert ascii(label) in caught.value.message


def test_class_names_that_differ_in_case_alone_are_two_where_that_is_said(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    base = make_folder("base")
    own = make_folder("own", classes=("red",), seed=1)
    (own / "red").rename(own / "Red")
    assert grown(own, base, case_sensitive=True).classes == ("Red", "blue", "red")
    # Or where a dataset that was stored says so.
    index = tmp_path / "index.json"
    indexes.save(reader.read_folder(own, case_sensitive=True), index)
    stored = data.load(Source(own, index), bases=[Source(base)])
    assert stored.classes == ("Red", "blue", "red")
    own_alone = make_folder("both", classes=("blue", "red"), seed=2)
    (own_alone / "blue").rename(own_alone / "RED")
    with pytest.raises(InvalidInput, match="case_sensitive_labels"):
        data.load(own_alone)
    assert data.load(own_alone, case_sensitive=True).classes == ("RED", "red")


def test_names_that_look_the_same_are_refused_even_where_case_counts(
    make_folder: MakeFolder,
) -> None:
    base = make_folder("base")
    own = make_folder("own", classes=("red",), seed=1)
    (own / "red").rename(own / "re\u200bd")
    with pytest.raises(InvalidInput, match="look the same"):
        grown(own, base, case_sensitive=True)


def test_a_class_that_other_names_for_its_images_leave_empty_is_refused(
    make_folder: MakeFolder,
) -> None:
    base = make_folder("base", per_class=5, classes=("blue", "green"))
    own = make_folder("own", per_class=5, classes=("red",), seed=1)
    shutil.copytree(base / "green", own / "yellow")
    with pytest.raises(InvalidInput, match="no image is left of the classes 'green', 'yellow'"):
        grown(own, base)


def test_images_of_the_base_that_are_in_another_class_now_are_named(
    make_folder: MakeFolder,
) -> None:
    base = make_folder("base", per_class=6)
    own = make_folder("own", per_class=5, classes=("green",), seed=1)
    shutil.copy(base / "red" / "0.png", own / "green" / "moved.png")
    found = grown(own, base)
    assert any("base/red/0.png" in warning for warning in found.warnings)
    assert left_out(found.summary, LeftOutReason.CONTRADICTION) == {"green/moved.png"}
    assert found.summary.used == own_count(found)
