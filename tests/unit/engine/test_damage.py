import asyncio
import errno
import hashlib
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service.domain import ImageDecoding
from service.engine import damage
from service.engine.damage import Damages, stamp_of
from service.engine.fake_runtime import FakeRuntime, FakeSession
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from service.errors import Damaged, Reason, Unavailable
from service.ops.metrics import Metrics
from tests.unit.engine.conftest import GUARD_S, MakeEngine, MakeModel


def damaged(metrics: Metrics, kind: str) -> float | None:
    return metrics.registry.get_sample_value("graft_damaged_files", {"kind": kind})


def decode(_: ImageDecoding) -> np.ndarray:  # type: ignore[type-arg]
    return np.full((224, 224, 3), (255, 0, 0), np.uint8)


def test_a_file_is_read_when_its_digest_is_right(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"whole")
    assert damage.read(file, hashlib.sha256(b"whole").hexdigest(), "head") == b"whole"
    assert damage.read(file, "", "head") == b"whole"
    with pytest.raises(Damaged, match=r"head is damaged.*from a backup"):
        damage.read(file, hashlib.sha256(b"other").hexdigest(), "head")
    with pytest.raises(Damaged, match="head is missing"):
        damage.read(tmp_path / "none", "", "head")
    with pytest.raises(Damaged, match=r"head cannot be read \(Is a directory\)"):
        damage.read(tmp_path, "", "head")


def test_a_process_that_may_open_no_more_files_does_not_take_them_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(Unavailable) as caught:
        damage.read(tmp_path / "file", "", "head")
    assert caught.value.reason is Reason.STORAGE_BUSY
    assert caught.value.retry_after_s


