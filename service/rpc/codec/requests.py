"""Requests of FineTune and RankBackbones in the words of jobs.

Message and struct name a field alike, but for durations, whose structs have the unit in
the name. So whatever both know is read by its name, and a new field needs no line here.
"""

from typing import Any, TypeVar

import msgspec
from google.protobuf.message import Message
from graftml_stubs.v1 import fine_tuning_pb2 as pb

from service.contract import (
    Augmentation,
    Auto,
    DomainAdaptation,
    FeatureBased,
    Gate,
    Grouping,
    Method,
    ModelBased,
    PretrainedBackbone,
)
from service.domain import LATEST
from service.errors import InvalidInput, Reason, bad_field
from service.ingest.labels import canonical
from service.jobs.request import JobRequest, RankRequest
from service.rpc.codec import decisions

_METHODS: dict[str | None, type[Method]] = {
    None: Auto,
    "auto": Auto,
    "feature_based": FeatureBased,
    "model_based": ModelBased,
    "domain_adaptation": DomainAdaptation,
}
_MAX_BYTES = 4 * 2**20
_UNITS = {"s": 1e6, "ms": 1e3}
"""Microseconds in the units that a duration's field may have."""

T = TypeVar("T", bound=msgspec.Struct)


def check_size(message: pb.FineTuneRequest | pb.RankBackbonesRequest) -> None:
    """Raises InvalidInput for a request that is too large to be stored, without its images."""
    images = message.inline_images.ByteSize()
    if isinstance(message, pb.FineTuneRequest):
        images += message.domain_adaptation.target_images.ByteSize()
    count = message.ByteSize() - images
    if count > _MAX_BYTES:
        raise InvalidInput(
            Reason.INVALID_FIELD,
            f"the request has {count} bytes without its images, more than the "
            f"{_MAX_BYTES // 2**20} MiB that are stored of one: shorten its texts and lists",
        )


def job(message: pb.FineTuneRequest, tenant: str, **places: str) -> JobRequest:
    """Reads a tenant's request, but for its base; `places` are the fields on where images lie.

    Raises InvalidInput for what has no meaning: numbers without a name, labels that are none.
    """
    name = message.WhichOneof("method")
    given = _given(message, JobRequest) | {"tenant": tenant, **places}
    if message.HasField("decision"):
        given["decision"] = decisions.read(message.decision)
    return JobRequest(
        **given,
        method=_read(getattr(message, name), _METHODS[name], f"{name}.") if name else Auto(),
        grouping=_read(message.grouping, Grouping) if message.HasField("grouping") else None,
        augmentation=(
            _read(message.augmentation, Augmentation) if message.HasField("augmentation") else None
        ),
        gate=_gate(message.gate) if message.HasField("gate") else None,
    )


def ranking(message: pb.RankBackbonesRequest, tenant: str, **places: str) -> RankRequest:
    """Reads a request to rank backbones; see `job`."""
    given = _given(message, RankRequest) | {"tenant": tenant, **places}
    return RankRequest(
        **given, backbones=[_read(each, PretrainedBackbone) for each in message.backbones]
    )


def _gate(message: pb.Gate) -> Gate:
    if message.HasField("max_regression") and not message.not_worse_than:
        raise bad_field(
            "gate.max_regression",
            "max_regression is set, and no version to compare with: set not_worse_than to an "
            f"alias, such as {LATEST}, or leave it out",
        )
    gate = _read(message, Gate, "gate.")
    recalls = {canonical(label): least for label, least in gate.class_recalls.items()}
    return msgspec.structs.replace(gate, class_recalls=recalls)


def _read(message: Message, kind: type[T], at: str = "") -> T:
    return kind(**_given(message, kind, at))


def _given(message: Message, kind: type[msgspec.Struct], at: str = "") -> dict[str, Any]:
    """Reads the values that a struct has fields for; `at` goes before names in errors.

    A field that is not set is left out, so that the struct's default holds. So are messages
    within, but durations.
    """
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        name = field.name
        if field.has_presence and not message.HasField(name):
            continue
        value = getattr(message, name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value = dict(value)
        elif field.message_type is not None:
            unit = next((u for u in _UNITS if f"{name}_{u}" in kind.__struct_fields__), None)
            if unit is None:
                continue
            name, value = f"{name}_{unit}", value.ToMicroseconds() / _UNITS[unit]
        elif field.enum_type is not None and field.is_repeated:
            value = [_named(field.enum_type, number, at + name) for number in value]
        elif field.enum_type is not None:
            if value == 0:  # UNSPECIFIED
                continue
            value = _named(field.enum_type, value, at + name)
        if name in kind.__struct_fields__:
            found[name] = value
    return found


def _named(enum: Any, number: int, field: str) -> str:
    """Returns the name of an enum's number without its prefix, in lower case."""
    names = enum.values_by_number
    if number == 0 or number not in names:
        raise bad_field(field, f"{field} {number} is none: use a value of {enum.name}")
    prefix = names[0].name.removesuffix("UNSPECIFIED")
    return str(names[number].name).removeprefix(prefix).lower()
