"""All that serving is measured by, in one command; what `make bench` runs.

    python -m bench [FOLDER] [--quick] [--out FILE]

Runs each program alone, one after the other, and writes what they print to FILE
(Markdown) as well. FOLDER holds JPEG photos in a folder per class; without one
the photographs of scikit-learn are cut to pieces. The churn of 30 minutes is left
out: `python -m bench.churn`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from bench.photographs import given_or_written


def main() -> None:
    """Runs them; exits with 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--quick", action="store_true", help="short runs, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("bench-results.md"))
    arguments = parser.parse_args()
    seconds, rounds, models = ("2", "1", "50") if arguments.quick else ("8", "3", "1000")
    every = ("--seconds", seconds, "--rounds", rounds)
    settings = ("--settings", "provider=cpu precision=fp32", "", "precision=int8")
    failed = []
    with given_or_written(arguments.folder) as folder, arguments.out.open("w") as out:
        for title, module, flags in (
            ("Start", "bench.start", ()),
            ("Serving", "bench.serve", (str(folder), *every, *settings)),
            ("Near-empty model", "bench.serve",
             (str(folder), *every, "--backbone", "near_empty", "--settings", "")),
            ("Many models", "bench.many_models",
             (str(folder), "--models", models, "--seconds", seconds)),
            ("Overload", "bench.overload",
             (str(folder), "--seconds", "5" if arguments.quick else "60")),
        ):  # fmt: skip
            command = [sys.executable, "-m", module, *flags]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                failed.append(title)
            text = f"## {title}\n\n{done.stdout}\n"
            print(text, flush=True)
            out.write(text)
            out.flush()
    if failed:
        sys.exit("failed: " + ", ".join(failed))


if __name__ == "__main__":
    main()
