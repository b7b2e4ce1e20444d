"""The `graft` command: everything that the service does, from a shell.

The exit codes are `Code`'s. Errors are one line on standard error. The only reader of
the client's own variables, GRAFT_SERVER and GRAFT_TOKEN.
"""

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc

from graftml._channel import is_loopback
from graftml._outcomes import JobCancelled, JobFailed
from graftml.cli._arguments import Arguments, Usage, parse
from graftml.cli._codes import Code
from graftml.cli._commands import in_commands
from graftml.cli._output import Output, RichMissing, complain, warn
from graftml.client import Client
from graftml.errors import GraftError, InvalidArgument


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    _escape_what_cannot_be_shown()
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except SystemExit as ended:  # argparse: --help, --version, wrong usage
        return ended.code if isinstance(ended.code, int) else Code.USAGE
    except KeyboardInterrupt:
        return complain("interrupted", Code.INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter must not flush into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Code.REFUSED
    except (Usage, RichMissing, GraftError, OSError) as error:
        return complain(_line(error), _code(error))


def _escape_what_cannot_be_shown() -> None:
    """Shows a label that the output's encoding lacks as \\u65e5, rather than end the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run(argv: Sequence[str]) -> int:
    arguments = parse(argv, os.environ)
    output = Output(is_json=arguments.json, is_quiet=arguments.quiet)
    with _connect(arguments) as client:
        code: int = arguments.run(client, arguments, output)
        return code


def _code(error: Exception) -> int:
    if isinstance(error, JobFailed | JobCancelled):
        return Code.JOB_FAILED
    # What is left is this machine's: bad arguments, and files that are not there.
    return Code.REFUSED if isinstance(error, GraftError) else Code.USAGE


def _line(error: Exception) -> str:
    if isinstance(error, GraftError):
        message = in_commands(error.message)
        return f"{message} [{error.reason}]" if error.reason else message
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _connect(arguments: Arguments) -> Client:
    credentials = None
    if arguments.tls or arguments.tls_ca or arguments.tls_cert:
        authority, key, certificate = (
            Path(file).read_bytes() if file else None
            for file in (arguments.tls_ca, arguments.tls_key, arguments.tls_cert)
        )
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    elif arguments.token and not is_loopback(arguments.server):
        warn(f"the token travels to {arguments.server} unencrypted: use --tls")
    try:
        return Client(
            arguments.server,
            timeout_s=arguments.timeout,
            credentials=credentials,
            token=arguments.token,
        )
    except InvalidArgument as error:
        raise Usage(error.message) from error
