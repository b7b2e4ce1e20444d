"""HEIC images that are put together of others: what is decoded for one, and what is too much."""

import struct
from pathlib import Path

import numpy as np
import pytest

from service.engine import decoder_limits, preprocess
from service.errors import InvalidInput, Reason

PLAIN = (Path(__file__).parents[2] / "heic" / "plain.heic").read_bytes()
CODED = 64
"""Side of the coded image in it, of which 64 x 48 are shown."""
HUGE = 7936


def box(kind: bytes, *content: bytes) -> bytes:
    data = b"".join(content)
    return struct.pack(">I4s", 8 + len(data), kind) + data


def full(kind: bytes, version: int, flags: int, *content: bytes) -> bytes:
    return box(kind, struct.pack(">I", version << 24 | flags), *content)


def composed(
    kind: bytes,
    parts: int,
    tile: int = CODED,
    side: int = CODED,
    *,
    links: dict[tuple[bytes, int], list[int]] | None = None,
    sizes_last: bool = False,
) -> bytes:
    """An image of `side` pixels put together of `parts` equal ones of `tile`.

    Items are numbered from 1, the one that is shown last.
    """
    at = PLAIN.index(b"hvcC") - 4
    codec = PLAIN[at : at + struct.unpack_from(">I", PLAIN, at)[0]]
    payload = PLAIN[PLAIN.rindex(b"mdat") + 4 :]
    shown = parts + 1
    properties = box(
        b"ipco",
        codec,
        full(b"ispe", 0, 0, struct.pack(">II", tile, tile)),
        full(b"ispe", 0, 0, struct.pack(">II", side, side)),
    )
    associated = [struct.pack(">HBBB", n, 2, 0x81, 2) for n in range(1, shown)]
    associated.append(struct.pack(">HBB", shown, 1, 3))
    association = full(b"ipma", 0, 0, struct.pack(">I", shown), *associated)
    order = (association, properties) if sizes_last else (properties, association)
    entries = [full(b"infe", 2, 1, struct.pack(">HH4sx", n, 0, b"hvc1")) for n in range(1, shown)]
    entries.append(full(b"infe", 2, 0, struct.pack(">HH4sx", shown, 0, kind)))
    links = links or {(b"dimg", shown): list(range(1, shown))}
    references = full(
        b"iref",
        0,
        0,
        *(
            box(name, struct.pack(f">HH{len(to)}H", source, len(to), *to))
            for (name, source), to in links.items()
        ),
    )
    rows = max(1, round(parts**0.5))
    if kind == b"grid":
        layout = struct.pack(">BBBBII", 0, 1, rows - 1, parts // rows - 1, side, side)
    else:
        layout = struct.pack(">BB4HII", 0, 1, 0, 0, 0, 0xFFFF, side, side) + bytes(8 * parts)

    def meta(offset: int) -> bytes:
        places = [struct.pack(">HHHHII", n, 0, 0, 1, offset, len(payload)) for n in range(1, shown)]
        places.append(struct.pack(">HHHHII", shown, 1, 0, 1, 0, len(layout)))
        return full(
            b"meta",
            0,
            0,
            full(b"hdlr", 0, 0, bytes(4) + b"pict" + bytes(13)),
            full(b"pitm", 0, 0, struct.pack(">H", shown)),
            full(b"iinf", 0, 0, struct.pack(">H", shown), *entries),
            references,
            box(b"iprp", *order),
            full(b"iloc", 1, 0, b"\x44\0" + struct.pack(">H", shown), *places),
            box(b"idat", layout),
        )

    kinds = box(b"ftyp", b"heic" + bytes(4) + b"mif1heic")
    return kinds + meta(len(kinds) + len(meta(0)) + 8) + box(b"mdat", payload)


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidInput) as refused:
        preprocess.decode(data)
    assert refused.value.reason is Reason.IMAGE_UNREADABLE
    return refused.value.message


def test_an_image_of_tiles_is_put_together() -> None:
    tile = np.asarray(preprocess.open_image(PLAIN))
    whole = np.asarray(preprocess.open_image(composed(b"grid", 4, side=2 * CODED)))
    assert whole.shape == (2 * CODED, 2 * CODED, 3)
    for top in (0, CODED):
        for left in (0, CODED):
            part = whole[top : top + 48, left : left + 64].astype(int)
            assert np.abs(part - tile).mean() < 2


@pytest.mark.parametrize("sizes_last", [False, True])
@pytest.mark.parametrize("kind", [b"grid", b"iovl"])
def test_many_huge_images_behind_a_small_one_are_refused_before_any_is_decoded(
    kind: bytes, sizes_last: bool
) -> None:
    data = composed(kind, 900, HUGE, sizes_last=sizes_last)
    assert f"{900 * HUGE**2 + CODED**2} pixels in all" in refusal(data)


def test_images_that_are_put_together_of_each_other_are_refused() -> None:
    assert "times over" in refusal(
        composed(b"grid", 2, links={(b"dimg", 3): [1], (b"dimg", 1): [3]})
    )


def test_what_an_image_is_said_to_be_put_together_of_hides_nothing_of_it() -> None:
    links = {(b"dimg", 6): [2, 3, 4, 5], **{(b"dimg", n): [1] for n in (2, 3, 4, 5)}}
    assert "pixels in all" in refusal(composed(b"iovl", 5, HUGE, links=links))


def test_transparency_counts() -> None:
    links = {(b"dimg", 3): [1], (b"auxl", 2): [3]}
    decoder_limits.check_heif(composed(b"grid", 2, 100, 10, links=links), 20_100)
    with pytest.raises(InvalidInput, match="20100 pixels"):
        decoder_limits.check_heif(composed(b"grid", 2, 100, 10, links=links), 20_099)


def test_two_directories_are_refused() -> None:
    data = composed(b"grid", 4, side=2 * CODED)
    assert "more than one directory" in refusal(data + full(b"meta", 0, 0))
    at = data.index(b"pitm") - 4
    doubled = bytearray(data[:at] + data[at : at + 14] + data[at:])
    start = data.index(b"meta") - 4
    (size,) = struct.unpack_from(">I", data, start)
    struct.pack_into(">I", doubled, start, size + 14)
    assert "more than one list" in refusal(bytes(doubled))


@pytest.mark.parametrize("part", [0.1, 0.3, 0.6, 0.9])
def test_what_is_cut_short_is_unreadable(part: float) -> None:
    data = composed(b"grid", 4, side=2 * CODED)
    assert refusal(data[: int(len(data) * part)])


def test_endless_boxes_are_refused() -> None:
    data = PLAIN[: PLAIN.index(b"meta") - 4] + box(b"free") * 20_000
    assert "10000 boxes" in refusal(data)


def test_limits_of_a_libheif_that_is_laid_out_otherwise_are_not_written() -> None:
    with pytest.raises(RuntimeError, match="pi-heif"):
        decoder_limits.limit_libraries(preprocess.MAX_PIXELS + 1)
    decoder_limits.limit_libraries(preprocess.MAX_PIXELS)
