"""Class names: the form in which they are kept, and those that people take for one."""

import unicodedata
from collections.abc import Iterable

from service.errors import InvalidInput, Reason, unusable_dataset
from service.ingest.names import is_text, label_problem, shown

UNLABELLED = "unlabelled"
"""The folder of a target domain's images whose class is not known."""


def check_given(label: str, *, is_labelled: bool) -> None:
    """Checks a class name that came with an image; empty is one for a set without labels.

    Raises InvalidInput (INVALID_FIELD) for one that cannot be a class name.
    """
    label = canonical(label)
    if (label or is_labelled) and (problem := label_problem(label)):
        raise InvalidInput(Reason.INVALID_FIELD, problem)


def check_alike(labels: Iterable[tuple[str, str]], *, case_sensitive: bool) -> None:
    """Raises InvalidInput (DATASET_UNUSABLE) for class names that people take for one.

    Each comes as it was written, with its folder or "", for the message.
    """
    by_look: dict[str, tuple[str, str]] = {}
    by_case: dict[str, tuple[str, str]] = {}
    for raw, where in labels:
        look = _look(raw)
        known, at = by_look.setdefault(look, (raw, where))
        if known != raw:
            raise unusable_dataset(
                f"the class names {shown(known)} and {shown(raw)} look the same{_places(at, where)}"
                ": give both classes one name, or two that differ"
            )
        known, at = by_case.setdefault(look.casefold(), (raw, where))
        if not case_sensitive and _look(known) != look:
            raise unusable_dataset(
                f"the class names {shown(known)} and {shown(raw)} differ in upper and lower case "
                f"alone{_places(at, where)}: give both classes one name, or set "
                "case_sensitive_labels if they are two"
            )


def canonical(label: str) -> str:
    """Returns a class name as it is kept: in NFC, without blanks around it."""
    return unicodedata.normalize("NFC", label).strip()


def _look(label: str) -> str:
    # Format characters show nothing: joiners, byte order marks, soft hyphens.
    kept = (char for char in canonical(label) if unicodedata.category(char) != "Cf")
    return " ".join("".join(kept).split())


def _places(*places: str) -> str:
    named = [shown(place) for place in places if "/" in place]
    return f" ({' and '.join(named)})" if named else ""


def loose_label(name: str) -> str:
    """Returns the class that a name may be one of, without labels; empty where it cannot be."""
    label = canonical(name) if is_text(name) else ""
    is_one = label.casefold() != UNLABELLED and not label_problem(label)
    return label if is_one else ""
