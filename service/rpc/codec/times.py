"""Times and durations as messages."""

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

_LONGEST_S = 315_576_000_000
"""The longest Duration, 10 000 years, as duration.proto has it."""


def timestamp(seconds: float | None) -> Timestamp | None:
    """Converts seconds since 1970, UTC; None stays None."""
    if seconds is None:
        return None
    stamp = Timestamp()
    # Microseconds, since a float holds no more.
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp


def duration(seconds: float) -> Duration:
    """Converts seconds; longer ones than a Duration holds become the longest."""
    span = Duration()
    span.FromMicroseconds(round(max(-_LONGEST_S, min(seconds, _LONGEST_S)) * 1e6))
    return span
