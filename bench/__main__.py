"""All that serving is measured by, in one command; what `make bench` runs.

    python -m bench [FOLDER] [--short] [--markdown] [--out FILE]

Runs each program alone, one after the other, and writes what they print to FILE
(Markdown) as well. FOLDER holds JPEG photos in a folder per class; without one
the photographs of scikit-learn are cut to pieces. --short is what tells whether the
defaults are right on this machine, alone, some 9 minutes; --markdown is its small
table.
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
    parser.add_argument("--short", action="store_true", help="only providers, precisions, loads")
    parser.add_argument("--markdown", action="store_true", help="a small table of that alone")
    parser.add_argument("--out", type=Path, default=Path("bench-results.md"))
    arguments = parser.parse_args()
    options = ["--short"] * arguments.short + ["--markdown"] * arguments.markdown
    failed = []
    with given_or_written(arguments.folder) as folder, arguments.out.open("w") as out:
        programs: list[tuple[str, str, list[str]]] = [
            ("Serving", "bench.serve", [str(folder), *options]),
            ("Start", "bench.start", []),
            ("Near-empty model", "bench.serve", [str(folder), "--backbones", "near_empty"]),
            ("Many models", "bench.many_models", [str(folder)]),
            ("Overload", "bench.overload", [str(folder)]),
        ]
        for title, module, flags in programs[: 1 if options else None]:
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
