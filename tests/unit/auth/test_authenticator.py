"""The access file, tokens and calls per second, without a socket."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from service.auth import access_file
from service.auth.authenticator import Metadata, TokenAuthenticator
from service.auth.principal import Principal, Quota
from service.auth.reload import BadFile
from service.errors import NotAllowed, OverQuota, Reason, Unauthenticated
from service.ops.metrics import Metrics

SECRET = "s" * 43
PREDICT = "/graft.v1.PredictionService/Predict"


def entry(token_id: str, tenant: str, *given: str, secret: str = SECRET) -> str:
    return (
        f'[[tokens]]\nid = "{token_id}"\nsha256 = "{access_file.digest(secret)}"\n'
        f'tenant = "{tenant}"\nroles = {list(given)}\n'
    )


GOOD = (
    "[tenants.acme]\ncalls_per_second = 2\nconcurrent_jobs = 3\nstored_mb = 5\n"
    "[tenants.zoo]\n" + entry("ci", "acme", "predict", "train") + entry("boss", "zoo", "admin")
)


def write(path: Path, content: str) -> None:
    """As an operator should: another file in its place."""
    new = path.with_suffix(".new")
    new.write_text(content)
    new.chmod(0o600)
    new.replace(path)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "access.toml"
    write(path, GOOD)
    return path


@pytest.fixture
def metrics() -> Metrics:
    return Metrics({"version": "1"})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authenticator(file: Path, metrics: Metrics, clock: Clock) -> TokenAuthenticator:
    return TokenAuthenticator(file, (), metrics, clock=clock)


def bearer(token_id: str, secret: str = SECRET) -> Metadata:
    return header(f"Bearer graft_{token_id}_{secret}")


def header(value: str | bytes) -> Metadata:
    return [("authorization", value)]


# The file


def test_a_file_gives_callers_with_their_tenants_roles_and_quotas(file: Path) -> None:
    found = access_file.read(file, ())
    quota = Quota(2.0, 3, 5 * 2**20, rankings=2)
    assert found.tokens["ci"].principal == Principal(
        "ci", "acme", frozenset({"predict", "train"}), quota
    )
    assert found.tokens["boss"].principal == Principal(
        "boss", "zoo", frozenset({"admin"}), Quota(rankings=2)
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[tenants.a\n", "it is not TOML: .*line 1"),
        ("", "it is empty"),
        ("[teants.a]\n", "the key 'teants' is not known"),
        ("tenants = 3\n", "tenants must be tables"),
        ("[tokens]\n", "tokens must be an array"),
        ("[tenants.a]\ncalls = 3\n", r"\[tenants.a\]: .*`calls`; it may hold calls_per_second"),
        ("[tenants.a]\ncalls_per_second = 0\n", r"\[tenants.a\]: .*`calls_per_second`"),
        ("[tenants.a]\nconcurrent_jobs = -1\n", r"\[tenants.a\]: .*`concurrent_jobs`"),
        ('[tenants.a]\nstored_mb = "5"\n', r"\[tenants.a\]: .*`stored_mb`"),
        ('[tenants."a/b"]\n', r"\[tenants.a/b\]: .*is not a name"),
        (entry("x", "nobody", "train"), r"there is no tenant 'nobody'; add \[tenants.nobody\]"),
        (
            "[tenants.a]\n" + entry("x", "a", "train") * 2,
            "number 2, id 'x': another token has this",
        ),
        ("[tenants.a]\n" + entry("x", "a", "root"), r"\[\[tokens\]\] number 1: .*`roles"),
        ("[tenants.a]\n" + entry("x", "a"), "`roles`"),
        ("[tenants.a]\n" + entry("x_y", "a", "train"), "`id`"),
        (
            '[tenants.a]\n[[tokens]]\nid = "x"\ntenant = "a"\nroles = ["train"]\n',
            "missing required field `sha256`",
        ),
    ],
)
def test_a_bad_file_is_refused_and_the_key_named(file: Path, content: str, says: str) -> None:
    write(file, content)
    with pytest.raises(BadFile, match=says) as caught:
        access_file.read(file, ())
    assert str(file) in str(caught.value)


def test_a_token_written_where_its_hash_belongs_is_not_told(file: Path) -> None:
    secret = "t" * 43
    for key in ("sha256", "token"):
        write(file, f'[tenants.a]\n[[tokens]]\n{key} = "graft_x_{secret}"\nid = "x"\n')
        with pytest.raises(BadFile) as caught:
            access_file.read(file, ())
        assert secret not in str(caught.value)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(BadFile, match=r"can be written by others.*chmod go-w"):
        access_file.read(file, ())


def test_a_file_that_is_not_there_is_named(tmp_path: Path, metrics: Metrics) -> None:
    with pytest.raises(BadFile, match=r"nowhere\.toml cannot be read: No such file"):
        TokenAuthenticator(tmp_path / "nowhere.toml", (), metrics)


# Who calls


def test_a_token_admits_its_principal(authenticator: TokenAuthenticator) -> None:
    who = authenticator.admit(PREDICT, bearer("boss"))
    assert (who.name, who.tenant) == ("boss", "zoo")
    unusual = f"bearer  graft_boss_{SECRET} "
    assert authenticator.admit(PREDICT, header(unusual)) == who
    assert authenticator.admit(PREDICT, header(unusual.encode())) == who


@pytest.mark.parametrize("metadata", [[], header(""), [("other", "x")]])
def test_without_a_token_nobody_gets_in(
    authenticator: TokenAuthenticator, metadata: Metadata
) -> None:
    with pytest.raises(Unauthenticated, match="authorization: Bearer TOKEN") as caught:
        authenticator.admit(PREDICT, metadata)
    assert caught.value.reason is Reason.TOKEN_MISSING


def test_unknown_ids_wrong_secrets_and_nonsense_are_answered_alike(
    authenticator: TokenAuthenticator,
) -> None:
    texts = set()
    for metadata in (
        bearer("nobody"),
        bearer("ci", "x" * 43),
        bearer("ci", SECRET + "s"),
        bearer("boss", "x" * 43),
        bearer("", SECRET),
        header("Basic abc"),
        header("Bearer"),
        header(f"Bearer graft_ci_{SECRET}\n"[:-10]),
        header(b"\xff\xfe"),
    ):
        with pytest.raises(Unauthenticated) as caught:
            authenticator.admit(PREDICT, metadata)
        assert caught.value.reason is Reason.TOKEN_UNKNOWN
        texts.add(caught.value.message)
    assert len(texts) == 1


def test_a_secret_is_compared_for_unknown_ids_too(
    authenticator: TokenAuthenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        access_file.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b
    )
    for metadata in (bearer("nobody"), bearer("ci", "x" * 43), header("junk")):
        with pytest.raises(Unauthenticated):
            authenticator.admit(PREDICT, metadata)
    assert [len(a) for a, _ in compared] == [len(b) for _, b in compared] == [64] * 3


def test_nobodys_hash_lets_nobody_in(
    authenticator: TokenAuthenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if a secret were found whose hash is all zeros.
    monkeypatch.setattr(access_file, "digest", lambda secret: "0" * 64)
    with pytest.raises(Unauthenticated):
        authenticator.admit(PREDICT, bearer("nobody"))


# Calls per second


def test_a_tenant_gets_its_calls_per_second_and_is_told_when_to_come_back(
    authenticator: TokenAuthenticator, clock: Clock
) -> None:
    for _ in range(2):
        authenticator.admit(PREDICT, bearer("ci"))
    with pytest.raises(OverQuota, match="acme may make 2 calls a second") as caught:
        authenticator.admit(PREDICT, bearer("ci"))
    assert caught.value.subject == "calls_per_second"
    assert caught.value.retry_after_s == pytest.approx(0.5)
    clock.now += 0.5
    authenticator.admit(PREDICT, bearer("ci"))
    with pytest.raises(OverQuota):
        authenticator.admit(PREDICT, bearer("ci"))
    # Time that nobody used is not saved up beyond a second's calls.
    clock.now += 3600
    for _ in range(2):
        authenticator.admit(PREDICT, bearer("ci"))
    with pytest.raises(OverQuota):
        authenticator.admit(PREDICT, bearer("ci"))


def test_tenants_do_not_share_a_bucket_but_a_tenants_tokens_do(
    file: Path, metrics: Metrics, clock: Clock
) -> None:
    write(file, GOOD + entry("second", "acme", "predict"))
    authenticator = TokenAuthenticator(file, (), metrics, clock=clock)
    authenticator.admit(PREDICT, bearer("ci"))
    authenticator.admit(PREDICT, bearer("second"))
    with pytest.raises(OverQuota):
        authenticator.admit(PREDICT, bearer("second"))
    for _ in range(100):
        authenticator.admit(PREDICT, bearer("boss"))


def test_less_than_a_call_a_second_still_lets_one_through(
    file: Path, metrics: Metrics, clock: Clock
) -> None:
    write(file, GOOD.replace("calls_per_second = 2", "calls_per_second = 0.1"))
    authenticator = TokenAuthenticator(file, (), metrics, clock=clock)
    authenticator.admit(PREDICT, bearer("ci"))
    with pytest.raises(OverQuota) as caught:
        authenticator.admit(PREDICT, bearer("ci"))
    assert caught.value.retry_after_s == pytest.approx(10.0)
    clock.now += 10
    authenticator.admit(PREDICT, bearer("ci"))


def test_calls_that_are_not_let_in_cost_the_tenant_nothing(
    authenticator: TokenAuthenticator,
) -> None:
    for _ in range(10):
        with pytest.raises(Unauthenticated):
            authenticator.admit(PREDICT, bearer("ci", "x" * 43))
        with pytest.raises(NotAllowed):
            authenticator.admit("/graft.v1.ModelService/DeleteModel", bearer("ci"))
    authenticator.admit(PREDICT, bearer("ci"))


def test_further_requests_of_a_stream_wait_for_the_tenants_bucket(
    authenticator: TokenAuthenticator, file: Path, clock: Clock
) -> None:
    who = authenticator.admit(PREDICT, bearer("ci"))
    assert authenticator.wait_s(who) == 0
    assert authenticator.wait_s(who) == pytest.approx(0.5)
    clock.now += 0.5
    assert authenticator.wait_s(who) == 0
    assert authenticator.wait_s(authenticator.admit(PREDICT, bearer("boss"))) == 0
    # The bound that is in force, not the one that the stream began with.
    write(file, GOOD.replace("calls_per_second = 2", "calls_per_second = 0.1"))
    authenticator.poll()
    assert authenticator.wait_s(who) == pytest.approx(10)


# Reading the file again


def reloads(metrics: Metrics, outcome: str) -> float:
    labels = {"what": "access_file", "outcome": outcome}
    return metrics.registry.get_sample_value("graft_reloads_total", labels) or 0


def failing(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("graft_reload_failing", {"what": "access_file"})


def test_a_changed_file_counts_at_once_and_buckets_go_on(
    authenticator: TokenAuthenticator, file: Path, metrics: Metrics
) -> None:
    for _ in range(2):
        authenticator.admit(PREDICT, bearer("ci"))
    write(file, GOOD + entry("new", "zoo", "predict"))
    authenticator.poll()
    assert authenticator.admit(PREDICT, bearer("new")).tenant == "zoo"
    with pytest.raises(OverQuota):
        authenticator.admit(PREDICT, bearer("ci"))
    write(file, "[tenants.zoo]\n" + entry("boss", "zoo", "admin"))
    authenticator.poll()
    with pytest.raises(Unauthenticated):
        authenticator.admit(PREDICT, bearer("ci"))
    assert reloads(metrics, "ok") == 2


def test_a_file_that_did_not_change_is_not_read(
    authenticator: TokenAuthenticator, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_file, "read", lambda *_: pytest.fail("was read"))
    authenticator.poll()
    assert reloads(metrics, "ok") == 0


@pytest.mark.parametrize("damage", ["[tenants.", "", "others", "gone"])
def test_a_file_that_cannot_be_used_is_reported_once_and_the_old_one_stays(
    authenticator: TokenAuthenticator,
    file: Path,
    metrics: Metrics,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    if damage == "gone":
        file.unlink()
    elif damage == "others":
        file.chmod(0o666)
    else:
        write(file, damage)
    for _ in range(3):
        authenticator.poll()
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1
    assert (
        "the new access file cannot be used, the one before stays in force: "
        in errors[0].getMessage()
    )
    assert (reloads(metrics, "failed"), failing(metrics)) == (1, 1)
    assert authenticator.admit(PREDICT, bearer("ci")).name == "ci"
    # Once fixed, the very file from before counts again, and further damage is reported.
    write(file, GOOD)
    authenticator.poll()
    assert (reloads(metrics, "ok"), failing(metrics)) == (1, 0)
    os.truncate(file, 10)
    for _ in range(2):
        authenticator.poll()
    assert reloads(metrics, "failed") == 2


def test_a_file_that_is_seen_half_written_is_not_reported(
    authenticator: TokenAuthenticator,
    file: Path,
    metrics: Metrics,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for content in ("[tenants.", GOOD + "[[tok", GOOD + entry("new", "zoo", "predict")):
        write(file, content)
        authenticator.poll()
    assert authenticator.admit(PREDICT, bearer("new")).tenant == "zoo"
    assert (reloads(metrics, "failed"), failing(metrics)) == (0, 0)
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_reprs_tell_no_hash(authenticator: TokenAuthenticator, file: Path) -> None:
    shown = repr(access_file.read(file, ())) + repr(vars(authenticator))
    assert access_file.digest(SECRET) not in shown + repr(
        authenticator.admit(PREDICT, bearer("ci"))
    )


# Calls that go on


def test_a_caller_stays_while_its_token_does_whatever_else_changes(
    authenticator: TokenAuthenticator, file: Path
) -> None:
    who = authenticator.admit(PREDICT, bearer("ci"))
    authenticator.recheck(PREDICT, who)
    write(file, GOOD.replace("stored_mb = 5", "stored_mb = 6") + entry("x", "zoo", "train"))
    authenticator.poll()
    authenticator.recheck(PREDICT, who)


def test_a_server_is_shared_while_its_file_has_several_tenants(
    authenticator: TokenAuthenticator, file: Path
) -> None:
    shared = []
    for content in (
        "[tenants.acme]\n" + entry("ci", "acme", "predict"),
        "[tenants.acme]\n[tenants.zoo]\n" + entry("ci", "acme", "predict"),
    ):
        write(file, content)
        authenticator.poll()
        shared.append(authenticator.is_shared)
    assert shared == [False, True]


@pytest.mark.parametrize(
    "after",
    [
        GOOD.replace('id = "ci"', 'id = "new"'),
        "[tenants.acme]\n" + entry("ci", "acme", "predict", secret="n" * 43),
        "[tenants.zoo]\n" + entry("ci", "zoo", "predict"),
    ],
)
def test_a_caller_whose_token_was_taken_back_must_go(
    authenticator: TokenAuthenticator, file: Path, after: str
) -> None:
    who = authenticator.admit(PREDICT, bearer("ci"))
    write(file, after)
    authenticator.poll()
    with pytest.raises(Unauthenticated) as caught:
        authenticator.recheck(PREDICT, who)
    assert caught.value.reason is Reason.TOKEN_UNKNOWN


def test_a_caller_that_lost_its_role_must_go(authenticator: TokenAuthenticator, file: Path) -> None:
    who = authenticator.admit(PREDICT, bearer("ci"))
    write(file, "[tenants.acme]\n" + entry("ci", "acme", "train"))
    authenticator.poll()
    with pytest.raises(NotAllowed):
        authenticator.recheck(PREDICT, who)
