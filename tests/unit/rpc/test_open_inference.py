"""Tensors of any shape and content; what is kept in memory as versions come."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.auth import principal
from service.auth.principal import EVERYBODY
from service.domain import DEFAULT_DECODING, ModelFiles
from service.errors import InvalidInput, NotFound, Reason
from service.rpc.open_inference import grpc_predict_v2_pb2 as pb
from service.rpc.open_inference import tensors
from service.rpc.open_inference.repository import Repository
from service.storage.records import Removed

Input = pb.ModelInferRequest.InferInputTensor


@given(
    datatype=st.sampled_from(["BYTES", "UINT8", "FP32"]),
    shape=st.lists(st.integers(-2, 4) | st.sampled_from([3, 2**40]), max_size=5),
    raw=st.none() | st.binary(max_size=200),
    numbers=st.lists(st.integers(0, 300), max_size=30),
)
def test_any_tensor_gives_images_or_is_refused(
    datatype: str, shape: list[int], raw: bytes | None, numbers: list[int]
) -> None:
    tensor = Input(datatype=datatype, shape=shape)
    if raw is None:
        tensor.contents.uint_contents.extend(numbers)
        tensor.contents.fp32_contents.extend(number / 256 for number in numbers)
    request = pb.ModelInferRequest(inputs=[tensor], raw_input_contents=[] if raw is None else [raw])
    # Anything but InvalidInput is a fault of ours, and fails here.
    try:
        images = tensors.decodes(request, 256)
    except InvalidInput:
        return
    assert len(images) == (1 if len(shape) == 3 else shape[0])
    for decode in images:
        with contextlib.suppress(InvalidInput):
            assert decode(DEFAULT_DECODING).shape == (224, 224, 3)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=8))
def test_texts_that_were_written_are_read_again(elements: list[str]) -> None:
    tensor = Input(datatype="BYTES", shape=[len(elements)])
    raw = tensors.texts(elements)
    request = pb.ModelInferRequest(inputs=[tensor], raw_input_contents=[raw])
    found: list[Any] = tensors.decodes(request, 256)
    assert [image.read().decode() for image in found] == elements


def test_each_image_gets_its_own_part_of_a_tensor() -> None:
    array = np.zeros((3, 4, 4, 3), np.uint8)
    array[:] = np.array([10, 20, 30], np.uint8)[:, None, None, None]
    tensor = Input(datatype="UINT8", shape=array.shape)
    request = pb.ModelInferRequest(inputs=[tensor], raw_input_contents=[array.tobytes()])
    decoded = [decode(DEFAULT_DECODING) for decode in tensors.decodes(request, 3)]
    assert [int(pixels.mean()) for pixels in decoded] == [10, 20, 30]


class FakeEngine:
    """Remembers what is pinned."""

    def __init__(self) -> None:
        self.pinned: set[ModelFiles] = set()

    async def pin(self, files: ModelFiles) -> None:
        self.pinned.add(files)

    def unpin(self, files: ModelFiles) -> None:
        self.pinned.discard(files)

    def is_loaded(self, files: ModelFiles) -> bool:
        return files in self.pinned


class Latest:
    """Models with their latest versions, by hand."""

    def __init__(self) -> None:
        self.versions: dict[str, int] = {}

    async def resolve(self, model: str, *_: object) -> Any:
        if model not in self.versions:
            raise NotFound(Reason.MODEL_NOT_FOUND, "there is no such model")
        return SimpleNamespace(files=files(model, self.versions[model]))


def files(model: str, version: int) -> ModelFiles:
    return ModelFiles(model, version, "b", Path("b"), f"{model}{version}", Path("h"))


@pytest.fixture(autouse=True)
def _called_by_everybody() -> None:
    principal.enter(EVERYBODY)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def latest() -> Latest:
    return Latest()


@pytest.fixture
def repository(engine: FakeEngine, latest: Latest) -> Repository:
    nothing: Any = None  # asked for the index alone
    resolves: Any = latest
    pins: Any = engine
    return Repository(pins, resolves, nothing)


async def test_a_loaded_model_stays_until_it_is_unloaded(
    repository: Repository, engine: FakeEngine, latest: Latest
) -> None:
    latest.versions = {"pets": 1, "cars": 1}
    await repository.load(pb.RepositoryModelLoadRequest(model_name="pets"))
    await repository.load(pb.RepositoryModelLoadRequest(model_name="cars"))
    await repository.load(pb.RepositoryModelLoadRequest(model_name="pets"))
    assert engine.pinned == {files("pets", 1), files("cars", 1)}
    await repository.unload(pb.RepositoryModelUnloadRequest(model_name="pets"))
    assert engine.pinned == {files("cars", 1)}


async def test_loading_a_newer_version_lets_the_older_one_go(
    repository: Repository, engine: FakeEngine, latest: Latest
) -> None:
    latest.versions["pets"] = 1
    await repository.load(pb.RepositoryModelLoadRequest(model_name="pets"))
    latest.versions["pets"] = 2
    await repository.load(pb.RepositoryModelLoadRequest(model_name="pets"))
    assert engine.pinned == {files("pets", 2)}


async def test_unloading_lets_the_version_go_that_was_loaded_whatever_came_since(
    repository: Repository, engine: FakeEngine, latest: Latest
) -> None:
    latest.versions["pets"] = 1
    await repository.load(pb.RepositoryModelLoadRequest(model_name="pets"))
    latest.versions["pets"] = 2
    await repository.unload(pb.RepositoryModelUnloadRequest(model_name="pets"))
    assert engine.pinned == set()


async def test_a_deleted_model_is_let_go_by_unloading_it(
    repository: Repository, engine: FakeEngine, latest: Latest
) -> None:
    latest.versions["pets"] = 1
    await repository.load(pb.RepositoryModelLoadRequest(model_name="pets"))
    latest.versions.clear()
    with pytest.raises(NotFound):
        await repository.unload(pb.RepositoryModelUnloadRequest(model_name="pets"))
    assert engine.pinned == set()


async def test_the_pin_of_a_deleted_version_is_forgotten_and_no_other(
    repository: Repository, engine: FakeEngine, latest: Latest
) -> None:
    latest.versions = {"pets": 1, "cars": 2}
    await repository.load(pb.RepositoryModelLoadRequest(model_name="pets"))
    await repository.load(pb.RepositoryModelLoadRequest(model_name="cars"))
    repository.forget(Removed("pets", [1], True, [], [], []))
    repository.forget(Removed("cars", [1], False, [], [], []))
    latest.versions = {"pets": 3, "cars": 3}
    await repository.unload(pb.RepositoryModelUnloadRequest(model_name="pets"))
    await repository.unload(pb.RepositoryModelUnloadRequest(model_name="cars"))
    # The engine has let the deleted one go by itself.
    assert engine.pinned == {files("pets", 1)}
