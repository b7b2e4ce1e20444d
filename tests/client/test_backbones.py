"""Backbones that are registered, listed and deleted: both clients and the command."""

import hashlib
import json
from pathlib import Path
from typing import Any

import graftml
import pytest
from graftml import _backbones
from graftml.cli import main
from graftml.testing import FakeGraft
from graftml_stubs.v1 import backbone_pb2 as pb

COLOUR = (0.5, 0.25, 0.125)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of three chunks."""
    monkeypatch.setattr(_backbones, "CHUNK_BYTES", 10)
    path = tmp_path / "network.onnx"
    path.write_bytes(bytes(range(25)))
    return path


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_file_arrives_as_it_is_with_its_description(
    client: Any, server: FakeGraft, file: Path
) -> None:
    told: list[tuple[int, int | None]] = []
    backbone = client.register_backbone(
        file,
        "clip",
        size=336,
        mean=COLOUR,
        std=COLOUR,
        layout="nhwc",
        output="image_embeds",
        licence="MIT",
        sha256=digest(file),
        on_progress=lambda *counts: told.append(counts),
    )
    [sent] = server.requests("RegisterBackbone")
    assert b"".join(message.chunk for message in sent) == file.read_bytes()
    assert told == [(10, 25), (20, 25), (25, 25)]
    assert (backbone.name, backbone.source, backbone.size) == ("onnx/clip", "registered", 336)
    assert (backbone.licence, backbone.source_digest) == ("MIT", digest(file))
    assert backbone.create_time is not None


def test_what_is_described_is_what_is_sent() -> None:
    assert _backbones.described("x", 96, COLOUR, COLOUR, "nhwc", "y", "z", "0") == (
        pb.BackboneDescription(
            name="x",
            size=96,
            mean=COLOUR,
            std=COLOUR,
            layout=pb.IMAGE_LAYOUT_NHWC,
            output="y",
            licence="z",
            sha256="0",
        )
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"size": "96"}, "size is '96': it must be a whole number"),
        ({"mean": 0.5}, "mean is 0.5: it must be a list, each a number"),
        ({"layout": "chwn"}, "layout is 'chwn': it must be one of nchw, nhwc"),
    ],
)
def test_a_wrong_argument_is_told_before_anything_is_sent(
    client: Any, server: FakeGraft, file: Path, changes: dict[str, Any], told: str
) -> None:
    given = {"size": 96, "mean": COLOUR, "std": COLOUR, **changes}
    with pytest.raises(graftml.InvalidArgument) as caught:
        client.register_backbone(file, "x", **given)
    assert caught.value.message == told
    assert server.calls == []


def test_a_file_that_is_not_there_is_named(client: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.onnx"):
        client.register_backbone(tmp_path / "gone.onnx", "x", size=96, mean=COLOUR, std=COLOUR)
    with pytest.raises(
        graftml.InvalidArgument, match="is a folder: give the path of one ONNX file"
    ):
        client.register_backbone(tmp_path, "x", size=96, mean=COLOUR, std=COLOUR)


def test_an_upload_that_breaks_is_sent_again_from_its_beginning(
    client: Any, server: FakeGraft, file: Path
) -> None:
    server.fail("RegisterBackbone", graftml.Unavailable("restarting"))
    client.register_backbone(file, "x", size=96, mean=COLOUR, std=COLOUR)
    _, sent = server.requests("RegisterBackbone")
    assert b"".join(message.chunk for message in sent) == file.read_bytes()


def test_what_is_too_new_is_unknown(client: Any) -> None:
    from graftml import _answers

    assert _answers.backbone(pb.Backbone(name="x", source=99)).source == "unknown"  # type: ignore[arg-type]


def test_the_command_registers_lists_and_deletes(
    server: FakeGraft, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--server", server.target, "--json"]
    colours = ["--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225"]
    described = ["--name", "clip", "--size", "224", *colours, "--licence", "MIT"]
    assert main(["backbones", "register", str(file), *described, *where]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["name"], made["size"], made["licence"]) == ("onnx/clip", 224, "MIT")
    assert main(["backbones", *where]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["name"] for each in listed] == ["efficientnet_lite0", "onnx/clip"]
    assert main(["backbones", "list", "--server", server.target]) == 0
    assert "onnx/clip" in capsys.readouterr().out
    assert main(["backbones", "delete", "onnx/clip", *where]) == 0
    assert json.loads(capsys.readouterr().out) == {"deleted": "onnx/clip"}
    assert main(["backbones", "delete", "clip", *where]) == 1
    assert "no backbone is registered" in capsys.readouterr().err
