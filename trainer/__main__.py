"""`python -m trainer`: jobs for the service, and `prepare` for who installs it.

The exit codes are `service.contract.ExitCode`.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from service import prepared
from service.contract import (
    DEFAULT_BACKBONE,
    ExitCode,
    ExportSpec,
    Failed,
    JobSpec,
    RankSpec,
)
from service.errors import GraftError, Reason
from service.ops import child, failpoints
from service.ops.cgroups import be_killed_first
from service.ops.cpus import available_cores
from trainer import disk
from trainer.memory import is_out_of_memory
from trainer.records import Records, Send, read_order

_FILE_BYTES = 20 * 2**30
"""Limit on the size of a file that a trainer writes: more than `kept.FILE_BYTES`, and than weights
and exports are; twice its limit for the cache of features where that is more."""

_Spec = TypeVar("_Spec", JobSpec, RankSpec)


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the arguments say; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    # Found by libraries that draw lots; set before any of them is imported.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Torch and NumPy would count hyper-threads, and not the quota.
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
    failpoints.arm(os.environ.get(failpoints.VARIABLE, ""))
    if parsed.command in (*_STEPS, "wait"):
        be_killed_first()
        child.confine()
    if parsed.command in _STEPS:
        records = Records()
        records.keep_alive()
        return _STEPS[parsed.command](parsed.spec, records)
    return _wait() if parsed.command == "wait" else _prepare()


def _run(spec_file: Path, records: Records) -> int:
    return _train(_begun(spec_file, JobSpec, records), records.send)


def _wait() -> int:
    """Imports what most jobs need, then does what it is told on standard input."""
    records = Records()
    from trainer import warm

    warm.prepare()
    order = read_order()
    records.print_to(Path(order.log))
    if order.tmp_dir:
        # The job's own folder, which is removed with it.
        os.environ["TMPDIR"] = tempfile.tempdir = order.tmp_dir
    # CUDA reads this once, when it is first used: by the job.
    os.environ["CUDA_VISIBLE_DEVICES"] = order.gpu
    records.keep_alive()
    return _STEPS[order.command](Path(order.spec), records)


def _run_ranking(spec_file: Path, records: Records) -> int:
    return _rank(_begun(spec_file, RankSpec, records), records.send)


def _run_export(spec_file: Path, records: Records) -> int:
    spec = msgspec.json.decode(spec_file.read_bytes(), type=ExportSpec)
    child.limit_files(_FILE_BYTES)

    def run() -> None:
        from trainer import export

        records.send(export.run(spec))

    return _told(run, records.send, "the export")


_STEPS: dict[str, Callable[[Path, Records], int]] = {
    "run": _run,
    "rank": _run_ranking,
    "export": _run_export,
}


def _prepare() -> int:
    """Exports the default backbone into this environment, where all its servers find it."""
    folder = prepared.environment_folder()
    if prepared.find(folder, DEFAULT_BACKBONE) is not None:
        return ExitCode.OK
    from trainer import export

    with tempfile.TemporaryDirectory() as out:
        spec = ExportSpec(backbone=DEFAULT_BACKBONE, out_dir=out, weights_dir=out, precision="auto")
        prepared.keep(folder, DEFAULT_BACKBONE, export.run(spec), Path(out))
    return ExitCode.OK


def _begun(spec_file: Path, kind: type[_Spec], records: Records) -> _Spec:
    spec = msgspec.json.decode(spec_file.read_bytes(), type=kind)
    # Address space stays without a limit: CUDA and torch reserve far more than they use.
    child.limit_files(max(_FILE_BYTES, 2 * spec.feature_cache_bytes))
    records.beat_every(spec.heartbeat_s)
    return spec


def _train(spec: JobSpec, send: Send) -> int:
    # Imported late: a bad spec needs none of it.
    def run() -> None:
        failpoints.reach("trainer.started")
        from trainer import train

        train.run(spec, send)

    return _told(run, send, "training")


def _rank(spec: RankSpec, send: Send) -> int:
    def run() -> None:
        from trainer import ranking

        send(ranking.rank(spec, send))

    return _told(run, send, "ranking")


def _told(run: Callable[[], None], send: Send, what: str) -> int:
    """Runs it, and tells of what went wrong where trying again will not help."""
    try:
        run()
    except GraftError as error:
        send(Failed(error.reason, error.message))
    except Exception as error:
        if is_out_of_memory(error):
            advice = "ask for a smaller batch size or a smaller backbone"
            send(Failed(Reason.OUT_OF_MEMORY, f"{what} ran out of memory: {advice}"))
        elif disk.is_full(error):
            advice = "make room on the server's disk and try again"
            send(Failed(Reason.STORAGE_FULL, f"{what} found the disk full: {advice}"))
        else:
            raise
    else:
        return ExitCode.OK
    return ExitCode.FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Fine-tunes an image classifier and exports it to ONNX.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run one job for the service")
    run.add_argument("spec", type=Path, help="JSON file with a JobSpec")
    rank = commands.add_parser("rank", help="run one ranking for the service")
    rank.add_argument("spec", type=Path, help="JSON file with a RankSpec")
    exporting = commands.add_parser("export", help="export a backbone for the service")
    exporting.add_argument("spec", type=Path, help="JSON file with an ExportSpec")
    commands.add_parser("wait", help="run the job that a line on standard input names")
    commands.add_parser(
        "prepare", help="export the default backbone into this environment, for its servers"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