async def test_a_storm_of_calls_reads_a_damaged_file_once(
    make_engine: MakeEngine,
    make_model: MakeModel,
    runtime: FakeRuntime,
    metrics: Metrics,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, model = make_engine(), make_model()
    whole = model.backbone_path.read_bytes()
    model.backbone_path.write_bytes(b"other")
    for _ in range(20):
        with pytest.raises(Damaged):
            await engine.classify(model, [decode], GUARD_S)
    assert len(runtime.loads) == 1
    assert damaged(metrics, "backbone") == 1
    assert sum(record.levelname == "ERROR" for record in caplog.records) == 1
    assert "backbone is damaged" in engine.damage_of(model)

    model.backbone_path.write_bytes(whole)
    await engine.classify(model, [decode], GUARD_S)
    assert engine.damage_of(model) == ""
    assert damaged(metrics, "backbone") == 0


async def test_a_version_that_is_deleted_is_no_longer_damaged(
    make_engine: MakeEngine, make_model: MakeModel, metrics: Metrics
) -> None:
    engine, model = make_engine(), make_model()
    model.head_path.unlink()
    with pytest.raises(Damaged, match="head is missing"):
        await engine.warm(model)
    assert damaged(metrics, "head") == 1
    engine.forget(paths=[model.head_path])
    assert damaged(metrics, "head") == 0
    assert engine.damage_of(model) == ""


async def test_a_version_that_is_deleted_while_it_is_loaded_is_not_damaged(
    make_engine: MakeEngine,
    make_model: MakeModel,
    runtime: FakeRuntime,
    metrics: Metrics,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, model = make_engine(), make_model()
    begun, goes_on = asyncio.Event(), threading.Event()
    loop, load = asyncio.get_running_loop(), runtime.load

    def slow(path: Path, digest: str = "") -> FakeSession:
        loop.call_soon_threadsafe(begun.set)
        goes_on.wait(GUARD_S)
        return load(path, digest)

    monkeypatch.setattr(runtime, "load", slow)
    # A backbone that stays, since others use it, and one that goes.
    for gone in ([model.head_path], [model.head_path, model.backbone_path]):
        begun.clear()
        goes_on.clear()
        call = asyncio.create_task(engine.warm(model))
        await begun.wait()
        for path in gone:
            path.unlink(missing_ok=True)
        engine.forget(backbones=[model.backbone_digest], paths=gone)
        goes_on.set()
        with pytest.raises(Damaged):
            await call
        assert engine.damage_of(model) == ""
        engine.forget(backbones=[model.backbone_digest])
    assert not damaged(metrics, "head")
    assert not damaged(metrics, "backbone")


async def test_of_two_equal_heads_the_one_that_is_deleted_is_forgotten(
    make_engine: MakeEngine, make_model: MakeModel, metrics: Metrics, tmp_path: Path
) -> None:
    engine, model = make_engine(), make_model()
    other = replace(model, version=2, head_path=tmp_path / "copy.safetensors")
    for files in (model, other):
        files.head_path.write_bytes(b"other")
        with pytest.raises(Damaged):
            await engine.warm(files)
    assert damaged(metrics, "head") == 2
    # Its digest is still used.
    engine.forget(versions=[(model.name, 1)], paths=[model.head_path])
    assert damaged(metrics, "head") == 1
    assert engine.damage_of(model) == ""
    assert engine.damage_of(other)


async def test_a_disk_that_does_not_answer_stops_no_call_but_the_one_for_its_file(
    make_engine: MakeEngine, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, whole, broken = make_engine(), make_model(), make_model("broken")
    broken.head_path.write_bytes(b"other")
    with pytest.raises(Damaged):
        await engine.warm(broken)
    await engine.warm(whole)
    asked, answers = asyncio.Event(), threading.Event()
    loop, stat = asyncio.get_running_loop(), damage.stamp_of

    def stamp_of(path: Path) -> damage.FileStamp:
        loop.call_soon_threadsafe(asked.set)
        assert answers.wait(GUARD_S), "the event loop waited for the disk"
        return stat(path)

    monkeypatch.setattr(damage, "stamp_of", stamp_of)
    call = asyncio.create_task(engine.warm(broken))
    await asked.wait()
    await engine.classify(whole, [decode], GUARD_S)
    answers.set()
    with pytest.raises(Damaged):
        await call


async def test_what_a_session_finds_when_it_reads_its_file_again_is_told_until_it_is_whole(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, metrics: Metrics
) -> None:
    engine, model = make_engine(), make_model()
    await engine.warm(model)
    session = runtime.session(model.backbone_path)
    session.damage = damage.unloadable("backbone", "is damaged")
    for _ in range(2):
        await engine.classify(model, [decode], GUARD_S)
    assert "backbone is damaged" in engine.damage_of(model)
    assert damaged(metrics, "backbone") == 1
    session.damage = None
    await engine.classify(model, [decode], GUARD_S)
    assert engine.damage_of(model) == ""
    assert damaged(metrics, "backbone") == 0


async def test_of_two_equal_heads_the_whole_one_serves(
    make_engine: MakeEngine, make_model: MakeModel, tmp_path: Path
) -> None:
    engine, model = make_engine(), make_model()
    copy = tmp_path / "copy.safetensors"
    shutil.copyfile(model.head_path, copy)
    model.head_path.write_bytes(b"other")
    with pytest.raises(Damaged):
        await engine.warm(model)
    await engine.classify(replace(model, head_path=copy), [decode], GUARD_S)


def test_a_file_that_lies_there_as_before_is_looked_at_again_after_a_minute(
    tmp_path: Path, metrics: Metrics
) -> None:
    now = 100.0
    damages = Damages(metrics, lambda: now)
    file = tmp_path / "file"
    damages.note("head", file, stamp_of(file), damage.unloadable("head", "is missing"))
    with pytest.raises(Damaged, match="is missing"):
        damages.check(file)
    now += 59
    with pytest.raises(Damaged):
        damages.check(file)
    now += 2
    damages.check(file)
    assert damages.of([file]), "it stays told until the file is seen whole"
    damages.clear(file)
    assert damages.of([file]) == ""


Change = Callable[[Path], object]


@pytest.mark.parametrize(
    "change",
    [
        Path.unlink,
        lambda path: path.write_bytes(b"another"),
        lambda path: path.chmod(0o600),
        lambda path: path.rename(path.with_name("away")),
    ],
)
def test_a_file_that_changed_is_looked_at_again_at_once(
    tmp_path: Path, metrics: Metrics, change: Change
) -> None:
    damages = Damages(metrics)
    file = tmp_path / "file"
    file.write_bytes(b"content")
    file.chmod(0o644)
    damages.note("head", file, stamp_of(file), damage.unloadable("head", "is damaged"))
    with pytest.raises(Damaged):
        damages.check(file)
    change(file)
    damages.check(file)


def test_a_graph_whose_weights_lie_beside_it_is_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.ones((3, 3), np.float32), "weights")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weights"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    file = tmp_path / "b.onnx"
    onnx.save(model, file, save_as_external_data=True, location="beside", size_threshold=0)
    assert (tmp_path / "beside").exists()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(Damaged, match="names other files"):
        OnnxRuntime(Provider("cpu", "")).load(file, digest)
