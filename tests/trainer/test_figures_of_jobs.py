"""Jobs say what they know of a version, and compare it with the one before fairly."""

import shutil
from pathlib import Path

import pytest

from service.domain import GateCheck, Manifest
from service.inference import head as heads
from service.jobs.contract import (
    ANSWERS_FILE,
    BACKBONE_FILE,
    HEAD_FILE,
    REPORT_HTML_FILE,
    Auto,
    Finished,
    Gate,
    Grouping,
    Incumbent,
    ModelBased,
    Note,
)
from tests.trainer.conftest import MakeFolder, MakeSpec, Told
from trainer import answers
from trainer.answers import Role
from trainer.train import run

pytestmark = pytest.mark.usefixtures("small_network")


def incumbent(out: Path, manifest: Manifest) -> Incumbent:
    """A version as the service keeps it: its backbone called by its digest."""
    backbone = out / f"{manifest.backbone_digest}.onnx"
    shutil.copy(out / BACKBONE_FILE, backbone)
    return Incumbent(
        version=1,
        backbone_path=str(backbone),
        head_path=str(out / HEAD_FILE),
        answers_path=str(out / ANSWERS_FILE),
    )


def not_worse(manifest: Manifest) -> GateCheck:
    (check,) = manifest.gate_checks
    assert check.name == "not_worse"
    return check


def test_one_image_a_class_is_served_and_nothing_is_claimed(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    manifest = run(make_spec(make_folder(per_class=1)), told.append)
    assert (manifest.train_count, manifest.figures, manifest.headline) == (2, [], None)
    assert not manifest.calibrated
    assert "nothing was measured" in manifest.calibration_note
    assert told[-1] == Finished(None, 0)
    head = heads.load(tmp_path / "out" / HEAD_FILE)
    assert not head.is_calibrated
    assert head.outliers is None
    page = (tmp_path / "out" / REPORT_HTML_FILE).read_text()
    assert "How well it classifies is not known" in page


def test_a_class_of_one_among_others_is_learned_and_not_measured(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    folder = make_folder(per_class=10)
    shutil.copytree(make_folder("lone", per_class=1, classes=("green",)) / "green", folder / "rare")
    manifest = run(make_spec(folder), told.append)
    assert manifest.headline is not None
    assert (manifest.train_count, manifest.headline.count) == (21, 20)


def test_the_same_job_again_answers_identically_and_passes_on_few_images(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    folder = make_folder(per_class=6)
    first = run(make_spec(folder, out_dir=str(tmp_path / "first")), told.append)
    before = incumbent(tmp_path / "first", first)
    gate = Gate(not_worse_than="latest")
    again = run(make_spec(folder, gate=gate, incumbent=before), told.append)
    assert again.figures == first.figures
    check = not_worse(again)
    assert (check.verdict, check.passed) == ("passed", True)
    assert "12 images" in check.detail


@pytest.mark.parametrize(("when", "passed"), [("hold", False), ("promote", True)])
def test_what_few_images_cannot_tell_is_said_and_decided_as_asked(
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    told: Told,
    tmp_path: Path,
    when: str,
    passed: bool,
) -> None:
    folder = make_folder(per_class=6)
    first = run(make_spec(folder, out_dir=str(tmp_path / "first")), told.append)
    shutil.copytree(make_folder("more", per_class=6, seed=5), folder / "..", dirs_exist_ok=True)
    for label in ("blue", "red"):
        for n, path in enumerate(sorted((tmp_path / "more" / label).iterdir())):
            path.rename(folder / label / f"more-{n}.png")
    gate = Gate(not_worse_than="latest", when_uncertain=when)  # type: ignore[arg-type]
    spec = make_spec(folder, gate=gate, incumbent=incumbent(tmp_path / "first", first))
    check = not_worse(run(spec, told.append))
    assert (check.verdict, check.passed) == ("undecided", passed)
    # On those that the version before learned from too: by its answers out of fold.
    assert "24 images" in check.detail
    assert check.images_needed > 24
    assert f"some {check.images_needed} would settle it" in check.detail


def test_new_classes_are_judged_apart(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    folder = make_folder(per_class=6)
    first = run(make_spec(folder, out_dir=str(tmp_path / "first")), told.append)
    new = make_folder("new", per_class=5, classes=("green",), seed=3)
    (new / "green").rename(folder / "green")
    gate = Gate(not_worse_than="latest")
    spec = make_spec(folder, gate=gate, incumbent=incumbent(tmp_path / "first", first))
    check = not_worse(run(spec, told.append))
    assert "12 images" in check.detail
    assert "of 5 images of classes that it does not know" in check.detail


def test_a_version_before_without_its_answers_passes_no_gate(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    folder = make_folder(per_class=6)
    first = run(make_spec(folder, out_dir=str(tmp_path / "first")), told.append)
    before = incumbent(tmp_path / "first", first)
    (tmp_path / "first" / ANSWERS_FILE).write_bytes(b"no answers")
    gate = Gate(not_worse_than="latest", when_uncertain="promote")
    check = not_worse(run(make_spec(folder, gate=gate, incumbent=before), told.append))
    assert (check.verdict, check.passed) == ("failed", False)
    assert "kept answers are damaged" in check.detail


def test_a_network_is_measured_on_what_every_job_of_its_images_holds_out(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    folder = make_folder(per_class=20)
    held = []
    for seed in (0, 1):
        out = tmp_path / f"out{seed}"
        spec = make_spec(
            folder, out_dir=str(out), seed=seed, method=ModelBased(epochs=1, batch_size=8)
        )
        manifest = run(spec, told.append)
        (figure,) = manifest.figures
        assert figure.measured_on == "held_out"
        assert figure.count + manifest.train_count == 40
        known = answers.load(out / ANSWERS_FILE)
        held.append({digest for digest, one in known.items() if one.role == Role.HELD_OUT})
        assert len(held[-1]) == figure.count
        assert {one.role for one in known.values()} == {Role.HELD_OUT, Role.LEARNED}
    # Whatever the seed.
    assert held[0] == held[1]


def test_groups_that_names_tell_count_as_one_and_stay_together(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    folder = make_folder(per_class=12)
    for label in ("blue", "red"):
        for path in (folder / label).iterdir():
            path.rename(path.with_name(f"{label}{int(path.stem) // 3}_{path.name}"))
    (folder / "red" / "red0_0.png").rename(folder / "red" / "loose.png")
    spec = make_spec(folder, grouping=Grouping(name_pattern="{group}_*"))
    manifest = run(spec, told.append)
    assert manifest.train_groups == 9
    (figure,) = manifest.figures
    assert (figure.count, figure.groups) == (24, 9)
    assert any("the names of 1 images tell no group" in n.text for n in told if isinstance(n, Note))


def test_auto_says_why_it_trains_no_network(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    manifest = run(make_spec(make_folder(per_class=6), method=Auto()), told.append)
    assert manifest.method == "feature_based"
    assert any(
        "the network is not trained: 12 images" in n.text for n in told if isinstance(n, Note)
    )
    assert "are too few" in (tmp_path / "out" / REPORT_HTML_FILE).read_text()
