"""Files of versions that were damaged on disk: told, passed by, and served again when put back."""

import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import graft
import grpc
import msgspec
import pytest

from service.contract import BACKBONE_FILE, HEAD_FILE, MANIFEST_FILE
from service.domain import Manifest
from service.engine import head as heads
from service.rpc.open_inference import grpc_predict_v2_pb2 as pb
from service.rpc.open_inference import grpc_predict_v2_pb2_grpc
from service.storage import durable
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

    def __init__(self, data_dir: Path, client: graft.Client) -> None:
        version = client.get_version("ants", version=3)
        artifacts = data_dir / "artifacts"
        self.backbone = artifacts / "backbones" / f"{version.backbone_digest}.onnx"
        (self.folder,) = (
            path.parent
            for path in (artifacts / "versions").glob(f"*/{MANIFEST_FILE}")
            if version.job_id in path.read_text()
        )
        self.head = self.folder / HEAD_FILE

    def of(self, kind: str) -> Path:
        return self.backbone if kind == "backbone" else self.head


def new_parts(parts: Path, folder: Path) -> Path:
    shutil.copytree(parts, folder, dirs_exist_ok=True)
    return folder


def another_head(parts: Path, number: int) -> None:
    head = heads.load(parts / HEAD_FILE)
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
    digest = durable.digest_of(parts / BACKBONE_FILE)
    made = msgspec.structs.replace(manifest, backbone_digest=digest)
    (parts / MANIFEST_FILE).write_bytes(msgspec.json.encode(made))


@pytest.fixture(scope="module")
def three(
    tmp_path_factory: pytest.TempPathFactory, parts: Path, images: Path
) -> Iterator[tuple[House, graft.Client]]:
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
        if model == "ants" and number != 2:
            client.set_alias("ants", "live", number, falls_back=True)
            client.set_alias("ants", "fixed", number)
    yield house, client
    house.close()


@pytest.fixture
def files(three: tuple[House, graft.Client], tmp_path: Path) -> Iterator[Files]:
    """Whole at the beginning and at the end, and not in memory."""
    house, client = three
    files = Files(house.data_dir, client)
    for kind in ("backbone", "head"):
        shutil.copyfile(files.of(kind), tmp_path / kind)
    forget(client)
    yield files
    for kind in ("backbone", "head"):
        shutil.copyfile(tmp_path / kind, files.of(kind))


def forget(client: graft.Client) -> None:
    """Lets the memory be filled by another backbone and head."""
    assert client.predict(image(), model="ants", version=1)[0].version == 1


def image() -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 20)).save(out, "PNG")
    return out.getvalue()


def answered_by(client: graft.Client, **which: str | int) -> int:
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


def is_ready(house: House, version: str = "") -> bool:
    with grpc.insecure_channel(house.server.address) as channel:
        stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = pb.ModelReadyRequest(name="ants", version=version)
        return bool(stub.ModelReady(request, timeout=GUARD_S).ready)


def metric(house: House, name: str) -> float:
    with urllib.request.urlopen(house.server.metrics_url, timeout=GUARD_S) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def refused(client: graft.Client, **which: str | int) -> str:
    with pytest.raises(graft.errors.DataLoss) as caught:
        answered_by(client, **which)
    assert caught.value.reason == "MODEL_UNLOADABLE"
    return str(caught.value)


def told(house: House) -> int:
    return sum("a version cannot be served" in line for line in house.server.seen)


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_version_is_told_and_passed_by_and_serves_again_when_it_is_put_back(
    three: tuple[House, graft.Client], files: Files, what: str
) -> None:
    house, client = three
    kind, damage, says = DAMAGES[what]
    whole = files.of(kind).read_bytes()
    before, answered = told(house), metric(house, "graft_fallen_back_calls_total")
    damage(files.of(kind))

    assert answered_by(client) == 2
    assert answered_by(client, alias="live") == 1
    assert open_inference(house) == 2
    assert open_inference(house, "live") == 1
    [streamed] = client.predict_stream([image()], model="ants")
    assert streamed.version == 2
    for which in ({"alias": "fixed"}, {"version": 3}):
        assert f"the version's {kind} {says}" in refused(client, **which)  # type: ignore[arg-type]
    with pytest.raises(grpc.RpcError) as caught:
        open_inference(house, "3")
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS

    ready = {which: is_ready(house, which) for which in ("", "live", "fixed", "3", "2")}
    assert ready == {"": True, "live": True, "fixed": False, "3": False, "2": True}

    # The others serve on, but for those on the same backbone.
    assert answered_by(client, version=1) == 1
    forget(client)
    if kind == "backbone":
        with pytest.raises(graft.errors.DataLoss):
            client.predict(image(), model="bees")
    else:
        assert client.predict(image(), model="bees")[0].version == 1

    damages = {version.version: version.damage for version in client.list_versions("ants")}
    assert f"the version's {kind} {says}" in damages.pop(3)
    assert set(damages.values()) == {""}
    assert client.get_version("ants", alias="live").damage
    assert client.get_model("ants").falling_back_aliases == ("latest", "live")
    assert metric(house, "graft_damaged_files") == 1
    assert metric(house, "graft_fallen_back_calls_total") == answered + 5
    # Its log comes here after the answers. Once, however many calls there were.
    wait_until(lambda: told(house) > before)
    assert told(house) == before + 1
    with pytest.raises(graft.errors.DataLoss):
        client.export_model("ants", files.folder.parent / "none.onnx")

    files.of(kind).write_bytes(whole)
    assert answered_by(client) == 3
    assert answered_by(client, alias="fixed") == 3
    assert is_ready(house, "fixed")
    assert client.get_version("ants", version=3).damage == ""
    assert metric(house, "graft_damaged_files") == 0


def test_a_missing_report_is_told_and_the_version_serves(
    three: tuple[House, graft.Client], files: Files
) -> None:
    _, client = three
    report = files.folder / "report.json"
    whole = report.read_bytes()
    report.unlink()
    with pytest.raises(graft.errors.DataLoss, match="report cannot be read"):
        client.get_report("ants")
    assert answered_by(client) == 3
    report.write_bytes(whole)
    client.get_report("ants")


def test_a_server_starts_on_damaged_files_and_a_good_version_serves_at_once(
    three: tuple[House, graft.Client], tmp_path: Path, images: Path
) -> None:
    first, client = three
    files = Files(first.data_dir, client)
    house = House(tmp_path, tmp_path / "parts")
    shutil.copytree(first.data_dir, house.data_dir, ignore=shutil.ignore_patterns("lock"))
    new_parts(first._parts, tmp_path / "parts")
    try:
        backbone = house.data_dir / files.backbone.relative_to(first.data_dir)
        flip(backbone)
        client = house.start()
        assert answered_by(client) == 2
        assert refused(client, version=3)
        # On the same backbone, which the trainer brings whole again: all on it are served.
        another_head(tmp_path / "parts", 4)
        dataset = client.upload_dataset(images)
        assert client.fine_tune(dataset, "ants").wait(GUARD_S).version == 4
        assert answered_by(client) == 4
        assert answered_by(client, version=3) == 3
        assert client.predict(image(), model="bees")[0].version == 1
        assert client.get_version("ants", version=3).damage == ""
        house.is_sound()
    finally:
        house.close()
