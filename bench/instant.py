"""The service with trainers that train nothing: a job ends at once, with a near-empty model.

    python -m bench.instant run [flags of graft-server run]

Stores, engine and sockets are the service's own. Each job publishes a random head
on one backbone that all share.
"""

import asyncio
import itertools
import signal
from pathlib import Path

from bench import published
from bench.published import near_empty_backbone, near_empty_head, near_empty_manifest
from service import settings
from service.__main__ import command_line
from service.app import App
from service.contract import ExitCode, Finished, JobSpec, Progressed, Record, Spec
from service.ingest import index as indexes
from service.ops.logs import set_up_logging


class InstantTrainer:
    """Has its result before it is asked."""

    def __init__(self) -> None:
        self._records: list[Record] = [Finished(1.0, 1), Progressed("training", 0.5)]

    async def next_record(self) -> Record | None:
        """Says that it trains, and that it has."""
        return self._records.pop() if self._records else None

    async def wait(self) -> int:
        """Has ended well."""
        return ExitCode.OK

    async def stop(self, grace_s: float) -> None:
        """Has ended."""

    def last_words(self) -> list[str]:
        """None."""
        return []


class InstantLauncher:
    """Writes each job's result in the place of a trainer."""

    def __init__(self) -> None:
        self._number = itertools.count()
        self._shared = near_empty_backbone()

    async def start(self, spec: Spec, folder: Path) -> InstantTrainer:  # noqa: ARG002 - as its door
        """Starts no process."""
        assert isinstance(spec, JobSpec), "it ranks and exports nothing"
        await asyncio.to_thread(self._write, spec, next(self._number))
        return InstantTrainer()

    def _write(self, spec: JobSpec, number: int) -> None:
        backbone = self._shared
        index_file = spec.data.index_file or spec.files[spec.data.index]
        head = near_empty_head(number, _classes(Path(index_file)))
        manifest = near_empty_manifest(backbone, head, spec.model, spec.job_id)
        published.write(Path(spec.out_dir), head, manifest, backbone)


def _classes(index: Path) -> tuple[str, ...]:
    return tuple(count.label for count in indexes.load_header(index).classes)


async def main() -> None:
    """Serves until it is told to end."""
    config = settings.load(vars(command_line().parse_args()), {})
    set_up_logging(config.log_format, config.log_level)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    launcher = InstantLauncher()
    async with App(config, {}, launcher=launcher):
        await ended.wait()


if __name__ == "__main__":
    asyncio.run(main())
