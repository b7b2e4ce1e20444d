"""One way from a file to pixels: training, serving and the lines for exported models agree."""

import asyncio
import hashlib
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from service.contract import (
    DomainAdaptation,
    Gate,
    Note,
    RankSpec,
)
from service.domain import Decision, ImageDecoding
from service.engine import export, preprocess
from service.engine import head as heads
from service.engine.engine import Engine, EngineLimits, ModelFiles
from service.engine.feature_cache import FeatureCache
from service.engine.head import Head
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from service.ingest import reader
from service.ingest.packs import Location
from service.ops.metrics import Metrics
from tests.keys import key
from tests.trainer.conftest import MakeSpec, Told, incumbent, source_of
from tests.unit.engine.test_decoding import cut_out, deep, transparent
from tests.unit.engine.test_preprocess import encode, gradient
from trainer import data, ranking
from trainer.data import Files
from trainer.features import Features
from trainer.train import run

ROOT = Path(__file__).parents[2]
EXPORT = (ROOT / "docs" / "how-to" / "export.md").read_text()
GUARD_S = 60.0
GREYS = (np.arange(96 * 96, dtype=np.uint16).reshape(96, 96) % 4096).astype(np.uint16)
FEATURES = 3 * 8 * 8


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(gradient(500, 300), kind, exif=exif)


FILES = {
    "rgba.png": lambda: encode(cut_out("RGBA"), "PNG"),
    "palette.png": lambda: transparent("PNG", "P alphas"),
    "grey.png": lambda: deep("PNG", GREYS),
    "little.tif": lambda: deep("TIFF, little-endian", GREYS),
    "big.tif": lambda: deep("TIFF, big-endian", GREYS),
    "turned.jpg": lambda: turned("JPEG", 6),
    "large.jpg": lambda: encode(gradient(1400, 900), "JPEG"),
    "print.jpg": lambda: encode(gradient(300, 280).convert("CMYK"), "JPEG", quality=95),
    "turned.webp": lambda: turned("WEBP", 8),
    "first.gif": lambda: transparent("GIF", "P"),
    "colour.tif": lambda: encode(gradient(200, 300), "TIFF", compression="tiff_lzw"),
    "colour.avif": lambda: encode(cut_out("RGBA"), "AVIF"),
    "turned.heic": (ROOT / "tests/heic/turned.heic").read_bytes,
    "transparent.heic": (ROOT / "tests/heic/transparent.heic").read_bytes,
    "grey.heic": (ROOT / "tests/heic/grey-16-bit.heic").read_bytes,
}
DECODINGS = (ImageDecoding("#ffffff", 12), ImageDecoding("#208040", 16))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("images")
    for name, made in FILES.items():
        (folder / name).write_bytes(made())
    paths = tuple(folder / name for name in FILES)
    return Files(
        tuple(map(Location, paths)),
        tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths),
    )


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """uint8 [n, 224, 224, 3] -> the means of 8 x 8 squares of each colour, float32 [n, 192]."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node(
            "AveragePool", ["planes"], ["pooled"], kernel_shape=[28, 28], strides=[28, 28]
        ),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Div", ["flat", "scale"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "backbone",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 224, 224, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", FEATURES])],
        [numpy_helper.from_array(np.array(255, np.float32), "scale")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path = tmp_path_factory.mktemp("backbone") / "b.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    weight = random.normal(size=(3, FEATURES)).astype(np.float32)
    path = tmp_path_factory.mktemp("head") / "h.safetensors"
    heads.save(Head(weight, np.zeros(3, np.float32), ("a", "b", "c"), 1.0), path)
    return path


def served(
    images: Files, backbone: Path, head_file: Path, decodings: tuple[ImageDecoding, ...]
) -> list[npt.NDArray[np.float32]]:
    """Probabilities of two versions on one backbone, whose images share its batches."""
    files = {
        hashlib.sha256(path.read_bytes()).hexdigest(): path.read_bytes()
        for path in (backbone, head_file)
    }

    async def ask() -> list[npt.NDArray[np.float32]]:
        bounds = EngineLimits(
            threads=1, max_batch=8, max_queue=256, max_bytes=2**24, load_timeout_s=GUARD_S
        )
        runtime = OnnxRuntime(Provider("cpu", ""), 1)
        engine = Engine(
            runtime, lambda digest, _: files[digest], bounds, Metrics({"version": "test"})
        )
        try:
            calls = [
                engine.classify(
                    ModelFiles(key(f"m{n}"), 1, *files, decoding),
                    [partial(preprocess.decode, at.path.read_bytes()) for at in images.locations],
                    GUARD_S,
                )
                for n, decoding in enumerate(decodings)
            ]
            answers: list[Any] = await asyncio.gather(*calls)
        finally:
            engine.close()
        return [np.stack([outcome.probabilities for outcome in answer]) for answer in answers]

    return asyncio.run(ask())


def exported(
    images: Files,
    backbone: Path,
    head_file: Path,
    decoding: ImageDecoding,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Pixels and probabilities by the program of docs/how-to/export.md, nothing else."""
    composed = export.compose(
        backbone.read_bytes(), heads.load(head_file.read_bytes()), {}, decoding
    )
    names = run_documented(composed, tmp_path, monkeypatch)
    pixels = np.stack([names["pixels"](at.path) for at in images.locations])
    session = names["session"]
    (probabilities,) = session.run(None, {session.get_inputs()[0].name: pixels})
    return pixels, probabilities


