"""A finished result for the stand-in trainer, few images, and folders with servers on them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from service.contract import (
    ANSWERS_FILE,
    BACKBONE_FILE,
    HEAD_FILE,
    MANIFEST_FILE,
    REPORT_HTML_FILE,
    REPORT_JSON_FILE,
)
from service.domain import Manifest, Parity
from service.engine import head as heads
from service.engine import preprocess
from service.storage import fsync
from tests.e2e.conftest import GUARD_S
from tests.e2e.faults.house import House
from tests.figures import figure

COLOURS = {"green": (20, 200, 40), "red": (200, 30, 20)}


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a trainer leaves: a backbone that gives an image's mean colour, and a head on it."""
    import onnx
    from onnx import TensorProto, helper

    folder = tmp_path_factory.mktemp("parts")
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["as_float"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["as_float"], ["features"], axes=[1, 2], keepdims=0),
        ],
        "mean colour",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 224, 224, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, folder / BACKBONE_FILE)
    weight = np.array([[-0.1, 0.1, 0.0], [0.1, -0.1, 0.0]], np.float32)
    classes = tuple(sorted(COLOURS))
    heads.save(heads.Head(weight, np.zeros(2, np.float32), classes), folder / HEAD_FILE)
    manifest = Manifest(
        model="any",
        job_id="any",
        method="feature_based",
        backbone="efficientnet_lite0",
        weights="random:0",
        backbone_digest=fsync.digest_of(folder / BACKBONE_FILE),
        feature_dim=3,
        classes=list(classes),
        temperature=1.0,
        train_count=2,
        train_groups=2,
        figures=[figure(1.0, 2)],
        calibrated=True,
        dataset_digest="0" * 64,
        seed=0,
        hyperparameters={},
        preprocess=preprocess.describe(),
        parity=Parity(0.0, 1.0, 2),
        opset=17,
        device="cpu",
        precision="fp32",
        provider="cpu",
        versions={},
        started_at="2026-01-01T00:00:00+00:00",
        duration_s=0.1,
    )
    (folder / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))
    (folder / ANSWERS_FILE).write_bytes(b"answers")
    (folder / REPORT_JSON_FILE).write_text("{}")
    (folder / REPORT_HTML_FILE).write_text("<!doctype html>")
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of each colour, in a folder per class."""
    root = tmp_path_factory.mktemp("colours")
    for label, colour in COLOURS.items():
        (root / label).mkdir()
        for number in range(2):
            shade = tuple(part + number for part in colour)
            Image.new("RGB", (32, 32), shade).save(root / label / f"{number}.png")
    return root


@pytest.fixture
def house(tmp_path: Path, parts: Path) -> Iterator[House]:
    """An empty data folder."""
    house = House(tmp_path, parts)
    yield house
    house.close()


@pytest.fixture(scope="session")
def furnished(
    tmp_path_factory: pytest.TempPathFactory, parts: Path, images: Path
) -> Iterator[Path]:
    """A data folder with two versions of the model `ants`; `live` points to the first."""
    house = House(tmp_path_factory.mktemp("furnished"), parts)
    client = house.start()
    dataset = client.upload_dataset(images)
    for number in (1, 2):
        # Versions of one content would share their files.
        job = client.fine_tune(dataset, "ants", labels={"number": str(number)})
        assert job.wait(GUARD_S).version == number
    client.set_alias("ants", "live", 1)
    house.is_sound()
    yield house.data_dir
    house.close()


@pytest.fixture
def home(house: House, furnished: Path) -> House:
    """The same data folder, of one's own."""
    shutil.copytree(furnished, house.data_dir)
    return house
