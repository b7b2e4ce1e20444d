"""`graft predict`: which images it finds, and what it prints of each, in each form."""

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graftml
import grpc
import pytest
from graftml.cli import main
from graftml.cli._predicting import _UNDER_WAY
from graftml.testing import Answer, FakeGraft

from tests.client.conftest import Run


def answer(_model: str, image: Any) -> Answer:
    """Says what the image's bytes ask for."""
    if image.data.startswith(b"unlike"):
        return Answer({"cat": 0.9, "dog": 0.1}, 2.31)
    if image.data == b"doubtful":
        return Answer({"dog": 0.6, "cat": 0.4}, 0.5, label="")
    if image.data.startswith(b"dog"):
        return Answer({"dog": 0.7, "cat": 0.3}, 0.5)
    if image.data in (b"", b"broken"):
        raise graftml.InvalidArgument(
            "it is cut short",
            reason="IMAGE_UNREADABLE",
            code=grpc.StatusCode.INVALID_ARGUMENT,
        )
    return Answer({"cat": 0.9, "dog": 0.1}, 0.2)


@pytest.fixture
def predicting() -> Iterator[FakeGraft]:
    with FakeGraft(predict=answer) as server:
        server.add_model("pets")
        yield server


@pytest.fixture
def run(
    predicting: FakeGraft, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Runs `graft predict`, with these bytes on standard input."""

    def run(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(["predict", *map(str, arguments), "--server", predicting.target])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images at two depths, and what is none; it lies in the current one."""
    monkeypatch.chdir(tmp_path)
    files = {
        "b.JPG": b"cat",
        "a.png": b"dog",
        "notes.txt": b"cat",
        "sub/c.webp": b"unlike",
        "sub/deep/d.tiff": b"cat",
        "sub/Makefile": b"cat",
        ".hidden.jpg": b"cat",
        ".git/e.jpg": b"cat",
    }
    for name, data in files.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return Path("photos")


IN_ORDER = ["photos/a.png", "photos/b.JPG", "photos/sub/c.webp", "photos/sub/deep/d.tiff"]


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_a_folders_images_are_found_at_any_depth_in_the_order_of_their_names(
    run: Run, photos: Path
) -> None:
    code, out, err = run("pets", photos, "--json")
    assert code == 0
    assert [line["image"] for line in lines(out)] == IN_ORDER
    assert lines(err) == [{"note": "2 files were passed over, having no image's suffix"}]


def test_what_is_named_is_an_image_whatever_its_suffix(run: Run, photos: Path) -> None:
    code, out, err = run("pets", photos / "notes.txt", photos / ".hidden.jpg", "--json")
    assert (code, err) == (0, "")
    assert [line["label"] for line in lines(out)] == ["cat", "cat"]


def test_one_image_comes_on_standard_input(run: Run) -> None:
    code, out, _ = run("pets", "-", "--json", stdin=b"dog")
    [told] = lines(out)
    assert (code, told["image"], told["label"]) == (0, "-", "dog")
    code, _, err = run("pets", "-", stdin=b"")
    assert (code, err) == (1, "graft: -: it is cut short [IMAGE_UNREADABLE]\n")


def test_a_list_of_paths_names_images_and_folders(run: Run, photos: Path) -> None:
    listed = b"photos/b.JPG\r\n\nphotos/sub\n/no/such.jpg\nphotos/a.png"
    code, out, err = run("pets", "--files-from", "-", "--csv", stdin=listed)
    assert code == 1
    found = rows(out)
    assert [row["file"] for row in found] == [
        "photos/b.JPG", "photos/sub/c.webp", "photos/sub/deep/d.tiff", "/no/such.jpg",
        "photos/a.png",
    ]  # fmt: skip
    assert found[3]["error"] == "No such file or directory [IMAGE_UNREADABLE]"
    assert "graft: /no/such.jpg: No such file or directory [IMAGE_UNREADABLE]\n" in err
    (photos / "list").write_text("photos/a.png\n")
    code, out, _ = run("pets", photos / "b.JPG", "--files-from", photos / "list", "--json")
    assert [line["image"] for line in lines(out)] == ["photos/b.JPG", "photos/a.png"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name images: files, folders, - for one on standard input, or --files-from"),
        (["-", "-"], "- is standard input, which can be read once"),
        (["-", "--files-from", "-"], "- is standard input, which can be read once"),
        (["photos/.git/none", "photos"], "photos/.git/none: no such file or folder"),
        (["--files-from", "nowhere"], "nowhere: No such file or directory"),
        (["empty"], "no images were found"),
        (["photos", "--csv", "--json"], "--csv and --json are two forms of the same: give one"),
    ],
)
def test_what_names_no_images_is_wrong_usage(
    run: Run, photos: Path, predicting: FakeGraft, arguments: list[str], told: str
) -> None:
    Path("empty").mkdir()
    code, out, err = run("pets", *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1
    assert not predicting.requests("Predict")


def test_csv_has_columns_that_depend_on_top_k_alone(run: Run, photos: Path) -> None:
    names = ["file", "label", "probability"]
    notes = ["outlier_score", "is_outlier", "calibrated", "model", "version", "error"]
    code, out, _ = run("pets", photos, "--csv")
    assert code == 0
    assert out.startswith(",".join(names + notes) + "\r\n")
    assert [row["label"] for row in rows(out)] == ["dog", "cat", "cat", "cat"]
    assert [row["is_outlier"] for row in rows(out)] == ["false", "false", "true", "false"]
    (photos / "c,\nd.jpg").write_bytes(b"broken")
    for model in ("pets", "pets,pets:1"):
        code, out, _ = run(model, photos / "c,\nd.jpg", photos / "a.png", "--csv", "--top-k", 3)
        assert code == 1
        found = rows(out)
        assert list(found[0]) == [
            *names, "label_2", "probability_2", "label_3", "probability_3", *notes,
        ]  # fmt: skip
        assert [row["file"] for row in found[:: len(found) // 2]] == [
            "photos/c,\nd.jpg", "photos/a.png",
        ]  # fmt: skip
        assert found[0]["error"] == "it is cut short [IMAGE_UNREADABLE]"
        assert found[0]["label"] == ""
        assert found[-1] == {
            "file": "photos/a.png", "label": "dog", "probability": "0.700000", "label_2": "cat",
            "probability_2": "0.300000", "label_3": "", "probability_3": "",
            "outlier_score": "0.5000", "is_outlier": "false", "calibrated": "true",
            "model": "pets", "version": "1", "error": "",
        }  # fmt: skip


def test_csv_leaves_the_label_empty_where_no_class_reaches_its_threshold(
    run: Run, photos: Path
) -> None:
    (photos / "e.png").write_bytes(b"doubtful")
    _, out, _ = run("pets", photos / "e.png", "--csv", "--top-k", 2)
    [row] = rows(out)
    assert (row["label"], row["probability"], row["label_2"]) == ("", "", "dog")


def test_more_than_a_handful_are_summed_up_by_class(run: Run, photos: Path) -> None:
    (photos / "z.jpg").write_bytes(b"broken")
    files = [photos, photos / "a.png", photos / "a.png"]
    code, out, _ = run("pets", *files)
    assert code == 1
    assert out.splitlines()[-5:] == [
        "",
        "class  images  mean probability  unlike the training images",
        "cat    3       90.0%             1",
        "dog    3       70.0%             0",
        "7 images, of which 1 failed",
    ]
    _, out, err = run("pets", *files, "--csv")
    assert len(rows(out)) == 7
    assert err.endswith("\n7 images, of which 1 failed\n")
    _, out, err = run("pets", *files, "--json")
    assert len(lines(out)) == 7
    summary = lines(err)[-1]["summary"]
    assert (summary["images"], summary["failed"]) == (7, 1)
    assert summary["classes"][0] == {
        "model": "pets", "label": "cat", "count": 3,
        "mean_probability": pytest.approx(0.9), "out_of_distribution_count": 1,
    }  # fmt: skip
    assert "mean" not in run("pets", photos / "a.png")[1]
    assert "mean" not in run("pets", *files, "--quiet")[1]
    (photos / "y.jpg").write_bytes(b"doubtful")
    _, out, _ = run("pets,pets:1", *files)
    assert "pets    none   1       -                 0" in out
    assert "pets:1  cat    3       90.0%             1" in out


def test_images_are_columns_or_a_line_each(run: Run, photos: Path) -> None:
    images = [photos / "b.JPG", photos / "a.png"]
    code, out, _ = run("pets", *images, "--top-k", 2)
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["image", "class", "probability"],
        ["photos/b.JPG", "cat", "90.0%"],
        ["dog", "10.0%"],
        ["photos/a.png", "dog", "70.0%"],
        ["cat", "30.0%"],
    ]
    _, out, _ = run("pets,pets:1", *images)
    heads, *others = out.splitlines()
    assert heads.split() == ["image", "model", "class", "probability"]
    assert [row.split()[-3] for row in others] == ["pets", "pets:1"] * 2
    code, out, _ = run("pets@latest", *images, "--json", "--features")
    told = lines(out)
    assert [line["image"] for line in told] == [str(image) for image in images]
    assert set(told[0]) == {
        "image", "model", "version", "label", "probability", "scores", "features",
        "out_of_distribution_score", "is_out_of_distribution", "calibrated",
    }  # fmt: skip
    assert told[0]["calibrated"] is True


def test_images_unlike_the_training_are_marked(run: Run, photos: Path) -> None:
    unlike = photos / "sub" / "c.webp"
    _, out, _ = run("pets", photos / "a.png", unlike)
    [marked] = [line for line in out.splitlines() if "unlike the training images" in line]
    assert "c.webp" in marked
    assert "(2.3)" in marked
    assert "training images" not in run("pets", photos / "a.png")[1]
    [told] = lines(run("pets", unlike, "--json")[1])
    assert told["is_out_of_distribution"]
    assert told["out_of_distribution_score"] == pytest.approx(2.31)


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_answered(
    run: Run, photos: Path
) -> None:
    broken = photos / "broken.jpg"
    broken.write_bytes(b"broken")
    code, out, err = run("pets", broken, photos / "a.png", "--json")
    assert code == 1
    reasons = [line.get("error", {}).get("reason") for line in lines(out)]
    assert reasons == ["IMAGE_UNREADABLE", None]
    assert lines(err) == [
        {
            "error": {
                "image": str(broken), "message": "it is cut short",
                "reason": "IMAGE_UNREADABLE", "code": "INVALID_ARGUMENT", "exit_code": 1,
            }
        }
    ]  # fmt: skip
    assert run("pets", broken)[2] == f"graft: {broken}: it is cut short [IMAGE_UNREADABLE]\n"


def test_what_a_whole_call_fails_with_ends_the_command_in_one_line(run: Run, photos: Path) -> None:
    code, out, err = run("nope", photos)
    assert (code, out) == (1, "")
    assert "[MODEL_NOT_FOUND]" in err
    assert err.count("\n") == 1


def test_of_many_images_a_few_calls_are_held(
    run: Run, predicting: FakeGraft, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftml.cli._image_files import ImageFile

    read, most_ahead, shown = 0, 0, 0
    read_one = ImageFile.read

    def counted(image: ImageFile) -> Any:
        nonlocal read, most_ahead
        read += 1
        most_ahead = max(most_ahead, read - shown)
        return read_one(image)

    emit = sys.modules["graftml.cli._output"].Output.emit

    def emitted(output: Any, value: Any) -> None:
        nonlocal shown
        shown += 1
        emit(output, value)

    monkeypatch.setattr(ImageFile, "read", counted)
    monkeypatch.setattr(sys.modules["graftml.cli._output"].Output, "emit", emitted)
    code, out, _ = run("pets", *[photos / "a.png"] * 1000, "--json")
    assert (code, len(lines(out))) == (0, 1000)
    assert {len(request.images) for request in predicting.requests("Predict")} == {32, 1000 % 32}
    assert most_ahead <= 32 * (_UNDER_WAY + 1)
