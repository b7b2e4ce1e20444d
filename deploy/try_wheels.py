"""Installs the wheels in dist/ as users do, in empty environments, and tries what they bring.

    python deploy/try_wheels.py dist [PYTHON ...]

Client and server get an environment of their own for each PYTHON (python3.13, a path), with
all that they require from the package index, several GB for PyTorch. Without one it is the
Python that runs this, and what is required is borrowed from its packages: a minute, and no
network. The sources are out of reach. Then the client's `graft` makes a model with the
server's `graft-server`, asks it, and reads its report. Leaves nothing behind.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
from PIL import Image

WAIT_S = 600.0
"""Longest wait for any one command, installing left out; slower machines than that are broken."""
INSTALL_S = 3600.0
PER_CLASS = 12


def main() -> None:
    """Tries each Python in turn; the first thing that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dist", type=Path, help="where the wheels are")
    parser.add_argument("python", nargs="*", help="install all that is required, with these")
    arguments = parser.parse_args()
    wheels = sorted(arguments.dist.resolve().glob("*.whl"))
    if len(wheels) != 3:
        sys.exit(f"{arguments.dist} holds {len(wheels)} wheels instead of 3: run `make dist`")
    for python in arguments.python or [None]:
        with tempfile.TemporaryDirectory(prefix="graft-wheels-") as folder:
            try_with(python, wheels, Path(folder))


def try_with(python: str | None, wheels: list[Path], folder: Path) -> None:
    """Installs with one Python below `folder`, and uses what is there."""
    client = install(
        python, [w for w in wheels if "server" not in w.name], "[cli]", folder / "client"
    )
    server = install(python, [w for w in wheels if "graftml-" not in w.name], "", folder / "server")
    print(run(client / "graft", "--version"), run(server / "graft-server", "--version"))
    run(client / "graft", "--help")
    run(client / "python", "-c", "from graftml import AsyncClient, Client, testing")

    noise = numpy.random.default_rng(0)
    for label, channel in (("red", 0), ("blue", 2)):
        (folder / "images" / label).mkdir(parents=True)
        for number in range(PER_CLASS):
            pixels = noise.integers(0, 60, (64, 64, 3), numpy.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(folder / "images" / label / f"{number}.png")
    with serving(server / "graft-server", folder) as address:
        graft = (client / "graft", f"--server={address}", f"--timeout={WAIT_S}")
        run(*graft, "health")
        job = run(*graft, "--quiet", "finetune", folder / "images", "--name", "colours")
        asked = run(*graft, "--json", "predict", "colours", folder / "images" / "blue" / "0.png")
        assert '"blue"' in asked, asked
        report = run(*graft, "report", "colours", "--html")
        assert "colours" in report, report
    print(job)


def install(python: str | None, wheels: list[Path], extra: str, folder: Path) -> Path:
    """Makes an environment with the wheels; returns its folder of commands."""
    run(python or sys.executable, "-m", "venv", folder)
    commands = folder / "bin"
    pip = (commands / "python", "-m", "pip", "--quiet", "--disable-pip-version-check")
    if python:
        # An extra of a file is written so.
        named = [f"{w}{extra}" if w.name.startswith("graftml-") else w for w in wheels]
        run(*pip, "install", *named, timeout_s=INSTALL_S)
        run(*pip, "check")
    else:
        run(*pip, "install", "--no-index", "--no-deps", *wheels)
        (packages,) = folder.glob("lib/python*/site-packages")
        # Links to sources, which lie in that folder as well, are followed from there alone.
        (packages / "borrowed.pth").write_text(f"{Path(numpy.__file__).parents[1]}\n")
    return commands


@contextmanager
def serving(command: Path, folder: Path) -> Iterator[str]:
    """Runs the server; yields its address once it says that it serves, and stops it."""
    process = subprocess.Popen(
        [command, "run", "--port=0", "--metrics-port=0", f"--data-dir={folder / 'data'}"],
        cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    seen: list[str] = []
    try:
        for line in process.stderr:
            seen.append(line)
            if line.startswith("{") and json.loads(line)["message"] == "serving":
                break
        else:
            sys.exit(f"the server does not serve:\n{''.join(seen)}")
        ports = json.loads(seen[-1])
        # A pipe that nobody reads would hold the server up.
        reader = threading.Thread(target=seen.extend, args=(process.stderr,))
        reader.start()
        health = f"http://127.0.0.1:{ports['metrics_port']}/healthz"
        with urllib.request.urlopen(health, timeout=WAIT_S) as answer:  # nosec B310
            assert answer.read() == b"serving\n"
        yield f"127.0.0.1:{ports['port']}"
    except BaseException:
        print("".join(seen), file=sys.stderr)
        raise
    finally:
        process.terminate()
        code = process.wait(timeout=WAIT_S)
    reader.join(timeout=WAIT_S)
    if code:
        sys.exit(f"the server ended with {code}:\n{''.join(seen)}")


def run(*command: str | Path, timeout_s: float = WAIT_S) -> str:
    """Runs a command away from the sources; returns what it printed, or ends with it."""
    done = subprocess.run(
        command, cwd="/", env=environment(), capture_output=True, text=True,
        timeout=timeout_s, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def environment() -> dict[str, str]:
    """That of whoever runs this, without what leads to the sources or changes the server."""
    return {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("GRAFT_", "PYTHON", "VIRTUAL_ENV"))
    }


if __name__ == "__main__":
    main()
