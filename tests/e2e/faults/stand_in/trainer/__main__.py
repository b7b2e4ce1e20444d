"""A trainer without torch: it says what a real one says, and hands out one finished result.

What it tells and how it hears of its parent's end is the real `trainer.records`. A
job with the label `stand_in=waits` goes on until it is stopped, one with
`stand_in=computes` says nothing for `for_s` seconds and is busy.
"""

import os
import shutil
import sys
import threading
import time
from pathlib import Path

import msgspec

from service.contract import (
    MANIFEST_FILE,
    BackbonesRanked,
    ClassCount,
    DataFound,
    Finished,
    JobSpec,
    Manifest,
    Note,
    Progressed,
    RankSpec,
)
from trainer.records import Records, read_order

PARTS = Path(os.environ["STAND_IN_PARTS"])


def main(command: str, spec_file: str) -> None:
    records = Records()
    if command == "wait":
        order = read_order()
        records.print_to(Path(order.log))
        command, spec_file = order.command, order.spec
    records.keep_alive()
    if command == "rank":
        msgspec.json.decode(Path(spec_file).read_bytes(), type=RankSpec)
        records.send(BackbonesRanked([], "nothing was ranked", 0))
        return
    spec = msgspec.json.decode(Path(spec_file).read_bytes(), type=JobSpec)
    records.beat_every(spec.heartbeat_s)
    manifest = msgspec.json.decode((PARTS / MANIFEST_FILE).read_bytes(), type=Manifest)
    records.send(Progressed("preparing", 0.0, "reading the images"))
    counts = [ClassCount(label, 1, 1) for label in manifest.classes]
    records.send(DataFound(counts, manifest.reading, manifest.dataset_digest))
    records.send(Note("info", "standing in"))
    if spec.labels.get("stand_in") == "waits":
        threading.Event().wait()
    is_busy = spec.labels.get("stand_in") == "computes"
    until = time.monotonic() + (float(spec.labels["for_s"]) if is_busy else 0)
    while time.monotonic() < until:
        pass
    records.send(Progressed("training", 1.0))
    for part in PARTS.iterdir():
        shutil.copyfile(part, Path(spec.out_dir) / part.name)
    made = msgspec.structs.replace(manifest, model=spec.model, job_id=spec.job_id)
    (Path(spec.out_dir) / MANIFEST_FILE).write_bytes(msgspec.json.encode(made))
    [figure] = manifest.figures
    records.send(Finished(figure.accuracy, figure.count))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
