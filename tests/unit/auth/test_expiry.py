"""Tokens that expire: refused from then on, and warned about before."""

import logging
from pathlib import Path

import pytest

from service.auth import access_file
from service.auth.authenticator import TokenAuthenticator
from service.auth.reload import BadFile
from service.errors import Reason, Unauthenticated
from service.ops.metrics import Metrics
from tests.unit.auth.test_authenticator import PREDICT, SECRET, Clock, bearer, entry, write

DAY_S = 24 * 3600.0
JANUARY_S = 1_798_761_600.0
"""2027-01-01T00:00:00Z."""
CONTENT = (
    "[tenants.acme]\n"
    + entry("ci", "acme", "predict")
    + "expires = 2027-01-01T01:00:00+01:00\n"
    + entry("other", "acme", "predict")
)


@pytest.fixture
def now() -> Clock:
    clock = Clock()
    clock.now = JANUARY_S - 30 * DAY_S
    return clock


@pytest.fixture
def metrics() -> Metrics:
    return Metrics({"version": "1"})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "access.toml"
    write(path, CONTENT)
    return path


@pytest.fixture
def authenticator(file: Path, metrics: Metrics, now: Clock) -> TokenAuthenticator:
    return TokenAuthenticator(file, (), metrics, now=now)


def next_expiry(metrics: Metrics) -> float | None:
    name = "graft_token_next_expiry_timestamp_seconds"
    return metrics.registry.get_sample_value(name)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_an_expired_token_is_refused_and_others_are_not(
    authenticator: TokenAuthenticator, now: Clock
) -> None:
    principal = authenticator.admit(PREDICT, bearer("ci"))
    now.now = JANUARY_S - 1
    authenticator.admit(PREDICT, bearer("ci"))
    authenticator.recheck(PREDICT, principal)
    now.now = JANUARY_S
    for refused in (
        lambda: authenticator.admit(PREDICT, bearer("ci")),
        lambda: authenticator.recheck(PREDICT, principal),
    ):
        with pytest.raises(
            Unauthenticated, match=r"expired on 2027-01-01 00:00 UTC: ask"
        ) as caught:
            refused()
        assert caught.value.reason is Reason.TOKEN_EXPIRED
    other = authenticator.admit(PREDICT, bearer("other"))
    authenticator.recheck(PREDICT, other)


def test_that_a_token_has_expired_is_said_to_its_owner_alone(
    authenticator: TokenAuthenticator, now: Clock
) -> None:
    now.now = JANUARY_S
    with pytest.raises(Unauthenticated) as caught:
        authenticator.admit(PREDICT, bearer("ci", "x" * 43))
    assert caught.value.reason is Reason.TOKEN_UNKNOWN


def test_a_poll_reports_an_expiry_once_so_that_calls_that_go_on_are_rechecked(
    authenticator: TokenAuthenticator, now: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    assert not authenticator.poll()
    now.now = JANUARY_S
    assert authenticator.poll()
    assert not authenticator.poll()
    assert warnings(caplog) == ["the token ci has expired: its calls are refused"]


def test_a_later_expiry_counts_for_calls_that_go_on(
    authenticator: TokenAuthenticator, file: Path, now: Clock
) -> None:
    principal = authenticator.admit(PREDICT, bearer("ci"))
    write(file, CONTENT.replace("2027-01-01", "2028-01-01"))
    authenticator.poll()
    now.now = JANUARY_S
    authenticator.recheck(PREDICT, principal)
    # An earlier one too.
    write(file, CONTENT.replace("2027-01-01", "2026-01-01"))
    authenticator.poll()
    with pytest.raises(Unauthenticated):
        authenticator.recheck(PREDICT, principal)


def test_a_coming_expiry_is_warned_of_once_and_stands_in_the_metrics(
    authenticator: TokenAuthenticator,
    file: Path,
    metrics: Metrics,
    now: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert next_expiry(metrics) == JANUARY_S
    now.now = JANUARY_S - 7 * DAY_S - 1
    authenticator.poll()
    assert warnings(caplog) == []
    now.now += 1
    for _ in range(3):
        authenticator.poll()
    (warning,) = warnings(caplog)
    assert "the token ci expires on 2027-01-01 00:00 UTC: give its owner another" in warning
    # Another expiry is another warning.
    write(file, CONTENT.replace("2027-01-01", "2026-12-31"))
    authenticator.poll()
    assert len(warnings(caplog)) == 2
    assert next_expiry(metrics) == JANUARY_S - DAY_S
    # What has expired is not what expires next.
    now.now = JANUARY_S
    authenticator.poll()
    assert next_expiry(metrics) == float("inf")


def test_a_server_that_starts_with_an_expired_token_says_so_and_serves_the_others(
    file: Path, metrics: Metrics, now: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    now.now = JANUARY_S + DAY_S
    authenticator = TokenAuthenticator(file, (), metrics, now=now)
    authenticator.admit(PREDICT, bearer("other"))
    assert warnings(caplog) == ["the token ci has expired: its calls are refused"]


@pytest.mark.parametrize("value", ["2027-01-01", "2027-01-01T00:00:00", '"soon"', "3"])
def test_an_expiry_that_is_no_time_is_refused_and_the_form_is_shown(file: Path, value: str) -> None:
    write(file, f"[tenants.acme]\n{entry('ci', 'acme', 'predict')}expires = {value}\n")
    with pytest.raises(BadFile, match=r"`expires`, as in expires = 2027-01-31T00:00:00Z") as caught:
        access_file.read(file, ())
    assert SECRET not in str(caught.value)