def run_documented(
    composed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Runs the program of docs/how-to/export.md on an exported model; returns its names."""
    (tmp_path / "flowers.onnx").write_bytes(composed)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(encode(gradient(40, 30), "JPEG"))
    monkeypatch.chdir(tmp_path)
    short, program = re.findall(r"```python\n(.*?)```", EXPORT, re.DOTALL)
    few: dict[str, Any] = {}
    exec(compile(short, "docs/how-to/export.md", "exec"), few)
    names: dict[str, Any] = {}
    exec(compile(program, "docs/how-to/export.md", "exec"), names)
    # The six lines decode a JPEG at its full size.
    steps = names["steps"]
    if (steps["crop"], steps["resize"], steps["framing"]) == (224, 256, "crop"):
        assert abs(few["probabilities"][0] - names["probabilities"][0]).max() < 0.01
    return names


@pytest.mark.parametrize(
    "decision",
    [
        Decision(),
        Decision(rule="balanced"),
        Decision(rule="thresholds", thresholds={"a": 0.7}, default_threshold=0.35),
    ],
    ids=lambda decision: str(decision.rule),
)
def test_an_exported_model_says_how_it_decides(
    decision: Decision,
    backbone: Path,
    head_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prior = np.array([0.6, 0.4, 0], np.float32)
    head = replace(heads.load(head_file.read_bytes()), decision=decision, prior=prior)
    composed = export.compose(backbone.read_bytes(), head, {}, ImageDecoding())
    names = run_documented(composed, tmp_path, monkeypatch)
    told = json.loads(names["metadata"]["decision"])
    assert told == {
        "rule": decision.rule,
        "thresholds": decision.thresholds,
        "default_threshold": decision.default_threshold,
        "prior": pytest.approx([0.6, 0.4, 0]),
    }
    probabilities = np.random.default_rng(0).dirichlet([1, 1, 1], 200).astype(np.float32)
    expected = [None if i < 0 else head.classes[i] for i in head.decide(probabilities)]
    assert names["answers"](probabilities, told) == expected
    assert len({*expected}) == {"argmax": 3, "balanced": 2, "thresholds": 4}[decision.rule]


@pytest.mark.filterwarnings("ignore::Warning:PIL")
def test_training_serving_and_exported_models_see_the_same_pixels(
    images: Files,
    backbone: Path,
    head_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = served(images, backbone, head_file, DECODINGS)
    session = onnxruntime.InferenceSession(backbone, providers=["CPUExecutionProvider"])
    head = heads.load(head_file.read_bytes())
    seen = []
    for decoding, answer in zip(DECODINGS, answers, strict=True):
        learned = Files(images.locations, images.digests, decoding=decoding).decode()
        pixels, probabilities = exported(
            images, backbone, head_file, decoding, tmp_path, monkeypatch
        )
        for name, ours, theirs in zip(FILES, learned, pixels, strict=True):
            assert (ours == theirs).all(), name
        (features,) = session.run(None, {"images": learned})
        np.testing.assert_allclose(answer, head.probabilities(features), atol=1e-5)
        np.testing.assert_allclose(answer, probabilities, atol=1e-5)
        seen.append(learned)
    # What the versions differ in is seen where it should be, and nowhere else.
    changed = [name for name, one, two in zip(FILES, *seen, strict=True) if (one != two).any()]
    assert changed == [
        "rgba.png", "palette.png", "grey.png", "little.tif", "big.tif", "first.gif",
        "colour.avif", "transparent.heic",
    ]  # fmt: skip


def test_an_exported_model_says_how_its_images_are_decoded(backbone: Path, head_file: Path) -> None:
    composed = export.compose(
        backbone.read_bytes(), heads.load(head_file.read_bytes()), {}, ImageDecoding("#102030", 14)
    )
    properties = {p.key: p.value for p in onnx.load_from_string(composed).metadata_props}
    assert json.loads(properties["preprocess"]) == {
        **preprocess.describe(), "background": "#102030", "bit_depth": 14, "size": 224,
    }  # fmt: skip


# The dataset's depth


def test_the_depth_of_a_dataset_is_the_smallest_that_holds_all_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name, most in (("a", 900), ("b", 3000)):
        (folder / name).mkdir(parents=True)
        (folder / name / "1.png").write_bytes(deep("PNG", np.full((9, 9), most, np.uint16)))
    (folder / "a" / "2.jpg").write_bytes(encode(gradient(9, 9), "JPEG"))
    (folder / "a" / "3.tif").write_bytes(encode(gradient(9, 9), "TIFF"))
    noise = np.random.default_rng(0).integers(0, 9000, (60, 60)).astype(np.uint16)
    (folder / "a" / "cut-short.png").write_bytes(deep("PNG", noise)[:2000])
    assert reader.read_folder(folder).bit_depth == 12
    (folder / "b" / "2.jpg").write_bytes(encode(gradient(9, 8), "JPEG"))
    (folder / "b" / "3.jpg").write_bytes(encode(gradient(9, 7), "JPEG"))
    loaded = data.load(folder, background="#000000")
    assert loaded.train.decoding == loaded.validation.decoding == ImageDecoding("#000000", 12)
    assert data.load(folder, target_bit_depth=14).train.decoding.bit_depth == 14


def grey_folder(folder: Path, bright: int, dark: int) -> Path:
    """Two classes of 16-bit grey that differ in brightness alone."""
    random = np.random.default_rng(0)
    for label, level in (("bright", bright), ("dark", dark)):
        (folder / label).mkdir(parents=True)
        for n in range(10):
            noise = random.normal(0, level / 20, (40, 40))
            values = (level + noise).clip(0, 4095).astype(np.uint16)
            (folder / label / f"{n}.png").write_bytes(deep("PNG", values))
    return folder


@pytest.mark.usefixtures("small_network")
def test_a_job_keeps_its_decoding_with_the_version(tmp_path: Path, make_spec: MakeSpec) -> None:
    told = Told()
    folder = grey_folder(tmp_path / "greys", 3500, 1500)
    manifest = run(make_spec(folder, background="#0000ff"), told.append)
    assert manifest.decoding == ImageDecoding("#0000ff", 12)
    assert any("12 bits" in note.text for note in told.of(Note))


@pytest.mark.usefixtures("small_network")
def test_the_version_before_sees_its_images_as_it_was_trained(
    tmp_path: Path, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = grey_folder(tmp_path / "greys", 3500, 1500)
    first = tmp_path / "first"
    made = run(make_spec(folder, out_dir=str(first)), Told().append)
    # What it learned from is not asked of it again.
    new = grey_folder(tmp_path / "new", 3400, 1600)
    before = ImageDecoding("#000000", 16)
    seen = set()
    real = preprocess.open_image

    def noted(data: bytes, decoding: ImageDecoding) -> Image.Image:
        seen.add(decoding)
        return real(data, decoding)

    monkeypatch.setattr(preprocess, "open_image", noted)
    gate = Gate(not_worse_than="latest", max_latency_ms=1e6)
    behind = incumbent(first, made, decoding=before)
    manifest = run(make_spec(new, gate=gate, **behind), Told().append)
    assert seen == {before, manifest.decoding}
    assert manifest.decoding == ImageDecoding(bit_depth=12)
    assert [check.name for check in manifest.gate_checks] == ["not_worse", "latency"]


@pytest.mark.usefixtures("small_network")
def test_what_is_adapted_to_counts_for_the_depth_too(tmp_path: Path, make_spec: MakeSpec) -> None:
    source = grey_folder(tmp_path / "source", 900, 300)
    target = grey_folder(tmp_path / "target", 3500, 1500)
    manifest = run(
        make_spec(
            source,
            method=DomainAdaptation(technique="coral"),
            target=source_of(target),
        ),
        Told().append,
    )
    assert manifest.decoding.bit_depth == 12


def test_features_are_kept_by_what_was_decoded(tmp_path: Path, backbone: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(cut_out("RGBA"), "PNG"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    decodings = [ImageDecoding(), ImageDecoding("#000000"), ImageDecoding("#000000", 12)]

    class Source:
        space, precision, blocks, is_gpu = "s", "fp32", (3,), False

        def load(self) -> Any:
            return OnnxRuntime(Provider("cpu", ""), 1).load(backbone.read_bytes)

    cache = FeatureCache(tmp_path / "cache", 2**20)
    rows = []
    for number, decoding in enumerate(decodings):
        features = Features(Source(), cache, 1)
        rows.append(features.of(Files((Location(path),), (digest,), decoding=decoding))[0])
        assert features.computed == 1, number
        again = Features(Source(), cache, 1)
        kept = again.of(Files((Location(path),), (digest,), decoding=decoding))[0]
        assert again.computed == 0
        np.testing.assert_array_equal(kept, rows[-1])
    cache.close()
    assert (rows[0] != rows[1]).any()
    np.testing.assert_array_equal(rows[1], rows[2])


def test_a_sample_to_rank_on_is_decoded_by_its_own_depth(tmp_path: Path) -> None:
    folder = grey_folder(tmp_path / "greys", 3500, 1500)
    spec = RankSpec(data=source_of(folder), backbones=[], weights_dir=str(tmp_path))
    sample = ranking._sample(spec)
    assert sample.decoding == ImageDecoding(bit_depth=12)
    assert ranking._of(sample, slice(3)).decoding == sample.decoding
