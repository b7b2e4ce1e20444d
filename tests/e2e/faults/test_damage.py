"""Files of versions that were damaged on disk: refused, and served again when put back."""

import shutil
import sqlite3
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import graftml
import grpc
import msgspec
import pytest

from service.contract import BACKBONE_FILE, HEAD_FILE, MANIFEST_FILE
from service.domain import Manifest
from service.engine import head as heads
from service.rpc.open_inference import grpc_predict_v2_pb2 as pb
from service.rpc.open_inference import grpc_predict_v2_pb2_grpc
from service.storage import fsync
from tests.e2e.conftest import GUARD_S
from tests.e2e.faults.house import House, wait_until

pytestmark = pytest.mark.e2e

ONE_AT_A_TIME = "--model-memory-mb=1"
"""Every load pushes out what was loaded before."""


def cut(path: Path) -> None:
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "backbone cut short": ("backbone", cut, "is damaged"),
    "backbone with a bit flipped": ("backbone", flip, "is damaged"),
    "backbone missing": ("backbone", Path.unlink, "is missing"),
    "head with a bit flipped": ("head", flip, "is damaged"),
    "head missing": ("head", Path.unlink, "is missing"),
}


class Files:
    """Where the files of the third version of `ants` lie, and how they come back."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        with closing(sqlite3.connect(data_dir / "graft.sqlite3")) as connection:
            digests = connection.execute(
                "SELECT backbone_digest, head_digest, report_json_digest FROM versions"
                " WHERE model = 'ants' AND version = 3"
            ).fetchone()
        self._paths = {
            kind: next((data_dir / "blobs").glob(f"??/{digest}-*"))
            for kind, digest in zip(("backbone", "head", "report"), digests, strict=True)
        }

    def of(self, kind: str, data_dir: Path | None = None) -> Path:
        path = self._paths[kind]
        return path if data_dir is None else data_dir / path.relative_to(self._data_dir)


def new_parts(parts: Path, folder: Path) -> Path:
    shutil.copytree(parts, folder, dirs_exist_ok=True)
    return folder


def another_head(parts: Path, number: int) -> None:
    head = heads.load((parts / HEAD_FILE).read_bytes())
    heads.save(
        heads.Head(head.weight, head.bias, head.classes, temperature=1 + number / 10),
        parts / HEAD_FILE,
    )


def another_backbone(parts: Path) -> None:
    import onnx

    model = onnx.load(parts / BACKBONE_FILE)
    model.doc_string = "another"
    onnx.save(model, parts / BACKBONE_FILE)
    manifest = msgspec.json.decode((parts / MANIFEST_FILE).read_bytes(), type=Manifest)
    digest = fsync.digest_of(parts / BACKBONE_FILE)
    made = msgspec.structs.replace(manifest, backbone_digest=digest)
    (parts / MANIFEST_FILE).write_bytes(msgspec.json.encode(made))


@pytest.fixture(scope="module")
def three(
    tmp_path_factory: pytest.TempPathFactory, parts: Path, images: Path
) -> Iterator[tuple[House, graftml.Client]]:
    """Versions 1 and 2 of `ants` on one backbone, 3 and `bees` on another; and a server."""
    folder = tmp_path_factory.mktemp("three")
    own = new_parts(parts, folder / "parts")
    house = House(folder, own)
    client = house.start("", ONE_AT_A_TIME)
    dataset = client.upload_dataset(images)
    for number, model in ((1, "ants"), (2, "ants"), (3, "ants"), (1, "bees")):
        another_head(own, number if model == "ants" else 9)
        if number == 3:
            another_backbone(own)
        assert client.fine_tune(dataset, model).wait(GUARD_S).version == number
        if model == "ants":
            client.set_alias("ants", "live", number)
    yield house, client
    house.close()


@pytest.fixture
def files(three: tuple[House, graftml.Client], tmp_path: Path) -> Iterator[Files]:
    """Whole at the beginning and at the end, and not in memory."""
    house, client = three
    files = Files(house.data_dir)
    for kind in ("backbone", "head", "report"):
        shutil.copyfile(files.of(kind), tmp_path / kind)
    forget(client)
    yield files
    for kind in ("backbone", "head", "report"):
        shutil.copyfile(tmp_path / kind, files.of(kind))


def forget(client: graftml.Client) -> None:
    """Lets the memory be filled by another backbone and head."""
    assert client.predict(image(), model="ants", version=1)[0].version == 1


def image() -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 20)).save(out, "PNG")
    return out.getvalue()


def answered_by(client: graftml.Client, **which: str | int) -> int:
    [answer] = client.predict(image(), model="ants", **which)  # type: ignore[arg-type]
    assert answer.label == "red"
    return int(answer.version)


def open_inference(house: House, version: str = "") -> int:
    request = pb.ModelInferRequest(model_name="ants", model_version=version)
    request.inputs.add(name="images", datatype="BYTES", shape=[1]).contents.bytes_contents.append(
        image()
    )
    with grpc.insecure_channel(house.server.address) as channel:
        stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
        return int(stub.ModelInfer(request, timeout=GUARD_S).model_version)


def metric(house: House, name: str) -> float:
    with urllib.request.urlopen(house.server.metrics_url, timeout=GUARD_S) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def refused(client: graftml.Client, **which: str | int) -> str:
    with pytest.raises(graftml.errors.DataLoss) as caught:
        answered_by(client, **which)
    assert caught.value.reason == "MODEL_UNLOADABLE"
    return str(caught.value)


def logged(house: House) -> int:
    return sum("cannot be read" in line and "a stored" in line for line in house.server.seen)


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_version_is_refused_and_serves_again_when_its_file_is_put_back(
    three: tuple[House, graftml.Client], files: Files, what: str
) -> None:
    house, client = three
    kind, damage, says = DAMAGES[what]
    whole = files.of(kind).read_bytes()
    before, counted = logged(house), metric(house, "graft_blobs_damaged_total")
    damage(files.of(kind))

    assert f"the {kind} {says}" in refused(client)
    assert f"the {kind} is missing" in refused(client, version=3), "a damaged one is set aside"
    assert refused(client, alias="live")
    with pytest.raises(grpc.RpcError) as caught:
        open_inference(house)
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    # Another version answers as soon as somebody says so.
    client.rollback_alias("ants", "live")
    assert answered_by(client, alias="live") == open_inference(house, "live") == 2
    # The others serve on, but for those on the same backbone.
    forget(client)
    if kind == "backbone":
        with pytest.raises(graftml.errors.DataLoss):
            client.predict(image(), model="bees")
    else:
        assert client.predict(image(), model="bees")[0].version == 1
    with pytest.raises(graftml.errors.DataLoss):
        client.export_model("ants", house.data_dir / "none.onnx", version=3)
    assert [version.version for version in client.list_versions("ants")] == [3, 2, 1]
    # Its log comes here after the answers. Once, however many calls there were.
    wait_until(lambda: logged(house) > before)
    assert logged(house) == before + 1
    assert metric(house, "graft_blobs_damaged_total") == counted + 1

    files.of(kind).write_bytes(whole)
    client.set_alias("ants", "live", 3)
    assert answered_by(client) == answered_by(client, alias="live") == 3


def test_a_missing_report_is_reported_and_the_version_serves(
    three: tuple[House, graftml.Client], files: Files
) -> None:
    _, client = three
    whole = files.of("report").read_bytes()
    files.of("report").unlink()
    with pytest.raises(graftml.errors.DataLoss, match="the report is missing"):
        client.get_report("ants", version=3)
    assert answered_by(client, version=3) == 3
    files.of("report").write_bytes(whole)
    client.get_report("ants", version=3)


def test_a_server_starts_on_damaged_files_and_a_new_version_brings_them_whole_again(
    three: tuple[House, graftml.Client], tmp_path: Path, images: Path
) -> None:
    first, _ = three
    house = House(tmp_path, tmp_path / "parts")
    shutil.copytree(first.data_dir, house.data_dir, ignore=shutil.ignore_patterns("lock"))
    new_parts(first._parts, tmp_path / "parts")
    try:
        flip(Files(first.data_dir).of("backbone", house.data_dir))
        client = house.start()
        assert answered_by(client, version=2) == 2
        assert refused(client, version=3)
        # On the same backbone, which the trainer brings whole again: all on it are served.
        another_head(tmp_path / "parts", 4)
        dataset = client.upload_dataset(images)
        assert client.fine_tune(dataset, "ants").wait(GUARD_S).version == 4
        assert answered_by(client) == 4
        assert answered_by(client, version=3) == 3
        assert client.predict(image(), model="bees")[0].version == 1
        house.is_sound()
    finally:
        house.close()
