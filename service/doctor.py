"""Tells what a server with these settings computes with on this machine, and what was measured.

`graft-server doctor`, beside a server that runs or without one: it writes nothing.
"""

import shutil
from collections.abc import Iterator

from service.config import Config
from service.engine import providers
from service.engine.provider_table import Measured, machine_key, read
from service.engine.providers import ProviderUnavailable, choose_provider
from service.engine.timing import image_ms
from service.ops import cpus

_SHOWN = 12
"""Digits of a digest."""


def report(config: Config) -> tuple[list[str], bool]:
    """Returns lines for people, and whether a server with these settings can compute."""
    about, machine = cpus.describe(), machine_key()
    libraries = machine.keys() - {"processor", "flags", "cores", "quota"}
    lines = [
        f"processor   {about}",
        f"threads     {config.threads or about.available_cores}"
        + (" (set by configuration)" if config.threads else ""),
        "libraries   " + ", ".join(f"{n} {v}" for n, v in machine.items() if n in libraries),
    ]
    try:
        provider = choose_provider(config.provider)
    except ProviderUnavailable as error:
        return [*lines, f"provider    {error}"], False
    lines.append(f"provider    {provider.name}: {provider.why}")
    computed = [
        precision
        for precision in ("fp32", "bf16", "fp16", "int8")
        for name in (provider.name, *provider.others)
        if providers.computing(name, precision) == precision
    ]
    lines.append(f"precisions  {', '.join(dict.fromkeys(computed))}; new versions: "
                 f"{config.precision}")  # fmt: skip
    try:
        free = shutil.disk_usage(config.data_dir).free / 2**30
        lines.append(f"data        {config.data_dir}, {free:.1f} GiB free")
    except OSError as error:
        is_new = isinstance(error, FileNotFoundError)
        why = "not there yet: a server makes it at its start" if is_new else error.strerror
        lines.append(f"data        {config.data_dir}: {why}")
    return [*lines, *_measured(config)], True


def _measured(config: Config) -> Iterator[str]:
    table = read(config.provider_table)
    if table is None or not table.backbones:
        yield "measured    nothing yet: each backbone is measured once, when it is first loaded"
        return
    if table.machine != machine_key():
        yield "measured    on another machine, or with other libraries: it will be measured again"
        return
    for digest, measured in table.backbones.items():
        yield f"measured    {digest[:_SHOWN]} {_line(measured)}"


def _line(measured: Measured) -> str:
    chosen = ", ".join(
        f"{name} for runs on {cores} core{'s' * (cores > 1)}"
        for cores, name in sorted(measured.providers.items())
    )
    costs = ", ".join(f"{name} {ms:.1f} ms" for name, ms in image_ms(measured).items())
    differs = "".join(
        f"; answers of {name} differ by {difference:.1g}"
        for name, difference in measured.differences.items()
    )
    return f"{measured.precision}: {chosen} (an image on one core: {costs}{differs})"
