"""The entry point of the `graft` command.

A package of its own, since gRPC reads how much it shall log when it is imported,
which `import graftml` does.
"""

import os


def main() -> int:
    """Runs the command; returns its exit code. See `graftml.cli`."""
    # What goes wrong is said by the command itself. Who wants gRPC's log sets the variable.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from graftml import cli  # noqa: PLC0415 - after the line above

    return cli.main()
