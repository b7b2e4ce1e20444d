"""Reads the settings once, from flags, the environment and a file, and checks them.

The only reader of the environment. A setting `some_name` is the flag `--some-name`, the variable
`GRAFT_SOME_NAME` and the key `some_name` of a TOML file; a flag wins over a variable, and a
variable over the file.
"""

import argparse
import difflib
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

from service.backbones import BACKBONES, TIMM, find
from service.config import BadConfig, Config, flag, is_loopback, shown, variable

FILE_VARIABLE: Final = "GRAFT_CONFIG"
PRECEDENCE: Final = (
    "Each flag is also an environment variable, GRAFT_ and its name in capitals, and a key of the "
    "TOML file that --config or GRAFT_CONFIG names: its name with _ for -, a list as an array. A "
    "flag wins over a variable, and a variable over the file."
)
"""How settings are given, for people."""
_CLIENT_VARIABLES: Final = {"GRAFT_SERVER", "GRAFT_TOKEN"}
_CLOSE: Final = 0.7
"""How like a setting's name a wrong one must be to be taken for it."""
_SETTINGS: Final = {setting.name: setting for setting in fields(Config)}


def add_flags(
    parser: argparse.ArgumentParser, names: Collection[str] = frozenset(_SETTINGS)
) -> None:
    """Adds --config and a flag for each of the settings; `load` looks at what they say."""
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings (GRAFT_CONFIG)")
    for name, setting in _SETTINGS.items():
        if name in names:
            parser.add_argument(
                flag(name),
                metavar=_metavar(setting.type),
                help=f"{setting.metadata['text']} (default: {shown(setting.default)})",
            )


