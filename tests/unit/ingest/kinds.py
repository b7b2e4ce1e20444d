"""Kinds of files, folders and labels that people send, each laid into a folder of two classes."""

import io
import os
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

Pairs = list[tuple[str, bytes]]
Lay = Callable[[Path], None]


@dataclass(frozen=True)
class Kind:
    """One kind: a name for the document, how it is laid, and the same as pairs where it can be."""

    name: str
    lay: Lay
    pairs: Callable[[], Pairs] | None = None
    replaces: bool = False
    """The folder holds nothing else."""


def pixels(seed: int, side: int = 24) -> Image.Image:
    """Makes an image that no other seed makes."""
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    )


def encoded(seed: int, form: str = "PNG") -> bytes:
    """Encodes an image of a seed."""
    out = io.BytesIO()
    pixels(seed).save(out, form)
    return out.getvalue()


def fill(folder: Path, first: int, count: int = 3) -> None:
    """Writes PNG files into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + count):
        (folder / f"{seed:03}.png").write_bytes(encoded(seed))


def base_pairs() -> Pairs:
    """Two classes of three images, as `base` lays them."""
    return [("ants", encoded(seed)) for seed in range(3)] + [
        ("bees", encoded(seed)) for seed in range(10, 13)
    ]


def base(root: Path) -> None:
    """Lays two classes of three images."""
    fill(root / "ants", 0)
    fill(root / "bees", 10)


def _file(name: str, content: bytes, text: str) -> Kind:
    def lay(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    label, _, file = name.partition("/")
    is_in_class = bool(file) and "/" not in file and not file.startswith(".")
    return Kind(text, lay, (lambda: [(label, content)]) if is_in_class else None)


def _folder(name: str, text: str) -> Kind:
    return Kind(text, lambda root: fill(root / name, 50))


def _label(name: str, text: str) -> Kind:
    return Kind(
        text,
        lambda root: fill(root / name, 50),
        lambda: [(name, encoded(seed)) for seed in range(50, 53)],
    )


def _parts(*names: str, text: str) -> Kind:
    def lay(root: Path) -> None:
        for number, name in enumerate(names):
            fill(root / name / "ants", 100 * number)
            fill(root / name / "bees", 100 * number + 50)

    return Kind(text, lay, replaces=True)


def _link(root: Path) -> None:
    (root / "ants" / "link.png").symlink_to("000.png")


def _class_link(root: Path) -> None:
    (root / "wasps").symlink_to("ants")


def _pipe(root: Path) -> None:
    os.mkfifo(root / "ants" / "pipe.png")


def _wrapped(root: Path) -> None:
    fill(root / "insects" / "ants", 0)
    fill(root / "insects" / "bees", 10)
    (root / "LICENSE.txt").write_text("CC-BY 4.0")


def _deep(root: Path) -> None:
    fill(root / "ants" / "june" / "red", 50)


def _two_levels(root: Path) -> None:
    fill(root / "animals" / "dog", 0)
    fill(root / "things" / "house", 10)


def _bad(count: int) -> Callable[[Path], None]:
    def lay(root: Path) -> None:
        for number in range(count):
            (root / "ants" / f"bad-{number}.png").write_bytes(
                b"\x89PNG\r\n\x1a\n" + bytes([number])
            )

    return lay


def _bad_pairs(count: int) -> Callable[[], Pairs]:
    return lambda: [("ants", b"\x89PNG\r\n\x1a\n" + bytes([n])) for n in range(count)]


_HEIC = Path(__file__).parents[2] / "heic" / "plain.heic"


def _formats() -> Pairs:
    forms = ("JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
    encoded_ones = [encoded(70 + number, form) for number, form in enumerate(forms)]
    return [("ants", content) for content in (*encoded_ones, _HEIC.read_bytes())]


def _lay_formats(root: Path) -> None:
    for number, (label, content) in enumerate(_formats()):
        (root / label / f"form-{number}.jpg").write_bytes(content)


HTML = b"<!DOCTYPE html><html><body>Not found</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"

KINDS = [
    Kind("PNG files", lambda root: None, list),
    Kind(
        "a JPEG, WebP, BMP, GIF, TIFF, AVIF and HEIC file, all named .jpg", _lay_formats, _formats
    ),
    _file("ants/cut.png", encoded(60)[:200], "an image that is cut short"),
    _file("ants/empty.png", b"", "an empty file"),
    _file("ants/page.jpg", HTML, "a web page named .jpg"),
    _file("ants/pointer.png", LFS, "a pointer of git-lfs"),
    _file("ants/paper.pdf", b"%PDF-1.7\n" + bytes(50), "a PDF, a video, a camera's raw file"),
    _file("ants/notes.txt", b"red ones\n", "a text file in a class"),
    Kind("5 bad files of 11", _bad(5), _bad_pairs(5)),
    Kind(
        "a class of bad files alone",
        lambda root: _file("wasps/a.png", b"no", "").lay(root),
        lambda: [("wasps", b"no")],
    ),
    _file("ants/copy.png", encoded(0), "the same image twice in a class"),
    _file("bees/copy.png", encoded(0), "the same image in two classes"),
    _file("README.md", b"# Insects\n", "a text file beside the classes"),
    _file("loose.png", encoded(61), "an image beside the classes"),
    _file("ants/.hidden.png", encoded(62), "a hidden file"),
    _folder(".git", "a hidden folder"),
    _file("ants/Thumbs.db", b"\xd0\xcf", "Thumbs.db, desktop.ini and their like"),
    _folder("ants/@eaDir", "@eaDir, $RECYCLE.BIN and their like, in a class or beside them"),
    Kind("a link to a file", _link),
    Kind("a link in the place of a class", _class_link),
    Kind("a pipe, a socket or a device", _pipe),
    Kind("folders below a class", _deep),
    Kind("two levels of folders, all named", _two_levels, replaces=True),
    Kind("a folder around it all, with a file beside it", _wrapped, replaces=True),
    Kind("an empty folder beside the classes", lambda root: (root / "wasps").mkdir()),
    Kind("one class alone", lambda root: fill(root / "ants", 0), replaces=True),
    _parts("train", "val", text="train/ and val/ with classes in each"),
    _parts("Training", "Validation", "TEST", text="Training/, Validation/ and TEST/"),
    _parts("train", "test", text="train/ and test/, without val/"),
    _label("train", "a class called train"),
    _label("ants ", "two class names that differ in blanks"),
    Kind(
        "two class names that differ in how an accent is written",
        lambda root: (
            [
                fill(root / unicodedata.normalize(form, "café"), 50 + 10 * n)
                for n, form in enumerate(("NFC", "NFD"))
            ]
            and None
        ),
        lambda: [
            (unicodedata.normalize(form, "café"), encoded(50 + n))
            for n, form in enumerate(("NFC", "NFD"))
        ],
    ),
    _label("an\u200bts", "two class names that differ in invisible characters"),
    _label("Ants", "two class names that differ in upper and lower case"),
    _label("wasps\x07", "a control character in a class name"),
    _label("w" * 129, "a class name of more than 128 characters"),
]
