"""How the command line names things.

A version: MODEL, MODEL@ALIAS or MODEL:VERSION. Images: a path, a dataset's id, server:PATH.
"""

from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from graftml.cli._image_files import SUFFIXES
from graftml.cli._output import Usage
from graftml.errors import NotFound, Reason
from graftml.types import BaseVersion, ServerPath

HELP = "MODEL, MODEL@ALIAS or MODEL:VERSION; MODEL alone means the newest version"


_DATABASE = "graft.sqlite3"
"""The file by which a server's data folder is known."""


class Which(TypedDict):
    """As the client's methods take it."""

    version: int | None
    alias: str | None


def parse(text: str) -> tuple[str, Which]:
    """The model's name and which of its versions."""
    if "@" in text:
        model, _, alias = text.partition("@")
        if not alias:
            raise Usage(f"{text!r} names no alias: write MODEL@ALIAS")
        return model, {"version": None, "alias": alias}
    model, colon, number = text.partition(":")
    if not colon:
        return model, {"version": None, "alias": None}
    return model, {"version": version(number), "alias": None}


def base(text: str) -> BaseVersion:
    """The version to go on from: VERSION or ALIAS, of another model with MODEL: before it.

    Or MODEL@ALIAS, as everywhere else.
    """
    if "@" in text:
        name, chosen = parse(text)
        return BaseVersion(alias=chosen["alias"], model=name)
    model, _, which = text.rpartition(":")
    if not which:
        raise Usage(
            f"{text!r} names no version: write VERSION, ALIAS, MODEL:VERSION or MODEL@ALIAS"
        )
    if which.isdigit():
        return BaseVersion(version=version(which), model=model)
    return BaseVersion(alias=which, model=model)


def data(text: str) -> str | ServerPath:
    """Images: a path here or a dataset's id, as it is; server:PATH for what lies there."""
    return ServerPath(text.removeprefix("server:")) if text.startswith("server:") else text


def label(text: str) -> tuple[str, str]:
    """A label: KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def fraction(text: str) -> float:
    """A number from 0 to 1; raises ValueError for what is no number."""
    value = float(text)
    # Written so that NaN fails, too.
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def labelled(text: str) -> str | ServerPath:
    """Images with classes: as `data`; raises Usage for a folder here that cannot be such images."""
    found, folder = data(text), Path(text)
    if not (isinstance(found, str) and folder.is_dir()):
        return found
    folders = [path for path in folder.iterdir() if path.is_dir()]
    wanted = "name the folder that has a folder of images for each class"
    if not folders:
        raise Usage(f"{text} has no folders in it: {wanted}")
    for stored in (folder, *folders):
        if (stored / _DATABASE).exists():
            likely = [str(path) for path in folders if _has_classes(path)]
            hint = f"; did you mean {likely[0]}?" if len(likely) == 1 else ""
            raise Usage(f"{stored} is the data folder of a server: {wanted}{hint}")
    return found


def _has_classes(folder: Path) -> bool:
    return any(path.suffix.lower() in SUFFIXES for path in folder.glob("*/*"))


@contextmanager
def folders_here(*texts: str | None) -> Iterator[None]:
    """Makes an error about an unknown dataset name the folder here that may have been meant."""
    try:
        yield
    except NotFound as error:
        for text in texts:
            is_id = text is not None and text.startswith("ds-") and "/" not in text
            if error.reason == Reason.DATASET_NOT_FOUND and is_id and Path(str(text)).exists():
                message = f"{error.message}; for what lies here, write ./{text}"
                raise NotFound(message, reason=error.reason, code=error.code) from error
        raise


def version(text: str) -> int:
    """The number of a version."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise Usage(f"{text!r} is not a version: versions are numbers from 1")
    return int(text)
