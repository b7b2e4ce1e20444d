"""The `graft` command: everything that the service does, from a shell.

The exit codes are `Code`'s. Errors are one line on standard error. The only reader of
the client's own variables, GRAFT_SERVER and GRAFT_TOKEN.
"""

import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc

from graftml import Client
from graftml._channel import is_loopback
from graftml._outcomes import JobCancelled, JobFailed
from graftml.cli._arguments import Arguments, Usage, parse
from graftml.cli._output import Code, Output, RichMissing, complain
from graftml.errors import GraftError, InvalidArgument


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    _escape_what_cannot_be_shown()
    argv = sys.argv[1:] if argv is None else argv
    # Also where the arguments cannot be read.
    is_json = "--json" in argv
    try:
        code = _run(argv)
        sys.stdout.flush()
    except SystemExit as ended:  # argparse: --help, --version
        return ended.code if isinstance(ended.code, int) else Code.USAGE
    except KeyboardInterrupt:
        return complain("interrupted", Code.INTERRUPTED, is_json=is_json)
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter must not flush into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Code.REFUSED
    except (Usage, RichMissing, GraftError, OSError) as error:
        return complain(error, _code(error), is_json=is_json)
    return code


def _escape_what_cannot_be_shown() -> None:
    """Shows a label that the output's encoding lacks as \\u65e5, rather than end the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run(argv: Sequence[str]) -> int:
    arguments = parse(argv, os.environ)
    output = Output(is_json=arguments.json, is_quiet=arguments.quiet)
    with _connect(arguments, output) as client:
        code: int = arguments.run(client, arguments, output)
        return code


def _code(error: Exception) -> Code:
    if isinstance(error, JobFailed | JobCancelled):
        return Code.JOB_FAILED
    # What is left is this machine's: bad arguments, and files that are not there.
    return Code.REFUSED if isinstance(error, GraftError) else Code.USAGE


def _connect(arguments: Arguments, output: Output) -> Client:
    credentials = None
    if arguments.tls or arguments.tls_ca or arguments.tls_cert:
        authority = _pem(arguments.tls_ca, "certificate")
        key = _pem(arguments.tls_key, "private key")
        certificate = _pem(arguments.tls_cert, "certificate")
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    elif arguments.token and not is_loopback(arguments.server):
        output.warn(f"the token travels to {arguments.server} unencrypted: use --tls")
    try:
        return Client(
            arguments.server,
            timeout_s=arguments.timeout,
            credentials=credentials,
            token=arguments.token,
        )
    except InvalidArgument as error:
        raise Usage(error.message) from error


def _pem(file: str | None, kind: str) -> bytes | None:
    """Reads a file, if any; raises Usage where none of this kind is in it: gRPC does not say so."""
    if file is None:
        return None
    content = Path(file).read_bytes()
    if not re.search(rf"-----BEGIN [A-Z0-9 ]*{kind.upper()}-----".encode(), content):
        raise Usage(f"{file} holds no {kind} (PEM)")
    return content
