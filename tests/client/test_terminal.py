"""What people read: names of strangers are escaped, and the data are told with their classes."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import graftml
import pytest
from graftml import types
from graftml._display import escaped
from graftml.cli import main
from graftml.cli._output import Output
from graftml.cli._watching import data_lines
from graftml.testing import FakeGraft, data, published, running, succeeded
from graftml_stubs.v1 import dataset_pb2 as pb
from rich.console import Console

from tests.client.conftest import Run

EVIL = "a\x1b[2J\n\u202eb\x9b"
SAFE = r"a\x1b[2J\n\u202eb\x9b"


def is_clean(text: str) -> bool:
    return all(char == "\n" or escaped(char) == char for char in text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (EVIL, SAFE),
        ("half \udcff", r"half \udcff"),
        ("\u2028\u2029\u200f\u061c", r"\u2028\u2029\u200f\u061c"),
        # Words of other languages, and joiners, which they need.
        ("日本語 بچ\u200cش 👩\u200d🔬 c\u0327", "日本語 بچ\u200cش 👩\u200d🔬 c\u0327"),
    ],
)
def test_what_a_terminal_obeys_is_escaped(text: str, told: str) -> None:
    assert escaped(text) == told


def test_names_of_files_and_classes_are_escaped_for_people_alone(
    run: Run, server: FakeGraft, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = pb.LEFT_OUT_REASON_HIDDEN
    dataset = pb.Dataset(
        dataset_id="ds-1",
        image_count=6,
        classes=[pb.ClassCount(label=label, train_count=3) for label in (EVIL, "dog")],
        summary=pb.ReadSummary(
            seen_count=7,
            used_count=6,
            left_out=[pb.LeftOut(reason=hidden, label=EVIL, count=1)],
            left_out_files=[
                pb.LeftOutFile(
                    path=f"{EVIL}/.{EVIL}", label=EVIL, reason=hidden, detail="hidden file"
                )
            ],
        ),
    )
    server.answer("UploadDataset", pb.UploadDatasetResponse(dataset=dataset))
    code, out, err = run("datasets", "upload", folder)
    assert code == 0
    assert is_clean(out + err)
    assert r"\u202eb\x9b" in out
    assert f"  {SAFE}/.{SAFE}: hidden" in err
    script = [running(), data({EVIL: 3, "dog": 3}), published(), succeeded()]
    with FakeGraft(script=script) as trained:
        command = ["finetune", "server:/x", "--name", "pets", "--server", trained.target]
        assert main(command) == 0
    told = capsys.readouterr()
    assert is_clean(told.out + told.err)
    assert f"6 images of 2 classes ({SAFE}, dog)" in told.out
    code, out, _ = run("datasets", "upload", folder, "--json")
    assert [row["label"] for row in json.loads(out)["classes"]] == [EVIL, "dog"]


def test_messages_of_the_server_are_escaped(run: Run, server: FakeGraft) -> None:
    server.fail("GetModel", graftml.NotFound(f"no {EVIL}", reason="MODEL_NOT_FOUND"))
    code, _, err = run("models", "get", "pets")
    assert (code, err) == (1, r"graft: no a\x1b[2J \u202eb\x9b [MODEL_NOT_FOUND]" + "\n")


def test_the_bar_escapes_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    from graftml.cli._bar import Bar, Shown

    bar = Bar(Console(force_terminal=True, width=200, color_system=None))
    bar.start()
    bar.show(Shown("features", 0.5, EVIL))
    bar.print(EVIL)
    bar.stop()
    out = capsys.readouterr().out
    assert SAFE in out
    assert EVIL not in out
    assert "\u202e" not in out


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_page_is_escaped_on_a_terminal_and_whole_in_a_file(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    Output(is_json=True).document(EVIL)
    assert capsys.readouterr().out == (SAFE.replace(r"\n", "\n") if is_terminal else EVIL)


def told(*labels: str, warnings: tuple[str, ...] = ()) -> list[str]:
    counts = tuple(types.ClassCount(label, 1, 1) for label in labels)
    return data_lines(types.DataSummary(counts, types.ReadSummary(warnings=warnings), ""))


def test_the_line_on_the_data_names_the_classes_and_warnings_follow() -> None:
    assert told("ants", "bees", warnings=("one", "two")) == [
        "4 images of 2 classes (ants, bees)",
        "warning: one",
        "warning: two",
    ]
    assert told(*"abcdefgh") == ["16 images of 8 classes (a, b, c, d, e, f, g, h)"]
    assert told(*"abcdefghij") == ["20 images of 10 classes (a, b, c, d, e, f, g, h and 2 more)"]
    assert told() == ["0 images of 0 classes"]


def test_an_upload_tells_what_the_server_warns_of(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = graftml.Client.upload_dataset

    def warned(*args: Any, **options: Any) -> types.Dataset:
        dataset = upload(*args, **options)
        summary = dataclasses.replace(dataset.summary, warnings=("few images",))
        return dataclasses.replace(dataset, summary=summary)

    monkeypatch.setattr(graftml.Client, "upload_dataset", warned)
    code, out, err = run("datasets", "upload", folder, "--json")
    assert code == 0
    assert json.loads(err.splitlines()[-1]) == {"warning": "few images"}
    assert json.loads(out)["summary"]["warnings"] == ["few images"]


def test_a_hyperparameter_of_another_method_is_told_with_the_option(run: Run) -> None:
    code, _, err = run("finetune", "server:/x", "--name", "pets", "--target", "ds-1")
    assert code == 2
    assert "target is a hyperparameter of domain_adaptation" in err
    assert "set --method domain-adaptation" in err


def test_what_is_on_the_server_is_not_uploaded(run: Run, server: FakeGraft) -> None:
    code, _, err = run("datasets", "upload", "server:/x")
    assert (code, "server:/x lies on the server already" in err) == (2, True)
    assert "give it to `graft finetune` directly" in err
    assert not server.calls


@pytest.mark.parametrize("command", [["finetune", "--name", "pets"], ["rank"]])
def test_a_folder_that_is_named_like_a_dataset_is_pointed_to(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    code, _, err = run(*command, "ds-x")
    assert (code, "./ds-x" in err) == (1, False)
    folder.rename("ds-x")
    code, _, err = run(*command, "ds-x")
    assert (code, "[DATASET_NOT_FOUND]" in err) == (1, True)
    assert "; for what lies here, write ./ds-x" in err
    assert run(*command, "./ds-x")[0] == 0


def test_a_report_is_a_page_whatever_the_case_of_its_suffix(
    run: Run, server: FakeGraft, tmp_path: Path
) -> None:
    server.add_model("pets")
    page = tmp_path / "x.HTML"
    assert run("report", "pets", "-o", page)[0] == 0
    assert page.read_text().startswith("<!doctype html>")
