"""Lists: what they show, how much of it, and how it is laid out in a pipe and on a terminal."""

import json
import os
import sys
from datetime import datetime

import graftml
import pytest
from graftml.cli import _layout, _listing
from graftml.testing import FakeGraft

from tests.client.conftest import Run

COLUMNS = ("job", "model", "time", "progress")
JOB = ("job-01a22e109a8a-ae6a4721b498d3d1", "ants", "0:28", "one of 63 files cannot be read")


def start(server: FakeGraft, *jobs: tuple[str, dict[str, str]]) -> None:
    with graftml.Client(server.target) as client:
        for model, labels in jobs:
            client.fine_tune(graftml.ServerPath("/x"), model, labels=labels)


def laid_out(*rows: tuple[str, ...], width: int | None, is_prose: bool = True) -> list[str]:
    return list(_layout.table(COLUMNS, rows, width, is_prose=is_prose))


def test_in_a_pipe_each_row_is_one_line_and_nothing_follows_it() -> None:
    assert laid_out(JOB, ("job-2", "a longer name", "-", ""), width=None) == [
        "job                                model          time  progress",
        "job-01a22e109a8a-ae6a4721b498d3d1  ants           0:28  one of 63 files cannot be read",
        "job-2                              a longer name  -",
    ]
    assert laid_out(width=None) == []


def test_wide_characters_take_two_columns() -> None:
    heads, *rows = laid_out(("日本", "m", "t", "p"), ("abcd", "m", "t", "p"), width=None)
    assert heads.index("model") == 6
    assert rows == ["日本  m      t     p", "abcd  m      t     p"]


def test_prose_is_broken_at_its_spaces_where_there_is_room_for_it() -> None:
    assert laid_out(JOB, width=74) == [
        "job                                model  time  progress",
        "job-01a22e109a8a-ae6a4721b498d3d1  ants   0:28  one of 63 files cannot be",
        " " * 48 + "read",
    ]


@pytest.mark.parametrize(
    ("width", "below"),
    [
        (60, ["model: ants  time: 0:28", "progress: one of 63 files cannot be read"]),
        (40, ["model: ants  time: 0:28", "progress: one of 63 files cannot be", "read"]),
        (20, ["model: ants", "time: 0:28", "progress: one of", "63 files cannot be", "read"]),
    ],
)
def test_on_a_narrow_terminal_cells_stand_below_their_row(width: int, below: list[str]) -> None:
    assert laid_out(JOB, width=width) == [JOB[0], *(f"  {line}" for line in below)]


def test_a_column_without_a_value_goes_before_rows_are_stacked() -> None:
    assert laid_out((*JOB[:3], "-"), width=46) == [
        "job                                model  time",
        "job-01a22e109a8a-ae6a4721b498d3d1  ants   0:28",
    ]
    assert laid_out((*JOB[:3], "-"), width=45) == [JOB[0], "  model: ants  time: 0:28"]


def test_rows_are_laid_out_as_they_come() -> None:
    taken = 0

    def rows() -> object:
        nonlocal taken
        for taken in range(10_000):  # noqa: B007 - read outside
            yield ("1", "2", "3", "4")

    lines = _layout.table(COLUMNS, rows(), None, is_prose=False)  # type: ignore[arg-type]
    next(lines)
    assert taken < 200
    assert len(list(lines)) == 10_000


def test_a_things_fields_are_a_line_each(run: Run, server: FakeGraft) -> None:
    server.add_model("pets", classes=["cat", "dog"])
    out = run("models", "get", "pets")[1]
    told = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert told["aliases.latest"] == "1"
    assert told["classes"] == "cat, dog"
    assert told["accuracy"].startswith("1.000 [")
    out = run("models", "get", "pets:1")[1]
    assert "\nclasses " in out
    assert "manifest" not in out
    assert "{" not in out
    start(server, ("pets", {"team": "blue"}))
    out = run("jobs", "get", "job-1")[1]
    assert [line.split() for line in out.splitlines() if "team" in line] == [
        ["request.labels.team", "blue"]
    ]


def test_a_terminal_is_asked_for_its_width(
    run: Run, server: FakeGraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(server, ("pets", {}))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setitem(os.environ, "COLUMNS", "40")
    monkeypatch.setitem(os.environ, "LINES", "20")
    out = run("jobs")[1]
    assert out.splitlines()[0] == "job-1"
    assert max(map(len, out.splitlines())) <= 40


def test_times_have_their_zone(run: Run, server: FakeGraft) -> None:
    server.add_model("pets")
    out = run("models")[1].splitlines()[1]
    assert datetime.strptime(out.split("  ")[-1], "%Y-%m-%d %H:%M:%S %z").tzinfo is not None


def test_jobs_are_filtered_by_state_model_and_label(run: Run, server: FakeGraft) -> None:
    blue = {"team": "blue"}
    start(server, ("cats", blue), ("dogs", {**blue, "site": "1"}), ("dogs", {"team": "red"}))

    def ids(*options: str) -> list[str]:
        out = run("jobs", *options, "--json")[1]
        return [json.loads(line)["job_id"] for line in out.splitlines()]

    assert ids("--label", "team=blue") == ["job-2", "job-1"]
    assert ids("--label", "team=blue", "list", "--label", "site=1") == ["job-2"]
    assert ids("--label", "team=blue", "--model", "cats", "--state", "succeeded") == ["job-1"]
    assert ids("--state", "failed") == []
    assert run("jobs", "--state", "failed") == (0, "", "graft: no jobs\n")
    assert "'team' is not KEY=VALUE" in run("jobs", "--label", "team")[2]


def test_models_versions_and_datasets_are_filtered(
    run: Run, server: FakeGraft, folder: object
) -> None:
    start(server, ("cats", {"team": "blue"}), ("cows", {"team": "red"}), ("cats", {"team": "red"}))
    server.add_model("dogs")

    def told(field: str, *arguments: object) -> list[object]:
        out = run(*arguments, "--json")[1]
        return [json.loads(line)[field] for line in out.splitlines()]

    assert told("name", "models", "--name", "c") == ["cats", "cows"]
    assert told("name", "models", "--label", "team=red") == ["cats", "cows"]
    assert told("name", "models", "--label", "team=blue", "--name", "c") == ["cats"]
    assert told("version", "models", "versions", "cats", "--label", "team=red") == [2]
    run("datasets", "upload", folder, "--name", "mine")
    assert told("display_name", "datasets", "--name", "m") == ["mine"]
    assert told("display_name", "datasets", "--name", "y") == []


def test_people_see_as_many_as_they_want_and_hear_that_there_are_more(
    run: Run, server: FakeGraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        server.add_model(f"model-{number}")
    monkeypatch.setattr(_listing, "_SHOWN", 4)
    more = "graft: there are more models than these {}: see --limit and --all\n"
    code, out, err = run("models")
    assert (code, len(out.splitlines()), err) == (0, 5, more.format(4))
    assert len(run("models", "--all")[1].splitlines()) == 7
    assert run("models", "--limit", 6)[2] == ""
    _, out, err = run("models", "--limit", 2, "list")
    assert (len(out.splitlines()), err) == (3, more.format(2))
    # Programs are not cut short unasked.
    assert len(run("models", "--json")[1].splitlines()) == 6
    assert len(run("models", "--json", "--limit", 2)[1].splitlines()) == 2
    assert run("models", "--limit", 0)[0] == 2
    assert run("models", "--limit", 2, "--all")[0] == 2
