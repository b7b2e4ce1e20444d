"""Images that are not paths or arrays: open files, PIL images of every mode, base64, URLs."""

import base64
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graftml
import numpy as np
import pytest
from graftml import _images
from graftml.testing import FakeGraft
from PIL import Image

from service.domain import ImageDecoding
from service.engine import preprocess
from tests.unit.engine.test_decoding import cut_out, deep, transparent
from tests.unit.engine.test_preprocess import encode, gradient

GREYS = np.arange(64 * 48, dtype=np.uint16).reshape(48, 64)
JPEG = encode(gradient(40, 30), "JPEG")


def decoded(image: Any, decoding: ImageDecoding) -> Any:
    """Returns the pixels of an image sent to Predict, and of the same image uploaded."""
    message = _images.to_message(image, "images[0]")
    if message.WhichOneof("content") == "encoded":
        sent = preprocess.decode(message.encoded, decoding)
    else:
        tensor = message.tensor
        sent = preprocess.from_tensor(tensor.data, list(tensor.shape), is_float=False)
    uploaded = preprocess.decode(_images.to_file(image, "data[0]"), decoding)
    np.testing.assert_array_equal(sent, uploaded)
    return sent


FILES: dict[str, Callable[[], bytes]] = {
    "RGBA": lambda: encode(cut_out("RGBA"), "PNG"),
    "LA": lambda: encode(cut_out("LA"), "PNG"),
    "P, one colour": lambda: transparent("PNG", "P"),
    "P, alphas": lambda: transparent("PNG", "P alphas"),
    "RGB with a transparent colour": lambda: transparent("PNG", "RGB"),
    "L with a transparent colour": lambda: transparent("PNG", "L"),
    "1": lambda: encode(gradient(40, 30).convert("1"), "PNG"),
    "GIF": lambda: transparent("GIF", "P"),
    "WebP": lambda: encode(cut_out("RGBA"), "WEBP", lossless=True),
    "TIFF of premultiplied colours": lambda: encode(cut_out("RGBA"), "TIFF", tiffinfo={338: 1}),
    "CMYK": lambda: encode(gradient(40, 30).convert("CMYK"), "JPEG"),
    "16 bits, PNG": lambda: deep("PNG", GREYS),
    "16 bits, little-endian": lambda: deep("TIFF, little-endian", GREYS),
    "16 bits, big-endian": lambda: deep("TIFF, big-endian", GREYS),
    "16 bits, big-endian, LZW": lambda: deep("TIFF, big-endian, LZW", GREYS),
    "16 of which 12 are declared": lambda: encode(
        Image.fromarray(GREYS), "TIFF", tiffinfo={281: 4095}
    ),
    "32 bits": lambda: encode(Image.fromarray(GREYS.astype(np.int32)), "TIFF"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("decoding", [ImageDecoding(), ImageDecoding("#2080c0", 12)])
def test_a_pil_image_gives_what_its_file_gives(name: str, decoding: ImageDecoding) -> None:
    data = FILES[name]()
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decoded(image, decoding), preprocess.decode(data, decoding))


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa", "RGBX", "YCbCr", "HSV", "LAB"])
def test_modes_that_no_file_of_ours_has_look_as_in_pillow(mode: str) -> None:
    image = gradient(40, 30)
    if mode == "La":
        image = image.convert("LA")
    elif mode == "RGBa":
        image = image.convert("RGBA")
    elif mode == "PA":
        image = image.convert("P")
    given = image.convert(mode)
    wanted = (
        preprocess.fit(given.convert("LA" if mode == "La" else "RGBA").convert("RGB"))
        if (mode in ("La", "RGBa", "PA"))
        else preprocess.fit(given.convert("RGB"))
    )
    np.testing.assert_array_equal(decoded(given, ImageDecoding()), wanted)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
@pytest.mark.parametrize("shape", [(48, 64), (48, 64, 1)])
def test_a_grey_array_of_16_bits_is_grey_of_16_bits(order: str, shape: tuple[int, ...]) -> None:
    decoding = ImageDecoding(bit_depth=12)
    array = GREYS.astype(order).reshape(shape)
    np.testing.assert_array_equal(
        decoded(array, decoding), preprocess.decode(deep("PNG", GREYS), decoding)
    )


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (Image.new("F", (4, 4), 0.5), r"mode is F.*0\.\.255.*convert\('L'\)"),
        (Image.fromarray(np.full((4, 4), 70_000, np.int32)), "from 70000 to 70000"),
        (Image.fromarray(np.full((4, 4), -1, np.int32)), "from -1 to -1"),
        (Image.open(io.BytesIO(JPEG[:700])), "damaged or cut short"),
        (np.zeros((4, 6, 3), np.uint16), r"image >> 8\).astype\('uint8'\)"),
        (io.StringIO("text"), r"open\(path, 'rb'\)"),
        (io.BytesIO(), r"seek\(0\)"),
        (base64.b64encode(JPEG).decode(), r"looks like base64.*b64decode"),
        ("data:image/jpeg;base64," + base64.b64encode(JPEG).decode(), "data URI.*b64decode"),
        ("https://example.com/" + "a" * 5000, "is a URL"),
        ("s3://bucket/a.jpg", "is a URL"),
        ("x" * 4096 + ".jpg/" * 100, "longer than any path"),
        ("a\0b", "is no path"),
    ],
)  # fmt: skip
def test_one_of_many_that_is_none_is_named_with_what_to_do(
    client: Any, image: Any, says: str
) -> None:
    good = gradient(8, 8)
    for send, field in (
        (lambda: client.predict([good, image], "pets"), "images[1]"),
        (lambda: client.upload_dataset([("cat", good), ("dog", image)]), "data[1]"),
    ):
        with pytest.raises(graftml.InvalidArgument, match=f"(?s){says}") as caught:
            send()
        assert caught.value.violations[0].field == field
        assert field in caught.value.message
        assert len(caught.value.message) < 400
        if isinstance(image, io.IOBase):
            image.seek(0)


