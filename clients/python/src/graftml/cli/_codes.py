"""The exit codes of the `graft` command."""

from enum import IntEnum


class Code(IntEnum):
    """The exit codes; documented in the client's README and in `graft --help`."""

    OK = 0
    REFUSED = 1
    """The service refused, or could not be reached; or an image could not be read."""
    USAGE = 2
    """Wrong usage, or a local file that is not there."""
    JOB_FAILED = 3
    """A job failed or was cancelled."""
    GATE_REFUSED = 4
    """A job made a version that did not pass its gate: a candidate, and no alias moved."""
    NOT_SERVING = 5
    """`graft health`: the server does not serve, or cannot be reached."""
    INTERRUPTED = 130
