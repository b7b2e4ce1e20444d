"""`graft health`."""

import argparse
from typing import Any

from graftml import Client
from graftml._channel import PROBE_TIMEOUT_S
from graftml.cli._output import Code, Output
from graftml.errors import DeadlineExceeded


def add(commands: Any) -> None:
    """The command and its options."""
    health = commands.add("health", "Tell whether the server is serving", run)
    health.add_argument("--wait", type=float, metavar="S", help="wait up to S seconds for it")


def run(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Says whether the server serves, and why not."""
    why: str | None = None
    try:
        if arguments.wait is not None:
            client.wait_ready(arguments.wait)
    except DeadlineExceeded as error:
        why = error.message
    else:
        why = client.why_not_serving(min(arguments.timeout, PROBE_TIMEOUT_S))
    if output.is_json:
        output.emit({"server": arguments.server, "serving": why is None, "why": why or ""})
    elif why is None:
        output.line(f"{arguments.server} serves")
    return Code.OK if why is None else output.complain(why, Code.NOT_SERVING)
