"""Graft beside plain servers and bare loops: the same photos, the same networks, one run.

    python -m bench.serve [FOLDER] [--backbones efficientnet_lite0 resnet18]
        [--seconds 4] [--rounds 3] [--short] [--markdown]

FOLDER holds JPEG photos in a folder per class. Of each backbone a version is made in the
default precision, in fp32 and in int8. Three kinds of service serve them: one on the defaults,
whose providers are measured before anything is timed, and one for each provider that can be
set by hand; no trainer waits beside them. Plain servers (`bench.serve.plain_server`) serve
the versions' exported files, and bare loops (`bench.serve.bare`) run them without a server.

All of it is interleaved round by round, since machines drift; ratios are taken within a round.
Medians over rounds, range in brackets. Fails when the defaults' probabilities differ by more
than 1e-3 from those of the first provider set by hand. The backbone near_empty costs next to
nothing: what is left is the server. --short leaves out 8 callers, the open loop and the plain
loops, with runs of 2.5 s: some 9 minutes for two backbones. --markdown prints the small
table alone.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from graftml import Client
from graftml.types import ServingPrecision

from bench.photographs import given_or_written, photos
from bench.published import NEAR_EMPTY, publish_near_empty
from bench.running import (
    Running,
    fine_tune,
    measured,
    plain_server,
    pss_mib,
    service,
    wait_until_measured,
)
from bench.serve import table
from bench.serve.load import stamped
from bench.serve.table import AGREE, BARE, DEFAULTS, OPEN, OPEN_PART, PLAIN, Backbone, Cell
from service.engine import provider_table
from service.engine.providers import choose_provider, computing, openvino_problem
from service.engine.runtime import able, marked
from service.ops import cpus

PAUSE_S = 0.2
AT_ONCE = 8
"""Calls under way when answers under load are compared."""


@dataclass(frozen=True)
class Made:
    """A version that is measured."""

    name: str
    """Of its model."""
    exported: Path
    chosen: dict[int, str]
    """Providers by the number of cores of a run, as measured."""

    @property
    def providers(self) -> str:
        """Names them."""
        if len(names := set(self.chosen.values())) == 1:
            return names.pop()
        return ", ".join(f"{name} on {cores}" for cores, name in sorted(self.chosen.items()))


def main() -> None:
    """Prints tables and verdicts; exits with 1 where providers do not agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--backbones", nargs="+", default=["efficientnet_lite0", "resnet18"])
    parser.add_argument("--seconds", type=float, help="a run, half of it for one caller; 4, or 2.5")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="1 and 32 callers alone")
    parser.add_argument("--markdown", action="store_true", help="the small table alone")
    arguments = parser.parse_args()
    arguments.seconds = arguments.seconds or (2.5 if arguments.short else 4)
    begun = time.monotonic()
    with given_or_written(arguments.folder) as folder:
        every = [measure(backbone, folder, arguments) for backbone in arguments.backbones]
    print(
        f"{cpus.describe()}; medians (ranges) of {arguments.rounds} interleaved rounds of "
        f"{arguments.seconds:g} s a run, half of that for one caller; photos cycle, each with a "
        f"number that makes it a new file. {table.disturbances(every)}\n"
    )
    for found in every if not arguments.markdown else []:
        print(f"### {found.title}\n")
        print("\n".join(table.figures(found)), end="\n\n")
    print("\n".join(table.summary(every)), end="\n\n")
    for found in every if not arguments.markdown else []:
        print("\n".join(table.verdicts(found)))
    log(f"{(time.monotonic() - begun) / 60:.0f} minutes in all")
    problems = [
        f"{found.title}, {precision}: probabilities differ by {difference:.1g}"
        for found in every
        for (precision, name), difference in found.differences.items()
        if name == DEFAULTS and not difference <= AGREE
    ]
    problems += [
        f"{found.title}, {', '.join(cell)}: calls failed"
        for found in every
        for cell, runs in found.runs.items()
        if any(run["errors"] for run in runs)
    ]
    if problems:
        sys.exit("FAILED: " + "; ".join(problems))


def measure(backbone: str, folder: Path, arguments: argparse.Namespace) -> Backbone:
    """Measures one backbone."""
    is_random = backbone not in (NEAR_EMPTY, "efficientnet_lite0")
    found = Backbone(f"{backbone}{' (seeded random weights)' if is_random else ''}")
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        made = dict(versions(temporary / "made", folder, backbone))
        found.chosen = {precision: one.providers for precision, one in made.items()}
        running = {}
        for name in (*by_hand(), DEFAULTS):
            copy = shutil.copytree(temporary / "made", temporary / name)
            flags = ["--warm-trainers=0"] + [f"--provider={name}"] * (name != DEFAULTS)
            running[name] = stack.enter_context(service(copy, *flags, keeps_features=True))
        servers = {}
        for precision, one in made.items():
            if precision in ("fp32", "int8"):
                servers[precision, PLAIN] = plain_server(stack, one.exported), one.name
            for name, own in running.items():
                if name == DEFAULTS or computing(name, precision) == precision:  # type: ignore[arg-type]
                    servers[precision, name] = own, one.name
        log(f"{backbone}: compares answers")
        found.differences = differences(servers, photos(folder))
        for number in range(arguments.rounds):
            log(f"{backbone}, round {number + 1}")
            one_round(found, folder, made, servers, number, arguments)
        found.memory_mib = {name: pss_mib(own.pid) for name, own in running.items()}
    return found