def load(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Config:
    """Returns the settings, or raises BadConfig.

    `flags` are what a parser with `add_flags` found; None means that one was not given.
    """
    config = load_only(_SETTINGS, flags, environment)
    if config.max_images > config.max_queue:
        raise BadConfig(
            f"--max-images is {config.max_images}, more than --max-queue, {config.max_queue}: "
            "a call of so many images would be refused for ever"
        )
    _check_access(config)
    _check_folders(config)
    return config


def load_only(
    names: Collection[str], flags: Mapping[str, Any], environment: Mapping[str, str]
) -> Config:
    """Returns settings of which these alone are read; the others are the defaults.

    For commands that need no others: what they say need not fit this command. Raises BadConfig.
    """
    values: dict[str, Any] = {}
    for key, name, value in _of_file(flags, environment):
        if name in names:
            values[name] = _checked(key, value, _SETTINGS[name])
    texts = [*_of_environment(environment)]
    texts += [(flag(name), name, flags[name]) for name in _SETTINGS if flags.get(name) is not None]
    for key, name, text in texts:
        if name in names:
            setting = _SETTINGS[name]
            values[name] = _checked(key, _of_text(key, text, setting), setting)
    return Config(**values)


def _of_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yields each setting: how a message calls it, its name, its value."""
    for key, text in environment.items():
        if not key.startswith("GRAFT_") or key in _CLIENT_VARIABLES or key == FILE_VARIABLE:
            continue
        name = key.removeprefix("GRAFT_").lower()
        if key != variable(name) or name not in _SETTINGS:
            raise BadConfig(f"the environment holds {key}, {_no_setting(name, variable)}")
        yield key, name, text


def _of_file(
    flags: Mapping[str, Any], environment: Mapping[str, str]
) -> Iterator[tuple[str, str, Any]]:
    """Yields each setting of the file that is named, as `_of_environment`."""
    key, given = "--config", flags.get("config")
    if given is None:
        key, given = FILE_VARIABLE, environment.get(FILE_VARIABLE)
    if given is None:
        return
    try:
        with Path(given).open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise BadConfig(f"{key} names {given!r}, which cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BadConfig(f"{given} is not TOML: {error}") from None
    for name, value in table.items():
        if name not in _SETTINGS:
            if isinstance(value, dict):
                raise BadConfig(
                    f"{given} holds the table [{name}]: settings stand at top level, without a "
                    "table"
                )
            raise BadConfig(f"{given} holds {name}, {_no_setting(name, str)}")
        yield f"{given}: {name}", name, value


def _no_setting(name: str, spelt: Callable[[str], str]) -> str:
    near = difflib.get_close_matches(name.lower(), _SETTINGS, n=1, cutoff=_CLOSE)
    hint = f"did you mean {spelt(near[0])}?" if near else "`graft-server run --help` lists all"
    return f"which is not a setting; {hint}"


def _check_access(config: Config) -> None:
    if (config.tls_cert_file is None) != (config.tls_key_file is None):
        given, missing = "--tls-cert-file", "--tls-key-file"
        if config.tls_cert_file is None:
            given, missing = missing, given
        raise BadConfig(f"{given} is set and {missing} is not: TLS needs both")
    if config.tls_client_ca_file and config.tls_cert_file is None:
        raise BadConfig(
            "--tls-client-ca-file is set without --tls-cert-file and --tls-key-file: clients show "
            "certificates over TLS alone"
        )
    is_guarded = config.access_file or config.tls_client_ca_file
    if not is_guarded and config.allow_unauthenticated == "no" and not is_loopback(config.host):
        raise BadConfig(
            f"--host is {config.host}, which other machines may reach, and nothing says who may "
            "call: anybody could train, read and delete. Set --access-file to a file of tokens "
            "(`graft-server tokens create` makes one; docs/how-to/access.md), or "
            "--tls-client-ca-file to let in those who show a certificate, or "
            "--allow-unauthenticated yes if all who reach the address may do everything, or --host "
            "127.0.0.1 (each is also a GRAFT_ variable, and a key of the configuration file)"
        )


def _check_folders(config: Config) -> None:
    data_dir = config.data_dir.resolve()
    for folder in config.allowed_dirs:
        if folder.is_relative_to(data_dir) or data_dir.is_relative_to(folder):
            raise BadConfig(
                f"--allowed-dirs names {str(folder)!r}, which overlaps --data-dir, "
                f"{str(data_dir)!r}: jobs could read everybody's datasets there; keep the "
                "images in a folder apart"
            )


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return {int: "N", float: "X", str: "TEXT"}.get(kind, "PATH")


def _of_text(key: str, text: str, setting: Any) -> Any:
    """Returns what a text stands for, as TOML would have it."""
    if separator := setting.metadata["separator"]:
        return [part for part in text.split(separator) if part]
    if setting.type in (int, float):
        try:
            return setting.type(text)
        except ValueError:
            raise BadConfig(f"{key} is {text!r}; it must be {_noun(setting)}") from None
    return text


def _checked(key: str, value: Any, setting: Any) -> Any:
    """Returns the value of a setting; raises BadConfig for one of a wrong type, or none of it."""
    kind = setting.type
    if not _is_of_type(value, setting):
        raise BadConfig(f"{key} is {_as_toml(value)}; it must be {_noun(setting)}")
    if kind in (int, float):
        low, high = setting.metadata["low"], setting.metadata["high"]
        # Written so that NaN fails, too.
        if not (low is None or value >= low) or not (high is None or value <= high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise BadConfig(f"{key} is {value}; it must be {bounds}")
        return kind(value)
    if setting.name == "allowed_dirs":
        return tuple(_folder(key, Path(part)) for part in value)
    if separator := setting.metadata["separator"]:
        return separator.join(value)
    if not value:
        raise BadConfig(f"{key} is empty")
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise BadConfig(f"{key} is {value!r}; it must be one of {', '.join(get_args(kind))}")
    if setting.name == "default_backbone" and find(value) is None:
        known = ", ".join(BACKBONES)
        raise BadConfig(f"{key} is {value!r}; it must be one of {known}, or {TIMM}NAME")
    return Path(value) if kind in (Path, Path | None) else value


def _folder(key: str, path: Path) -> Path:
    if not path.is_dir():
        raise BadConfig(
            f"{key} names {str(path)!r}, which is not a folder here: make it or mount it before "
            "the server starts, or leave it out"
        )
    return path.resolve()


def _is_of_type(value: Any, setting: Any) -> bool:
    if setting.metadata["separator"]:
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    if setting.type in (int, float):
        wanted = int if setting.type is int else int | float
        return isinstance(value, wanted) and not isinstance(value, bool)
    return isinstance(value, str)


def _noun(setting: Any) -> str:
    if setting.metadata["separator"]:
        return "an array of texts"
    if get_origin(setting.type) is Literal:
        return f"one of {', '.join(get_args(setting.type))}, in quotes"
    return {int: "a whole number", float: "a number"}.get(setting.type, "a text in quotes")


def _as_toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
