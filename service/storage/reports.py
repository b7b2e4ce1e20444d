"""Fills in reports what was not known when training wrote them.

A version has its number from the transaction that publishes it, after its files were
named by their content, and a candidate may be promoted later; so both are filled in
whenever a report is read, and the files stay what was published.
"""

import html

import msgspec

from service.contract import REPORT_STANDING_MARK, REPORT_VERSION_MARK
from service.errors import Damaged, Reason


def filled_json(
    content: bytes, version: int, is_candidate: bool, gate_failures: list[str]
) -> bytes:
    """Sets `version`, `is_candidate` and `gate_failures` of a report.json.

    Raises Damaged (MODEL_UNLOADABLE) where it is no JSON object.
    """
    try:
        report = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged() from error
    filled = {"version": version, "is_candidate": is_candidate, "gate_failures": gate_failures}
    return msgspec.json.format(msgspec.json.encode({**report, **filled}))


def filled_html(
    content: bytes, version: int, is_candidate: bool, gate_failures: list[str]
) -> bytes:
    """Writes the number and how the version stands into the title and the header of a page.

    Raises Damaged (MODEL_UNLOADABLE) where it is no UTF-8.
    """
    kind = " (candidate)" if is_candidate else ""
    try:
        page = content.decode()
    except UnicodeDecodeError as error:
        raise _damaged() from error
    # The first is the head's: every name in the page is escaped.
    page = page.replace("</title>", f", version {version}{kind}</title>", 1)
    page = page.replace(REPORT_VERSION_MARK, f" version {version}{kind}", 1)
    return page.replace(REPORT_STANDING_MARK, _standing(is_candidate, gate_failures), 1).encode()


def _damaged() -> Damaged:
    return Damaged(
        Reason.MODEL_UNLOADABLE, "the version's report cannot be read: publish the version again"
    )


def _standing(is_candidate: bool, gate_failures: list[str]) -> str:
    if not gate_failures and not is_candidate:
        return ""
    why = html.escape("; ".join(gate_failures))
    told = (
        "This version is a candidate: it did not pass its gate, and no alias moved to it."
        if is_candidate
        else "This version did not pass its gate and was published by hand."
    )
    return f'<p class="warning-text">{told} {why}{"." if why else ""}</p>'
