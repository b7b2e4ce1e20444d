"""`python -m tests.fuzz [--runs N] [TARGET...]`: many inputs to each target, one after another.

Each target has a process of its own, since the search ends the process when it is
done. With atheris the search is guided by coverage; without it, hypothesis mutates the
seeds. What breaks a promise is written to build/fuzz/, and the exit code is 1.
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.promise import Target

TARGETS = ("images", "archives", "requests", "open_inference", "records", "heads", "backbones")
FOUND = Path("build/fuzz")
_HANG_S = 30
_ROOT = Path(__file__).parents[2]


def main() -> int:
    """Runs the targets that are named, or all; says what came of each."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--runs", type=int, default=100_000, help="inputs to each target")
    parser.add_argument("--seed", type=int, default=1, help="of the search")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if strange := set(asked.targets) - set(TARGETS):
        parser.error(f"there is no target {', '.join(sorted(strange))}")
    if asked.inside:
        _search(asked.targets[0], asked.runs, asked.seed, asked.corpus)
        return 0
    FOUND.mkdir(parents=True, exist_ok=True)
    outcomes = [_run(name, asked.runs, asked.seed) for name in asked.targets or TARGETS]
    return 0 if all(outcomes) else 1


def _run(name: str, runs: int, seed: int) -> bool:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as corpus:
        command = [sys.executable, "-W", "error", "-m", "tests.fuzz", "--inside", name]
        command += ["--runs", str(runs), "--seed", str(seed), "--corpus", corpus]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    count = _last(r"^#(\d+)", done.stderr) or _last(r"^ran (\d+)", done.stdout)
    coverage = _last(r"cov: (\d+)", done.stderr) or "unknown"
    corpus_size = _last(r"corp: (\d+)", done.stderr) or "unknown"
    print(
        f"{name}: {count} inputs in {seconds:.0f} s ({int(count or 0) / seconds:.0f} a second), "
        f"coverage {coverage} edges, {corpus_size} inputs kept: "
        f"{'nothing found' if done.returncode == 0 else 'BROKEN'}",
        flush=True,
    )
    if done.returncode != 0:
        print(done.stdout[-2000:], done.stderr[-6000:], sep="\n", flush=True)
    return done.returncode == 0


def _last(pattern: str, text: str) -> str:
    found = re.findall(pattern, text, re.MULTILINE)
    return str(found[-1]) if found else ""


def _search(name: str, runs: int, seed: int, corpus: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        _search_unguided(_target(name), runs)
        return
    import atheris

    # The wanted modules are known only by importing the target, which would come too late.
    include = ["service", "tests.fuzz", "PIL", "tarfile", "zipfile"]
    with atheris.instrument_imports(include=include):
        target = _target(name)
    kept = [path.read_bytes() for path in target.cases()]
    for number, data in enumerate([*target.seeds(), *kept]):
        (corpus / f"{number:04}").write_bytes(data)
    options = [
        f"-runs={runs}",
        f"-seed={seed}",
        f"-max_len={target.max_bytes}",
        f"-timeout={_HANG_S}",
        "-rss_limit_mb=3072",
        "-print_final_stats=1",
        f"-artifact_prefix={FOUND}/{name}-",
        str(corpus),
    ]
    atheris.Setup([name, *options], target.keeps_its_promise)
    atheris.Fuzz()


def _search_unguided(target: Target, runs: int) -> None:
    from tests.fuzz.mutation import check

    ran = check(target, runs, FOUND)
    print(f"ran {ran}")


def _target(name: str) -> Target:
    target: Target = importlib.import_module(f"tests.fuzz.{name}").TARGET
    return target


if __name__ == "__main__":
    sys.exit(main())
