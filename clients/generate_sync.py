"""Generates the blocking client, `graftml/_sync`, from the asyncio one, `graftml/_async`.

`--check` writes nothing and fails on any difference, so that the blocking client is never edited
by hand and never stale.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "python/src/graftml"
HEADER = (
    "# Generated from graftml/_async by clients/generate_sync.py: edit that, and `make generate`.\n"
)

RULES = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\basync (def|for|with)\b", r"\1"),
        (r"\bawait ", ""),
        (r"\bAwaitable\[(\w+)\]", r"\1"),
        (r", Awaitable\b", ""),
        # AsyncClient, AsyncIterator, _AsyncHandle.
        (r"\b(_?)Async([A-Z]\w*)", r"\1\2"),
        (r"\b_async(_io)?\b", r"_sync\1"),
        (r"\b__a(enter|exit)__", r"__\1__"),
        (r"\baclosing\b", "closing"),
    )
]


def blocking(path: Path) -> str:
    """Returns the blocking form of a module of the asyncio client."""
    source = path.read_text()
    for pattern, plain in RULES:
        source = pattern.sub(plain, source)
    for arguments in (["check", "--select", "I", "--fix", "--quiet"], ["format", "--quiet"]):
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("ruff")),
                *arguments,
                "--stdin-filename",
                path,
                "-",
            ],
            input=source,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            cwd=PACKAGE,
        )
        source = done.stdout
    return HEADER + source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when stale")
    check = parser.parse_args().check
    fresh = {
        PACKAGE / "_sync" / path.name: blocking(path) for path in (PACKAGE / "_async").glob("*.py")
    }
    left = set((PACKAGE / "_sync").glob("*.py")) - fresh.keys()
    stale = sorted(
        path.name for path, text in fresh.items() if not path.exists() or path.read_text() != text
    )
    if check:
        if stale or left:
            names = ", ".join([*stale, *sorted(path.name for path in left)])
            raise SystemExit(f"stale parts of the blocking client, run `make generate`: {names}")
        return
    for path in left:
        path.unlink()
    for path, text in fresh.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
