"""What happens to a job, as it is kept and replayed."""

from typing import Literal

import msgspec

from service.contract import DataFound, EpochEnded, Note, Progressed
from service.domain import Figure, JobState, Verdict
from service.errors import Reason


class StateChanged(msgspec.Struct, frozen=True, tag="state"):
    """The job moved to another state; `reason` and `message` say why, where there is a why."""

    state: JobState
    reason: Reason | None = None
    message: str = ""


class Published(msgspec.Struct, frozen=True, tag="published"):
    """The job's version is there; one with gate failures is a candidate."""

    model: str
    version: int
    figure: Figure | None
    """The manifest's headline; None where nothing could be measured."""
    gate_failures: list[str] = []
    calibrated: bool = False
    gate: Literal[Verdict, "none"] = "none"
    """The worst verdict of its gate's conditions."""

    @property
    def is_candidate(self) -> bool:
        """Whether no alias points to it."""
        return bool(self.gate_failures)


Payload = StateChanged | Progressed | EpochEnded | DataFound | Note | Published

_decoder = msgspec.json.Decoder(Payload)


class JobEvent(msgspec.Struct, frozen=True):
    """One event; numbered from 1 within its job, without gaps."""

    sequence: int
    time_s: float
    payload: Payload

    @property
    def is_last(self) -> bool:
        """Whether none can follow."""
        return isinstance(self.payload, StateChanged) and self.payload.state.is_final


def encode(payload: Payload) -> str:
    """As the store keeps it."""
    return msgspec.json.encode(payload).decode()


def decode(text: str) -> Payload:
    """From what `encode` gave."""
    payload: Payload = _decoder.decode(text)
    return payload
