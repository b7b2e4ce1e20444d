"""What a trainer writes: records to events to messages; manifests to versions."""

import copy
import json
from functools import cache
from typing import Any

import msgspec

from service import contract
from service.contract import (
    BackbonesRanked,
    DataFound,
    EpochEnded,
    Failed,
    Finished,
    Note,
    Progressed,
    RankedBackbone,
)
from service.domain import (
    ClassCount,
    GateCheck,
    JobState,
    LeftOut,
    LeftOutFile,
    LeftOutReason,
    Manifest,
    Parity,
    ReadSummary,
)
from service.errors import Reason
from service.jobs import records
from service.jobs.records import JobEvent, Published, StateChanged
from service.rpc.codec import jobs
from tests.figures import figure
from tests.fuzz.messages import Choices
from tests.fuzz.promise import Target

_MANIFEST = b"M"
"""Begins an input that is a manifest."""


_SPOILT = b"S"
"""Begins an input that says which seed is taken, and which of its values become which others."""
_VALUES: tuple[object, ...] = (
    None, True, 0, -1, 0.5, 1e308, -1e308, 5e-324, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**30,
    "", "x" * 5000, "\ud800", "\0", "\u202e", "info", [], {}, [[[]]], ["x"] * 300,
    {"label": "x", "train": 2**31, "validation": 0}, {"path": "\ud800", "detail": 1},
    {"reason": "copy", "label": "x", "count": 2**31}, "contradiction",
)  # fmt: skip


def run(data: bytes) -> None:
    """A line that is not a record is told so; a record can be kept, replayed and shown."""
    if data.startswith(_SPOILT):
        data = _spoilt(Choices(data[1:]))
    if data.startswith(_MANIFEST):
        try:
            manifest = contract.decode_manifest(data[1:])
        except msgspec.DecodeError:
            return
        msgspec.json.encode(manifest).decode()
        return
    try:
        record = contract.decode_record(data)
    except msgspec.DecodeError:
        return
    payload: records.Payload
    match record:
        case Failed():
            payload = StateChanged(JobState.FAILED, record.reason, record.message)
        case Finished():
            payload = Published("m", 1, None if record.accuracy is None else figure())
        case BackbonesRanked():
            jobs._ranking(record).SerializeToString()
            return
        case Progressed() | DataFound() | EpochEnded() | Note():
            payload = record
        case _:
            return
    kept = records.decode(records.encode(payload))
    jobs.event(JobEvent(1, 1.7e9, kept)).SerializeToString()


def _spoilt(choices: Choices) -> bytes:
    valid = _valid()
    line = valid[choices.below(len(valid))]
    prefix, line = (line[:1], line[1:]) if line.startswith(_MANIFEST) else (b"", line)
    fields = json.loads(line)
    for _ in range(1 + choices.below(3)):
        _spoil(fields, choices)
    return prefix + json.dumps(fields).replace("1e+308", "1e999").encode()


def _spoil(at: Any, choices: Choices) -> None:
    keys = list(at) if isinstance(at, dict) else list(range(len(at)))
    if not keys:
        return
    key = keys[choices.below(len(keys))]
    if isinstance(at[key], dict | list) and at[key] and choices.below(4):
        _spoil(at[key], choices)
    else:
        at[key] = copy.deepcopy(_VALUES[choices.below(len(_VALUES))])


def seeds() -> list[bytes]:
    """A record of every kind, and a manifest; whole, and spoilt."""
    valid = _valid()
    epoch = next(line for line in valid if b'"epoch"' in line)
    return [
        *valid,
        *(_SPOILT + bytes([number, 1, *range(7)]) for number in range(len(valid))),
        b'{"type":"heartbeat","x":' + b"[" * 3000 + b"]" * 3000 + b"}",
        epoch.replace(b'"epoch":1', b'"epoch":99999999999999999999'),
        epoch.replace(b"60.0", b"1e300"),
        b'{"type":"note","level":"info","text":"\\ud800"}',
    ]


@cache
def _valid() -> list[bytes]:
    epoch = EpochEnded(
        epoch=1,
        epochs=3,
        train_loss=0.5,
        train_accuracy=0.5,
        validation_loss=0.5,
        validation_accuracy=0.5,
        images_per_second=9.5,
        eta_s=60.0,
        learning_rate=0.01,
    )
    manifest = Manifest(
        model="m",
        job_id="j",
        method="feature_based",
        backbone="resnet18",
        weights="w",
        backbone_digest="d" * 64,
        feature_dim=3,
        classes=["cat", "dog"],
        temperature=1.0,
        train_count=6,
        train_groups=5,
        figures=[figure(), figure(0.5, 2, "test")],
        calibrated=False,
        calibration_note="too few images",
        gate_checks=[
            GateCheck(
                name="not_worse",
                verdict="undecided",
                passed=False,
                value=-0.05,
                bound=-0.03,
                detail="it cannot be told",
                images_needed=400,
            )
        ],
        dataset_digest="d" * 64,
        reading=ReadSummary(3, 3),
        seed=1,
        hyperparameters={"l2": 0.5},
        preprocess={"crop": 224},
        parity=Parity(0.0, 1.0, 3),
        opset=17,
        device="cpu",
        precision="fp32",
        provider="cpu",
        versions={"python": "3"},
        started_at="2026-01-01T00:00:00+00:00",
        duration_s=0.1,
    )
    ranked = RankedBackbone(backbone="resnet18", weights="w", log_loss=0.5, image_ms=2.5)
    summary = ReadSummary(
        seen=4,
        used=3,
        left_out=[LeftOut(LeftOutReason.COPY, "cat", 1)],
        files=[LeftOutFile("cat/a.png", "cat", LeftOutReason.COPY, "why")],
    )
    records: list[contract.Record] = [
        Progressed("features", 0.5, "all"),
        DataFound([ClassCount("cat", 2, 1)], summary, "d" * 64),
        epoch,
        Note("warning", "caf\u00e9"),
        contract.Heartbeat(),
        Failed(Reason.DATASET_UNUSABLE, "no images"),
        Finished(0.9, 10),
        BackbonesRanked([ranked], "the best", 10),
    ]
    return [
        *(contract.encode(record) for record in records),
        _MANIFEST + contract.encode(manifest),
    ]


TARGET = Target("records", run, seeds, modules=("service", "tests.fuzz.messages"), max_bytes=8192)
