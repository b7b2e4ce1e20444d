"""How the command line names a version: MODEL, MODEL@ALIAS or MODEL:VERSION."""

from typing import TypedDict

from graft.cli._output import Usage

HELP = "MODEL, MODEL@ALIAS or MODEL:VERSION; alone it means the newest version"


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


def version(text: str) -> int:
    """The number of a version."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise Usage(f"{text!r} is no version: versions are numbers from 1")
    return int(text)
