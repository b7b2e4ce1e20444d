"""Images travel unchanged, whatever they came as; what is none is refused with what to do."""

import io
from pathlib import Path
from typing import Any

import graftml
import numpy as np
import pytest
from graftml import _images
from graftml.testing import FakeGraft, SentImage
from PIL import Image

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


@pytest.fixture
def arrived(connect: Any) -> Any:
    """Sends images; returns what arrived."""
    sent: list[SentImage] = []

    def note(_model: str, image: SentImage) -> dict[str, float]:
        sent.append(image)
        return {"cat": 1.0}

    with FakeGraft(predict=note) as server:
        server.add_model("pets")

        def send(images: Any) -> list[SentImage]:
            sent.clear()
            connect(server.target).predict(images, "pets")
            return list(sent)

        yield send


def test_paths_and_bytes_travel_as_files(arrived: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"of a file")
    kinds = [path, str(path), b"of a file", bytearray(b"of a file"), memoryview(b"of a file")]
    assert arrived(kinds) == [SentImage(b"of a file")] * 5
    for kind in kinds:
        assert arrived(kind) == [SentImage(b"of a file")]


def test_arrays_travel_as_pixels(arrived: Any) -> None:
    floats = (PIXELS / 255).astype(np.float32)
    assert arrived([PIXELS, floats]) == [
        SentImage(PIXELS.tobytes(), (4, 6, 3), "uint8"),
        SentImage(floats.tobytes(), (4, 6, 3), "float32"),
    ]


def test_a_view_of_an_array_travels_as_it_looks(arrived: Any) -> None:
    view = PIXELS[::-1, ::2]
    assert arrived(view) == [SentImage(np.ascontiguousarray(view).tobytes(), (4, 3, 3), "uint8")]


def test_an_array_of_four_dimensions_is_many_images(arrived: Any) -> None:
    assert len(arrived(np.stack([PIXELS] * 3))) == 3


def test_a_colour_image_travels_as_pixels(arrived: Any) -> None:
    assert arrived(Image.fromarray(PIXELS)) == [SentImage(PIXELS.tobytes(), (4, 6, 3), "uint8")]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_an_image_of_another_mode_is_left_to_the_services_conversion(
    arrived: Any, mode: str
) -> None:
    image = Image.new(mode, (6, 4))
    [sent] = arrived(image)
    with Image.open(io.BytesIO(sent.data)) as read:
        assert (read.format, read.size) == ("PNG", (6, 4))
        assert np.array_equal(np.asarray(read), np.asarray(image))


def test_a_mode_that_png_has_not_is_converted(arrived: Any) -> None:
    [sent] = arrived(Image.new("CMYK", (6, 4)))
    with Image.open(io.BytesIO(sent.data)) as read:
        assert read.mode == "RGB"


def test_an_image_that_its_exif_data_turns_travels_upright(arrived: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG", exif=exif)
    with Image.open(io.BytesIO(file.getvalue())) as image:
        [sent] = arrived(image)
    assert sent.shape == (6, 4, 3)
    assert sent.data == np.rot90(PIXELS, -1).tobytes()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS[:, :, 0], "it is grey: repeat it with numpy.stack"),
        (PIXELS[:, :, :1], "it is grey: repeat it with numpy.repeat"),
        (np.zeros((4, 6, 4), np.uint8), r"alpha channel: leave it out with image\[..., :3\]"),
        (PIXELS.transpose(2, 0, 1), r"image.transpose\(1, 2, 0\)"),
        (np.zeros((0, 6, 3), np.uint8), r"its shape is \[0, 6, 3\]"),
        (np.zeros(3, np.uint8), r"its shape is \[3\]"),
        (PIXELS.astype(np.float64), r"float64: give uint8.*\(image / 255\).astype\('float32'\)"),
        (PIXELS / 255, r"its elements are float64: .* with image.astype\('float32'\)"),
        (PIXELS.astype(">f4"), r">f4: .* with \(image / 255\).astype\('<f4'\)"),
        (PIXELS.astype(np.float32), "not all from 0 to 1: divide by 255"),
        (PIXELS.astype(np.int64), r"its elements are int64: .* with image.astype\('uint8'\)"),
        (PIXELS.astype(np.uint32), r"its elements are uint32: .* with image.astype\('uint8'\)"),
        (PIXELS > 3, r"its elements are bool: .* with image.astype\('uint8'\) \* 255"),
    ],
)
def test_an_array_that_is_no_image_is_refused_with_what_to_do(
    connect: Any, image: Any, message: str
) -> None:
    with pytest.raises(graftml.InvalidArgument, match=message) as caught:
        connect("localhost:1").predict([PIXELS, image], "pets")
    assert caught.value.reason == graftml.Reason.TENSOR_INVALID
    assert caught.value.violations[0].field == "images[1]"


@pytest.mark.parametrize("image", [3, object(), None])
def test_what_is_no_image_is_refused_with_what_is(connect: Any, image: Any) -> None:
    for images in (image, [image]):
        with pytest.raises(graftml.InvalidArgument, match="is not an image: give a path"):
            connect("localhost:1").predict(images, "pets")


def test_an_image_that_fits_no_message_is_refused_before_it_is_sent(connect: Any) -> None:
    huge = np.zeros((1, 23_000_000, 3), np.uint8)
    with pytest.raises(graftml.InvalidArgument, match="66 MiB, more than the 63 MiB") as caught:
        connect("localhost:1").predict(huge, "pets")
    assert caught.value.reason == graftml.Reason.IMAGE_TOO_LARGE


def test_a_float_array_out_of_range_is_not_wrapped_around_for_an_upload(client: Any) -> None:
    bright = np.full((2, 2, 3), 1.5, np.float32)
    with pytest.raises(graftml.InvalidArgument, match="not all from 0 to 1"):
        client.upload_dataset([("cat", bright)])


def test_grey_of_32_bits_that_looks_like_8_is_refused(client: Any) -> None:
    grey = Image.fromarray(np.array([[0, 255]], np.int32))
    says = r"looks like 8 bits: convert it to 'L', or scale it to 0\.\.65535"
    for send in (
        lambda image: client.predict([image], "pets"),
        lambda image: client.upload_dataset([("cat", image)]),
    ):
        with pytest.raises(graftml.InvalidArgument, match=says) as caught:
            send(grey)
        assert caught.value.reason == graftml.Reason.IMAGE_UNREADABLE
    client.upload_dataset([("cat", grey.convert("L")), ("dog", grey.point(lambda x: x * 257))])


def test_the_bound_of_a_call_is_well_below_that_of_a_message() -> None:
    assert 2 * _images.MAX_CALL_BYTES <= 64 * 2**20
    assert _images.MAX_IMAGE_BYTES < 64 * 2**20
