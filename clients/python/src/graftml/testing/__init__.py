"""A Graft server in your own process, for tests of what uses the client.

It is real gRPC on a free port of localhost, with everything in memory: models
are what you add, predictions are what your function says, jobs play the events
you script, gates fail where you say so. Nothing is trained. It ends with `stop` or its `with`.

    with FakeGraft() as server, graftml.Client(server.target) as client:
        server.add_model("pets", classes=["cat", "dog"])
        ...
"""

from graftml.testing._prediction import Answer, Predict, SentImage
from graftml.testing._script import (
    DEFAULT_SCRIPT,
    cancelled,
    data,
    epoch,
    failed,
    note,
    progress,
    published,
    requeued,
    running,
    succeeded,
)
from graftml.testing._server import FakeGraft, Recorded

__all__ = [
    "DEFAULT_SCRIPT",
    "Answer",
    "FakeGraft",
    "Predict",
    "Recorded",
    "SentImage",
    "cancelled",
    "data",
    "epoch",
    "failed",
    "note",
    "progress",
    "published",
    "requeued",
    "running",
    "succeeded",
]
