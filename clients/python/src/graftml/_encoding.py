"""Says which argument no message can hold, and what it must be instead.

Looks only after a message could not be made: it costs nothing where all is well.
"""

import dataclasses
import functools
import inspect
import types as python_types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import (
    Any,
    Final,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    is_typeddict,
)

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from graftml._files import shown
from graftml.errors import GraftError, InvalidArgument, invalid

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M", bound=Message)

_UNFIT: Final = (AttributeError, OverflowError, TypeError, ValueError)
"""The errors that protobuf raises for what a field cannot hold."""
_NUMBERS: Final[dict[Any, Any]] = {int: Integral, float: Real}
_WORDS: Final[dict[Any, str]] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
}


def message(kind: type[M], **fields: Any) -> M:
    """Makes a message; raises InvalidArgument that names the field that cannot hold its value."""
    try:
        return kind(**fields)
    except UnicodeEncodeError as error:
        raise _not_text(error, "") from error
    except _UNFIT as error:
        for name, value in fields.items():
            try:
                kind(**{name: value})
            except _UNFIT:
                wanted = _held(kind.DESCRIPTOR.fields_by_name[name])
                raise _unfit(name, value, wanted) from error
        raise invalid(f"an argument cannot be sent: {error}") from error


def _held(field: Any) -> str:
    """Says what a field takes."""
    entry = field.message_type if field.type == FieldDescriptor.TYPE_MESSAGE else None
    if entry is not None and entry.GetOptions().map_entry:
        key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
        return f"a dict of {_held(key)} to {_held(value)}"
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        one = _WORDS[str]
    elif field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        one = _WORDS[bool]
    elif field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        one = _WORDS[float]
    else:
        one = _WORDS[int]
    return f"a list, each {one}" if field.is_repeated else one


def encoding(build: Callable[P, T]) -> Callable[P, T]:
    """Makes a function that builds a message raise InvalidArgument for what none can hold."""

    @functools.wraps(build)
    def built(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return build(*args, **kwargs)
        except GraftError:
            raise
        except UnicodeEncodeError as error:
            raise _not_text(error, "") from error
        except _UNFIT as error:
            given = inspect.signature(build).bind(*args, **kwargs).arguments
            raise _wrong(given, build.__annotations__, error) from error

    return built


@contextmanager
def encodable(where: str) -> Iterator[None]:
    """Turns text that no message can hold into InvalidArgument."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise _not_text(error, where) from error


def _not_text(error: UnicodeEncodeError, where: str) -> InvalidArgument:
    text = str(error.object)
    bad = text[error.start : error.start + 1].encode("unicode_escape").decode()
    at = f"{where}: " if where else ""
    return invalid(
        f"{at}the text {shown(text)} cannot be sent: {bad} at {error.start} is half of a "
        "character, as names of files have that are not UTF-8: put something else in its place, "
        "as text.encode('utf-8', 'replace').decode() does",
        where,
    )


def _wrong(given: Mapping[str, Any], hints: Mapping[str, Any], error: Exception) -> InvalidArgument:
    found = next(_misfits(given, hints, ""), None)
    if found is None:
        return invalid(f"an argument cannot be sent: {error}")
    name, value, hint = found
    return _unfit(name, value, _described(hint))


def _unfit(name: str, value: object, wanted: str) -> InvalidArgument:
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return invalid(f"{name} is {text}: it must be {wanted}", name)


def _misfits(
    given: Mapping[str, Any], hints: Mapping[str, Any], above: str
) -> Iterator[tuple[str, Any, Any]]:
    """Yields the name, the value and the hint of what does not fit; fields of a value too."""
    for name, value in given.items():
        hint = hints.get(name)
        if is_typeddict(hint) and isinstance(value, Mapping):
            yield from _misfits(value, hint.__annotations__, above)
        elif not _fits(value, hint):
            yield above + name, value, hint
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _misfits(vars(value), type(value).__annotations__, f"{above}{name}.")


def _fits(value: Any, hint: Any) -> bool:
    """Tells whether a value is what a hint asks for; what it cannot tell fits."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, python_types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is dict:
        return isinstance(value, Mapping) and all(
            _fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items()
        )
    if isinstance(origin, type) and issubclass(origin, Iterable):
        is_many = isinstance(value, Iterable)
        return is_many and (
            not isinstance(value, list | tuple) or all(_fits(item, inner[0]) for item in value)
        )
    if hint in _NUMBERS:
        return isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool)
    return not isinstance(hint, type) or is_typeddict(hint) or isinstance(value, hint)


def _described(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, python_types.UnionType):
        return ", or ".join(_described(one) for one in inner if one is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is dict:
        return f"a dict of {_described(inner[0])} to {_described(inner[1])}"
    if inner:
        return f"a list, each {_described(inner[0])}"
    name = str(hint.__name__)
    return _WORDS.get(hint) or f"{'an' if name[0] in 'AEIO' else 'a'} {name}"
