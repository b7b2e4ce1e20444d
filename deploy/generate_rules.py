"""Makes Kubernetes' copy of the alerts of deploy/prometheus/rules.yml.

`--check` writes nothing and fails where the copy is stale.
"""

import argparse
import re
import sys
from pathlib import Path

DEPLOY = Path(__file__).parent
RULES = DEPLOY / "prometheus" / "rules.yml"
COPY = DEPLOY / "kubernetes" / "monitoring" / "prometheusrule.yaml"


def copy() -> str:
    """Returns the copy as it should be: its own head, and the rules below `spec`."""
    head, spec, _ = COPY.read_text("utf-8").partition("\nspec:\n")
    return head + spec + re.sub(r"^(?=.)", "  ", RULES.read_text("utf-8"), flags=re.MULTILINE)


def main() -> None:
    """Writes or checks the copy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when stale")
    if not parser.parse_args().check:
        COPY.write_text(copy(), "utf-8")
    elif COPY.read_text("utf-8") != copy():
        sys.exit(f"stale: {COPY}; run `make generate`")


if __name__ == "__main__":
    main()
