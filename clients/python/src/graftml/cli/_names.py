"""How the command line names things.

A version: MODEL, MODEL@ALIAS or MODEL:VERSION. Images: a path, a dataset's id, server:PATH.
"""

from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from graftml.cli._output import Usage
from graftml.errors import NotFound, Reason
from graftml.types import BaseVersion, ServerPath

HELP = "MODEL, MODEL@ALIAS or MODEL:VERSION; MODEL alone means the newest version"


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


def labelled(text: str) -> str | ServerPath:
    """Images with classes: as `data`; raises Usage for a folder here that has no folders."""
    found, folder = data(text), Path(text)
    if isinstance(found, str) and folder.is_dir() and not any(map(Path.is_dir, folder.iterdir())):
        raise Usage(
            f"{text} has no folders in it: name the folder that has a folder of images for each "
            "class"
        )
    return found


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
