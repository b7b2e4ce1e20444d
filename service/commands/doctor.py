"""`graft-server doctor`: says what a server with these settings would compute with here."""

import argparse
import os

from service import settings
from service.commands import command


def add(commands: command.Commands) -> None:
    parser = command.add(
        commands,
        "doctor",
        "tell what a server with these settings computes with on this machine",
        execute,
        usage="graft-server doctor [flags of run]",
        more="Takes the settings of `graft-server run`. Works beside a server and without one, and "
        "writes nothing.",
        exit_codes="0 it can compute, 1 it cannot, 2 a wrong setting",
    )
    settings.add_flags(parser)


def execute(given: argparse.Namespace) -> int:
    """Prints the report; returns the exit code."""
    config = settings.load(vars(given), os.environ)
    from service import doctor

    lines, is_well = doctor.report(config)
    print("\n".join(lines))
    return command.EXIT_OK if is_well else command.EXIT_FAILED