def test_a_missing_file_among_many_is_named_by_its_place(client: Any, tmp_path: Path) -> None:
    missing = tmp_path / "gone.jpg"
    with pytest.raises(FileNotFoundError, match=r"\(images\[1\]\).*gone\.jpg"):
        client.predict([gradient(8, 8), missing], "pets")
    with pytest.raises(FileNotFoundError, match=r"\(data\[0\]\).*gone\.jpg"):
        client.upload_dataset([("cat", str(missing))])
    with pytest.raises(IsADirectoryError, match=r"images\[0\]"):
        client.predict(tmp_path, "pets")


def test_an_open_file_is_one_image(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG)
    with path.open("rb") as file:
        (image,) = _images.as_many(file)
        assert _images.to_message(image, "images[0]").encoded == JPEG
    (image,) = _images.as_many(io.BytesIO(JPEG))
    assert _images.to_message(image, "images[0]").encoded == JPEG
    assert _images.to_file(io.BytesIO(JPEG), "data[0]") == JPEG


def test_a_file_that_is_read_asynchronously_is_refused() -> None:
    class Upload:
        async def read(self) -> bytes:
            return JPEG

    with pytest.raises(graftml.InvalidArgument, match=r"await file\.read\(\)"):
        _images.to_message(Upload(), "images[0]")  # type: ignore[arg-type]


def zipped(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/a.jpg", JPEG)
    return path.read_bytes()


def test_archives_that_are_no_paths_are_refused_for_that(client: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    data = zipped(path)
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(path, "a.zip")
    with zipfile.ZipFile(path) as opened, path.open("rb") as file, tarfile.open(tar) as tarred:
        for given, says in [
            (data, "bytes of an archive: write it to a file and give its path"),
            (bytearray(data), "bytes of an archive"),
            (JPEG, "bytes of a file"),
            (io.BytesIO(data), "open file"),
            (file, "open file"),
            (opened, "open archive.*give its path"),
            (tarred, "open archive"),
            (gradient(8, 8), "a single image"),
            (np.zeros((4, 4, 3), np.uint8), "a single image"),
            ("https://example.com/a.zip", "is a URL"),
            (base64.b64encode(data).decode(), "looks like base64"),
        ]:
            for send in (
                lambda given=given: client.upload_dataset(given),
                lambda given=given: client.fine_tune(given, "pets"),
            ):
                with pytest.raises(graftml.InvalidArgument, match=says) as caught:
                    send()
                assert len(caught.value.message) < 300


HALF = "a\ud800"


@pytest.mark.parametrize(
    "send",
    [
        lambda c: c.predict(gradient(8, 8), HALF),
        lambda c: list(c.predict_stream([gradient(8, 8)], HALF)),
        lambda c: c.fine_tune("ds-1", HALF),
        lambda c: c.fine_tune("ds-1", "pets", labels={"team": HALF}),
        lambda c: c.fine_tune([(HALF, gradient(8, 8))], "pets"),
        lambda c: c.upload_dataset([("cat", gradient(8, 8)), (HALF, gradient(8, 8))]),
        lambda c: c.upload_dataset([("cat", gradient(8, 8))], display_name=HALF),
        lambda c: c.rank_backbones("ds-1", backbones=[HALF]),
        lambda c: c.get_job(HALF),
        lambda c: list(c.list_jobs(model=HALF)),
        lambda c: c.set_alias("pets", HALF, 1),
        lambda c: c.get_report("pets", alias=HALF),
        lambda c: c.export_model("pets", "unused.onnx", alias=HALF),
        lambda c: next(iter(c.job(HALF).events())),
        lambda c: c.delete_model(HALF),
    ],
)
def test_text_that_no_message_can_hold_is_an_invalid_argument(client: Any, send: Any) -> None:
    with pytest.raises(graftml.InvalidArgument, match=r"\\ud800 at 1 is half of a character"):
        send(client)


def test_names_of_files_that_are_no_text_do_not_stop_an_upload(
    client: Any, server: FakeGraft, tmp_path: Path
) -> None:
    folder = tmp_path / "b\udcff"
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        (folder / label / "a\udcff.jpg").write_bytes(JPEG)
    dataset = client.upload_dataset(folder)
    assert dataset.display_name == r"b\udcff"
    client.upload_dataset([(c, folder / c / "a\udcff.jpg") for c in ("cat", "dog")])
    sent = server.requests("UploadDataset")[-1]
    assert [message.image.filename for message in sent[1:3]] == [r"a\udcff.jpg"] * 2
