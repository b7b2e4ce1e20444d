"""What several models on one image cost, and an image that comes again.

    python -m bench.several_models [FOLDER] [--backbone efficientnet_lite0] [--models 10]
        [--calls 40] [--rounds 5]

Fine-tunes one model on FOLDER (photos in a folder per class) and publishes copies of its
head, and a near-empty model. Two services answer one caller: one keeps no features, on the
other images come again. Within a round the kinds of calls take turns, call by call; each
ratio is one of two medians of the same round.
"""

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from graftml import Client

from bench.photographs import given_or_written, photos
from bench.published import NEAR_EMPTY, publish_copies, publish_near_empty
from bench.running import fine_tune, service, spread
from bench.serve.load import stamped
from service.ops.cpus import describe

Call = Callable[[], object]


def calls(without: Client, keeping: Client, folder: Path, names: list[str]) -> dict[str, Call]:
    """One call of each kind."""
    images = photos(folder)
    new = map(stamped, itertools.cycle(images), itertools.count())
    again = itertools.cycle(images)
    one = names[0]
    # Of the other models on the backbone nothing is asked before: heads are loaded, images known.
    for data in images:
        keeping.predict(data, one)
        keeping.predict(data, NEAR_EMPTY)
    for client in (without, keeping):
        client.predict_many(images[0], names)

    def each(client: Client, data: bytes) -> None:
        for name in names:
            client.predict(data, name)

    return {
        "one model": lambda: without.predict(next(new), one),
        "all models, one call": lambda: without.predict_many(next(new), names),
        "all models, a call each": lambda: each(without, next(new)),
        "all models, a call each, features kept": lambda: each(keeping, next(new)),
        "one model, image known": lambda: keeping.predict(next(again), one),
        "another model, image known": lambda: keeping.predict(next(again), names[-1]),
        "near-empty model": lambda: without.predict(next(new), NEAR_EMPTY),
        "near-empty model, image known": lambda: keeping.predict(next(again), NEAR_EMPTY),
    }


RATIOS = (
    ("all models, one call", "one model"),
    ("all models, one call", "all models, a call each"),
    ("all models, a call each, features kept", "all models, a call each"),
    ("one model, image known", "near-empty model"),
    ("another model, image known", "near-empty model"),
    ("one model, image known", "near-empty model, image known"),
    ("one model, image known", "one model"),
)


def one_round(kinds: dict[str, Call], count: int) -> dict[str, float]:
    """Median milliseconds of each kind of call."""
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(count):
        for name, call in kinds.items():
            started = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - started) * 1000)
    return {name: statistics.median(of_kind) for name, of_kind in times.items()}


def main() -> None:
    """Prints a Markdown table, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    names = [f"m{number}" for number in range(arguments.models)]
    with ExitStack() as stack:
        folder = stack.enter_context(given_or_written(arguments.folder))
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with service(temporary / "off") as running:
            fine_tune(running, folder, arguments.backbone)
        publish_copies(temporary / "off", "bench", names)
        publish_near_empty(temporary / "off", NEAR_EMPTY)
        shutil.copytree(temporary / "off", temporary / "on")
        off = stack.enter_context(service(temporary / "off"))
        on = stack.enter_context(service(temporary / "on", keeps_features=True))
        without, keeping = (stack.enter_context(Client(each.address)) for each in (off, on))
        kinds = calls(without, keeping, folder, names)
        one_round(kinds, 5)
        rounds = [one_round(kinds, arguments.calls) for _ in range(arguments.rounds)]
    print(
        f"{describe()}, {arguments.backbone}, {arguments.models} models, "
        f" {arguments.rounds} rounds of {arguments.calls} calls\n"
    )
    print("| Call | median ms (range over rounds) |\n| --- | --- |")
    for name in kinds:
        print(f"| {name} | {spread([each[name] for each in rounds], '.2f')} |")
    print()
    for above, below in RATIOS:
        values = [each[above] / each[below] for each in rounds]
        print(f"- {above}, of {below}: {spread(values, '.2f')}")


if __name__ == "__main__":
    main()
