"""Runs `graft-server` and `python -m service`: configuration, logging, signals, exit codes.

`graft-server doctor`, with the same settings, says what the server would compute with.

The first SIGTERM or SIGINT drains: new calls are refused, accepted ones end, trainers
stop and their jobs are queued again. The second one exits at once.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

from service import config as configuration
from service import doctor, scratch
from service.app import App
from service.config import BadConfig, Config
from service.errors import GraftError
from service.ops import child, failpoints
from service.ops.logs import set_up_logging

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_CONFIG = 2
_DOCTOR = "doctor"

log = logging.getLogger("service")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the service, or its doctor; returns the exit code."""
    try:
        given = sys.argv[1:] if arguments is None else arguments
        if is_doctor := given[:1] == [_DOCTOR]:
            given = given[1:]
        config = configuration.load(given, os.environ)
        _arm(config.failpoints)
    except BadConfig as error:
        print(f"graft-server: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    if is_doctor:
        lines, is_well = doctor.report(config)
        print("\n".join(lines))
        return EXIT_OK if is_well else EXIT_FAILED
    # The stored data is customers': no other user of the machine may read it.
    os.umask(0o077)
    set_up_logging(config.log_format, config.log_level)
    if config.failpoints:
        log.warning("failpoints are armed, for tests alone: %s", config.failpoints)
    try:
        return asyncio.run(_run(config))
    except BadConfig as error:
        print(f"graft-server: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    except (GraftError, OSError, RuntimeError) as error:
        log.critical("cannot serve: %s", error, exc_info=log.isEnabledFor(logging.DEBUG))
        return EXIT_FAILED


def _arm(plan: str) -> None:
    try:
        failpoints.arm(plan)
    except ValueError as error:
        raise BadConfig(f"--failpoints: {error}") from None


async def _run(config: Config) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, number, stop)
    # A flag wins over the variable, for trainers too.
    environment = {
        **os.environ,
        failpoints.VARIABLE: config.failpoints,
        child.FURTHER_VARIABLE: config.pass_environment,
    }
    # Trainers get the environment as it was before, and have folders of their own.
    scratch.use(config.data_dir, environment)
    async with App(config, environment) as app:
        stopped = asyncio.create_task(stop.wait())
        failed = asyncio.create_task(app.wait_failed())
        await asyncio.wait({stopped, failed}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if failed.done() and not stop.is_set():
            log.critical("a part of the service died; stopping", exc_info=failed.exception())
            return EXIT_FAILED
        failed.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await failed
    return EXIT_OK


def _on_signal(number: signal.Signals, stop: asyncio.Event) -> None:
    if stop.is_set():
        log.warning("got %s again: exiting at once", number.name)
        # Trainers end when their standard input closes.
        os._exit(EXIT_FAILED)
    log.info("got %s: draining", number.name)
    stop.set()


if __name__ == "__main__":
    sys.exit(main())
