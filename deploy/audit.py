"""Asks whether anything that is locked or installed is known to be vulnerable.

    python deploy/audit.py, in the project's root, with pip-audit installed

Asks PyPI, then OSV where PyPI does not know of vulnerabilities (a mirror, as a
rule). Exit code 0: asked of every package, and nothing is known. 1: something is,
and it is listed. 3: neither could be asked; that is not a good answer, so it is no 0.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

LOCKS = Path("deploy/locks")
# cpu-torch.txt has no versions that gpu.txt has not.
LISTS = ("build.txt", "cpu.txt", "gpu.txt")
SERVICES = ("pypi", "osv")
OURS = ("graftml", "graftml-server", "graftml-stubs")
EXIT_VULNERABLE, EXIT_NOT_ASKED = 1, 3


@dataclass
class Answer:
    """What a service said of a set of packages."""

    asked: int = 0
    vulnerable: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """Those that it could not tell of."""


def ask(service: str, arguments: Iterable[str]) -> Answer | str:
    """The answer, or why there is none."""
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", "--format=json", "--progress-spinner=off",
         f"--vulnerability-service={service}", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return read(packages)


def read(packages: Iterable[dict[str, object]]) -> Answer:
    """From what pip-audit lists."""
    answer = Answer()
    for package in packages:
        name = str(package["name"])
        if name in OURS:
            continue
        if "skip_reason" in package:
            answer.unknown.append(name)
            continue
        answer.asked += 1
        found = package["vulns"]
        assert isinstance(found, list)
        answer.vulnerable += [
            f"{name} {package['version']}: {each['id']}"
            f" (fixed in {', '.join(each['fix_versions']) or 'no version yet'})"
            for each in found
        ]
    return answer


def audit(what: str, arguments: list[str]) -> int:
    """Asks one service after another about one set; prints what came of it."""
    for service in SERVICES:
        answer = ask(service, arguments)
        if isinstance(answer, str):
            print(f"{what}: NOT ASKED of {service}: {answer}")
            continue
        for line in answer.vulnerable:
            print(f"{what}: VULNERABLE: {line}")
        if answer.vulnerable:
            return EXIT_VULNERABLE
        if not answer.unknown:
            print(f"{what}: {answer.asked} packages asked of {service}, nothing is known")
            return 0
        print(
            f"{what}: NOT ASKED of {service}: it does not know {len(answer.unknown)} of "
            f"{answer.asked + len(answer.unknown)} packages, {answer.unknown[0]} among them"
        )
    return EXIT_NOT_ASKED


def main() -> int:
    """Audits the locks, then what is installed; the worst of what came of it."""
    codes = [
        audit(name, ["--disable-pip", "--require-hashes", f"--requirement={LOCKS / name}"])
        for name in LISTS
    ]
    codes.append(audit("installed", ["--skip-editable"]))
    if EXIT_VULNERABLE in codes:
        return EXIT_VULNERABLE
    if EXIT_NOT_ASKED in codes:
        print("NOT ALL WAS AUDITED FOR VULNERABILITIES: run this where PyPI or OSV can be asked")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
