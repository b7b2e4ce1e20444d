"""The features of each image are computed once, in pieces, and kept between jobs."""

import shutil
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import PIL
import pytest

from service.contract import Progressed
from service.engine import preprocess
from service.engine.feature_cache import FeatureCache
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from service.errors import Damaged, InvalidInput, Reason
from service.ingest.packs import Location
from tests.fake_runtime import FakeSession
from tests.trainer.conftest import MakeFolder, Told
from trainer import crops, data, features
from trainer.backbone_file import BackboneFile, space_of
from trainer.crops import Views
from trainer.features import Features


class FakeSource:
    """Mean colours as features; scriptable through its session."""

    precision = "fp32"
    blocks = (3,)
    is_gpu = False

    def __init__(self, space: str = "fake") -> None:
        self.space = space
        self.session = FakeSession()
        self.loads = 0

    def load(self) -> FakeSession:
        self.loads += 1
        return self.session


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each file was read, by its name below its folder."""
    counted: Counter[str] = Counter()
    lock = threading.Lock()
    real = data.read_plain

    def read(at: Location) -> bytes:
        with lock:
            counted[f"{at.path.parent.name}/{at.path.name}"] += 1
        return real(at)

    monkeypatch.setattr(data, "read_plain", read)
    return counted


def expected(files: data.Files) -> np.ndarray:
    return files.decode().mean(axis=(1, 2), dtype=np.float32) / np.float32(255)


def test_each_file_is_read_once_and_runs_in_batches_of_a_core_each(
    make_folder: MakeFolder, reads: Counter[str]
) -> None:
    source = FakeSource()
    made = Features(source, threads=3)
    loaded = data.load(make_folder(per_class=40))
    first, all_of_them = made.of(loaded.train.at(range(20))), made.of(loaded.train)
    assert len(reads) == 80
    assert set(reads.values()) == {1}
    assert (made.computed, source.loads) == (80, 1)
    assert max(source.session.batches) <= features.RUN
    # Runs side by side are fastest with a core each.
    assert set(source.session.cores) == {1}
    np.testing.assert_array_equal(all_of_them, expected(loaded.train))
    np.testing.assert_array_equal(first, all_of_them[:20])
    assert first.dtype == np.float32


def test_further_framings_are_computed_of_the_same_decoded_images(
    make_folder: MakeFolder, reads: Counter[str]
) -> None:
    source = FakeSource()
    made = Features(source, threads=2)
    train = data.load(make_folder(per_class=10)).train
    reads.clear()
    cropped = made.all_of(train, framings=["whole"])
    assert (set(reads.values()), made.computed) == ({1}, 40)
    assert max(source.session.batches) <= features.RUN
    whole = replace(train, decoding=msgspec.structs.replace(train.decoding, framing="whole"))
    np.testing.assert_array_equal(cropped, expected(train))
    np.testing.assert_array_equal(made.all_of(whole), expected(whole))
    assert made.computed == 40
    assert (expected(whole) != expected(train)).any()


def test_on_a_gpu_one_thread_runs_large_batches_of_what_the_others_decode(
    make_folder: MakeFolder,
) -> None:
    source = FakeSource()
    source.is_gpu = True
    threads: set[int] = set()
    run = source.session.run

    def seen(images: preprocess.Pixels, cores: int = 0) -> np.ndarray:
        threads.add(threading.get_ident())
        return run(images, cores)

    source.session.run = seen  # type: ignore[method-assign]
    made = Features(source, threads=3)
    loaded = data.load(make_folder(per_class=70))
    np.testing.assert_array_equal(made.of(loaded.train), expected(loaded.train))
    assert source.session.batches == [128, 12]
    assert threads == {threading.get_ident()}
    views = made.of_views(loaded.train.at(range(40)), 4, 0, Views())
    assert views.shape == (4, 40, 3)
    assert source.session.batches[2:] == [128, 32]


def test_on_a_gpu_an_image_that_cannot_be_read_ends_it_at_once(make_folder: MakeFolder) -> None:
    source = FakeSource()
    source.is_gpu = True
    folder = make_folder(per_class=70)
    loaded = data.load(folder)
    (folder / "red" / "3.png").write_bytes(b"changed")
    with pytest.raises(InvalidInput) as caught:
        Features(source, threads=2).of(loaded.train)
    assert caught.value.reason is Reason.DATASET_UNUSABLE


def test_a_second_job_computes_nothing_and_loads_no_backbone(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder(per_class=20)
    results = []
    for loads in (1, 0):
        source = FakeSource()
        cache = FeatureCache(tmp_path / "features.sqlite", 2**26)
        made = Features(source, cache, 2)
        results.append(made.of(data.load(folder).train))
        assert (source.loads, made.computed) == (loads, 40 * loads)
        cache.close()
    np.testing.assert_array_equal(*results)


def test_only_new_images_are_computed(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder(per_class=20)
    cache = FeatureCache(tmp_path / "features.sqlite", 2**26)
    Features(FakeSource(), cache).of(data.load(folder).train)
    shutil.copytree(make_folder("more", per_class=3, seed=9) / "red", folder / "red" / "new")
    # Another name for a known image changes nothing.
    (folder / "blue" / "0.png").rename(folder / "blue" / "renamed.png")
    made = Features(FakeSource(), cache)
    loaded = data.load(folder)
    np.testing.assert_array_equal(made.of(loaded.train), expected(loaded.train))
    assert made.computed == 3


def test_another_backbone_finds_nothing_of_this_one(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    images = data.load_unlabelled(make_folder())
    cache = FeatureCache(tmp_path / "features.sqlite", 2**26)
    for space in ("one", "other"):
        made = Features(FakeSource(space), cache)
        made.of(images)
        assert made.computed == 12


def test_features_come_in_the_order_that_is_asked_for(make_folder: MakeFolder) -> None:
    loaded = data.load(make_folder(per_class=10))
    made = Features(FakeSource(), threads=2)
    np.testing.assert_array_equal(made.of(loaded.train), expected(loaded.train))
    np.testing.assert_array_equal(made.of(loaded.train.at([2, 0])), expected(loaded.train)[[2, 0]])
    assert made.computed == len(loaded.train)


def test_images_of_several_parts_are_computed_in_one_pass(
    make_folder: MakeFolder, told: Told
) -> None:
    train = data.load(make_folder(per_class=10)).train
    parts = [train.at(range(12)), train.at(range(12, len(train)))]
    source = FakeSource()
    made = Features(source, threads=2, send=told.append)
    np.testing.assert_array_equal(made.of(data.Files.joined(parts)), expected(train))
    ends = [r for r in told if isinstance(r, Progressed) and r.fraction == 1.0]
    assert [end.steps for end in ends] == [len(train)]
    np.testing.assert_array_equal(made.of(parts[1]), expected(parts[1]))
    assert source.loads == 1
    assert made.computed == len(train)


def test_an_image_that_went_away_meanwhile_is_named(make_folder: MakeFolder) -> None:
    loaded = data.load(make_folder())
    loaded.train.locations[0].path.unlink()
    with pytest.raises(InvalidInput, match="when the job began") as caught:
        Features(FakeSource()).of(loaded.train)
    assert caught.value.reason is Reason.DATASET_UNUSABLE
    assert loaded.train.locations[0].path.name in caught.value.message


def test_an_image_that_was_overwritten_meanwhile_is_named_and_nothing_of_it_is_kept(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    part = data.load(make_folder()).train
    first = part.at([0])
    shutil.copy(part.locations[1].path, part.locations[0].path)
    cache = FeatureCache(tmp_path / "features.sqlite", 2**26)
    made = Features(FakeSource(), cache, 1)
    reads: list[Callable[[], object]] = [
        lambda: made.of(first),
        lambda: made.of_views(first, 2, 0, Views()),
        first.decode,
    ]
    for read in reads:
        with pytest.raises(InvalidInput, match="its content is another") as caught:
            read()
        assert caught.value.reason is Reason.DATASET_UNUSABLE
        assert part.locations[0].path.name in caught.value.message
    digest = first.digests[0]
    assert cache.get("fake", [digest, *(f"{digest} 0 {i} {Views().key}" for i in (0, 1))]) == {}


def test_views_follow_the_content_and_the_seed_and_are_kept(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    loaded = data.load(make_folder(per_class=5))
    cache = FeatureCache(tmp_path / "features.sqlite", 2**26)
    made = Features(FakeSource(), cache, 2)
    views = made.of_views(loaded.train, 3, 1, Views())
    assert views.shape == (3, len(loaded.train), 3)
    assert made.computed == 3 * len(loaded.train)
    # Of the same image, and yet none like another.
    plain = made.of(loaded.train)
    assert np.abs(views - plain).max() < 0.2
    assert len(np.unique(np.concatenate([plain[None], views])[:, 0], axis=0)) == 4

    again = Features(FakeSource(), cache, 2)
    backwards = loaded.train.at(range(len(loaded.train))[::-1])
    np.testing.assert_array_equal(again.of_views(backwards, 3, 1, Views()), views[:, ::-1])
    assert again.computed == 0
    more = again.of_views(loaded.train, 4, 1, Views())
    np.testing.assert_array_equal(more[:3], views)
    assert again.computed == len(loaded.train)
    assert not np.array_equal(again.of_views(loaded.train, 3, 2, Views()), views)
    # Views that are drawn from something else are others, kept beside them.
    gentle = again.of_views(loaded.train, 3, 1, Views(mirror=False, min_scale=0.9))
    assert not np.array_equal(gentle, views)
    np.testing.assert_array_equal(again.of_views(loaded.train, 3, 1, Views()), views)


def test_a_backbone_that_does_not_load_ends_the_work_with_its_error(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FakeSource()

    def refuse() -> FakeSession:
        raise Damaged(Reason.MODEL_UNLOADABLE, "publish it again")

    monkeypatch.setattr(source, "load", refuse)
    images = data.load_unlabelled(make_folder(per_class=40))
    with pytest.raises(Damaged, match="publish it again"):
        Features(source, threads=3).of(images)


def test_a_run_that_fails_ends_the_others_soon(make_folder: MakeFolder) -> None:
    source = FakeSource()
    source.session.fail_next = RuntimeError("no kernel")
    images = data.load_unlabelled(make_folder(per_class=100))
    with pytest.raises(RuntimeError, match="no kernel"):
        Features(source, threads=1).of(images)
    assert sum(source.session.batches) == 0


def test_progress_ends_at_one(make_folder: MakeFolder, told: Told) -> None:
    Features(FakeSource(), send=told.append).of(data.load_unlabelled(make_folder()))
    fractions = [record.fraction for record in told if isinstance(record, Progressed)]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_a_backbones_file_is_made_when_it_is_first_needed(tmp_path: Path) -> None:
    runtime = OnnxRuntime(Provider("cpu", ""), 1)
    asked: list[Path] = []

    def make(path: Path) -> None:
        asked.append(path)
        path.write_bytes(b"no graph")

    source = BackboneFile(tmp_path / "backbone.onnx", runtime, make=make)
    assert (source.space, asked) == ("", [])
    with pytest.raises(Damaged):
        source.load()
    assert asked == [tmp_path / "backbone.onnx"]
    assert source.space == space_of(source.digest, "fp32", runtime) != ""
    with pytest.raises(Damaged):
        source.load()
    assert len(asked) == 1


def test_what_computes_otherwise_has_another_space() -> None:
    cpu, cuda = OnnxRuntime(Provider("cpu", ""), 1), OnnxRuntime(Provider("cuda", ""), 1)
    spaces = {
        space_of("a", "fp32", cpu),
        space_of("b", "fp32", cpu),
        space_of("a", "fp32", cuda),
        space_of("a", "bf16", cpu),
    }
    assert len(spaces) == 4
    # One of them may be measured to be quicker, and they agree.
    assert space_of("a", "fp32", OnnxRuntime(Provider("openvino", ""), 1)) in spaces


def test_what_decodes_images_otherwise_has_another_space(monkeypatch: pytest.MonkeyPatch) -> None:
    def space() -> str:
        return space_of("a", "fp32", OnnxRuntime(Provider("cpu", ""), 1))

    before = space()
    assert f"pillow {PIL.__version__}" in before
    assert space() == before
    with monkeypatch.context() as changed:
        changed.setattr(preprocess, "MARGIN", 1.25)
        resized = space()
    with monkeypatch.context() as changed:
        changed.setattr(crops, "_RATIO", (0.5, 2.0))
        cropped = space()
    assert len({before, resized, cropped}) == 3