def log(text: str) -> None:
    """Says what goes on, apart from the figures."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def by_hand() -> list[str]:
    """Lists the providers that can be set by hand here, the first that `auto` may take first."""
    provider = choose_provider("auto")
    also = ["openvino"] if not openvino_problem() else []
    return list(dict.fromkeys([provider.name, *provider.others, "cpu", *also]))


def versions(data_dir: Path, folder: Path, backbone: str) -> Iterator[tuple[str, Made]]:
    """Makes a version in the default precision and, where that is another, in fp32 and int8."""
    first = ""
    asked: tuple[ServingPrecision, ...] = ("auto", "fp32", "int8")
    data_dir.mkdir()
    if backbone == NEAR_EMPTY:
        publish_near_empty(data_dir, "auto")
        asked = ("auto",)
    with service(data_dir, "--warm-trainers=0") as running, Client(running.address) as client:
        for name in (each for each in asked if each != first):
            log(f"{backbone}, {name}: makes a version, and measures its providers")
            if backbone != NEAR_EMPTY:
                fine_tune(running, folder, backbone, name, name)
            client.predict(photos(folder, 1), model=name)
            wait_until_measured(running.metrics_url)
            precision, made = version(client, data_dir, name)
            first = first or precision
            yield precision, made


def version(client: Client, data_dir: Path, asked: str) -> tuple[str, Made]:
    """Exports a version that was measured; returns its precision, and what was measured."""
    exported = client.export_model(asked, data_dir.parent / f"{asked}.onnx")
    about, provider = client.get_version(asked), choose_provider("auto")
    names = able(provider, about.serving_precision)  # type: ignore[arg-type]
    chosen: dict[int, str] = dict.fromkeys((cpus.available_cores(), 1), names[0])
    known = provider_table.read(data_dir / "providers.json")
    if known is not None and about.backbone_digest in known.backbones:
        chosen = {**known.backbones[about.backbone_digest].providers}
    elif len(names) > 1:
        sys.exit(f"{about.backbone} was not measured:\n" + (data_dir / "service.log").read_text())
    if asked not in ("auto", about.serving_precision):
        sys.exit(f"a version in {asked} computes in {about.serving_precision}")
    for precision in ("bf16", "fp16"):
        if precision == about.serving_precision:  # which an exported file does not say
            exported.write_bytes(marked(exported.read_bytes(), precision))
    return about.serving_precision, Made(asked, exported, chosen)


Servers = dict[tuple[str, str], tuple[Running, str]]
"""Servers and the models they are asked, by precision and the way to serve."""


def differences(servers: Servers, images: list[bytes]) -> dict[tuple[str, str], float]:
    """Compares probabilities with those of the first provider set by hand.

    Of the same images, one by one and several at once, since a graph for all cores and one
    for a single core may be on different providers. Warms the services.
    """
    found: dict[tuple[str, str], float] = {}
    expected: dict[str, np.ndarray[tuple[int, int], np.dtype[np.float64]]] = {}
    for (precision, name), (running, model) in servers.items():
        if name == PLAIN:
            continue
        with Client(running.address) as client, ThreadPoolExecutor(AT_ONCE) as pool:

            def answer(data: bytes, client: Client = client, model: str = model) -> list[float]:
                (answered,) = client.predict(data, model=model, top_k=1000)
                by_class = sorted(answered.scores, key=lambda score: score.class_index)
                return [score.probability for score in by_class]

            rows = [answer(stamped(data, 0)) for data in images]
            rows += pool.map(answer, [stamped(data, 1) for data in images])
        both = np.array(rows)
        first = expected.setdefault(precision, np.tile(both[: len(images)], (2, 1)))
        found[precision, name] = float(np.abs(both - first).max())
    return found


def one_round(
    found: Backbone,
    folder: Path,
    made: dict[str, Made],
    servers: Servers,
    number: int,
    arguments: argparse.Namespace,
) -> None:
    """Measures everything once, every other round in the reverse order."""
    cores, seconds = cpus.available_cores(), arguments.seconds
    ways = list(servers)[:: -1 if number % 2 else 1]

    def add(cell: Cell, module: str, *flags: object) -> None:
        found.runs.setdefault(cell, []).append(measured(module, *flags))
        time.sleep(PAUSE_S)

    def load(way: tuple[str, str], name: str, *flags: object) -> None:
        running, model = servers[way]
        kind = "plain" if way[1] == PLAIN else "graft"
        add(
            Cell(*way, name), "load", running.address, folder, "--pid", running.pid,
            "--kind", kind, "--models", model, "--warm-up", 1, *flags,
        )  # fmt: skip

    for callers in (1, 32) if arguments.short else (1, 8, 32):
        name = f"{callers} caller{'s' * (callers > 1)}"
        for way in ways:
            load(way, name, "--callers", callers, "--seconds", seconds / (1 + (callers == 1)))
    for way in ways if not arguments.short else []:
        rate = OPEN_PART * found.runs[Cell(*way, "32 callers")][-1]["per_second"]
        load(way, OPEN, "--rate", rate, "--seconds", seconds)
    for precision, one in made.items():
        for name, loops, threads in (("one loop", 1, cores), ("a loop a core", cores, 1)):
            flags = ("--loops", loops, "--threads", threads, "--seconds", seconds / 2)
            as_served = ("--provider", one.chosen[threads])
            add(Cell(precision, BARE[1], name), "bare", one.exported, folder, *flags,
                *as_served)  # fmt: skip
            if precision in ("fp32", "int8") and not arguments.short:
                add(Cell(precision, BARE[0], name), "bare", one.exported, folder, *flags)


if __name__ == "__main__":
    main()
