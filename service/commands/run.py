"""`graft-server run`: logging, signals, the app from its start to its end.

The first SIGTERM or SIGINT drains: new calls are refused, accepted ones end, trainers
stop and their jobs are queued again. The second one exits at once.
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import time
from dataclasses import dataclass
from importlib import metadata

from service import scratch, settings
from service.commands import command
from service.config import BadConfig, Config
from service.errors import GraftError
from service.ops import child, failpoints
from service.ops.logs import set_up_logging

log = logging.getLogger("service")


def add(commands: command.Commands) -> None:
    parser = command.add(
        commands,
        "run",
        "serve models, and fine-tune new ones on request",
        execute,
        usage="graft-server run [flags]",
        more=f"{settings.PRECEDENCE} `graft-server doctor`, with the same settings, tells what "
        "they come to on this machine: processor, providers, and what was measured of backbones.",
        exit_codes="0 ended by SIGTERM or SIGINT, 1 cannot serve or failed, 2 a wrong setting",
    )
    settings.add_flags(parser)


def execute(given: argparse.Namespace) -> int:
    """Serves until it is told to end; returns the exit code, raises BadConfig."""
    config = settings.load(vars(given), os.environ)
    _arm(config.failpoints)
    # Slow to import, and not wanted for --help.
    from service.auth import access_control

    access_control.check(config)
    # The stored data is customers': no other user of the machine may read it.
    os.umask(0o077)
    set_up_logging(config.log_format, config.log_level)
    log.info(
        "starting",
        extra={
            "version": metadata.version("graftml-server"),
            "pid": os.getpid(),
            "data_dir": str(config.data_dir.resolve()),
            "address": config.address,
        },
    )
    if config.failpoints:
        log.warning("failpoints are armed, for tests alone: %s", config.failpoints)
    end = _End()
    try:
        asyncio.run(_run(config, end))
    except BadConfig:
        raise
    except (GraftError, OSError, RuntimeError) as error:
        log.critical("cannot serve: %s", error, exc_info=log.isEnabledFor(logging.DEBUG))
        end.fail(f"cannot serve: {error}")
    log.info("stopped", extra={"why": end.why, "drain_s": round(time.monotonic() - end.began_s, 3)})
    return command.EXIT_FAILED if end.is_failure else command.EXIT_OK


@dataclass
class _End:
    """Why the service ends, and since when it does."""

    why: str = ""
    began_s: float = 0.0
    is_failure: bool = False

    def begin(self, why: str) -> None:
        self.why, self.began_s = why, time.monotonic()

    def fail(self, why: str) -> None:
        """Ends it as a failure, also while it ends already."""
        self.is_failure = True
        if not self.why:
            self.begin(why)


def _arm(plan: str) -> None:
    try:
        failpoints.arm(plan)
    except ValueError as error:
        raise BadConfig(f"--failpoints: {error}") from None


async def _run(config: Config, end: _End) -> None:
    from service.app import App

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, number, stop, end)
    # A flag wins over the variable, for trainers too.
    environment = {
        **os.environ,
        failpoints.VARIABLE: config.failpoints,
        child.FURTHER_VARIABLE: config.pass_environment,
    }
    # Trainers get the environment as it was before, and have folders of their own.
    scratch.use(config.data_dir, environment)
    async with App(config, environment) as app:
        # Modules and what is kept for good: each full search of them for cycles held up all calls
        # for some 25 ms of a core.
        gc.freeze()
        stopped = asyncio.create_task(stop.wait())
        failed = asyncio.create_task(app.wait_failed())
        await asyncio.wait({stopped, failed}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if failed.done() and not stop.is_set():
            log.critical("a part of the service died; stopping", exc_info=failed.exception())
            end.fail("a part of the service died")
            return
        failed.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await failed


def _on_signal(number: signal.Signals, stop: asyncio.Event, end: _End) -> None:
    if stop.is_set():
        log.warning("got %s again: exiting at once", number.name)
        # Trainers end when their standard input closes.
        os._exit(command.EXIT_FAILED)
    log.info("got %s: draining", number.name)
    end.begin(number.name)
    stop.set()
