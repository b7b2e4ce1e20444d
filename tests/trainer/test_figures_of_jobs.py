"""Jobs say what they know of a version, and compare it with the one before fairly."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from service.contract import (
    ANSWERS_FILE,
    HEAD_FILE,
    REPORT_HTML_FILE,
    Auto,
    DomainAdaptation,
    Finished,
    Gate,
    Grouping,
    ModelBased,
    Note,
)
from service.domain import GateCheck, Manifest
from service.engine import head as heads
from service.errors import InvalidInput
from tests.trainer.conftest import MakeFolder, MakeSpec, Told, incumbent, source_of
from trainer import answers
from trainer.answers import Role
from trainer.train import run

pytestmark = pytest.mark.usefixtures("small_network")


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
    head = heads.load((tmp_path / "out" / HEAD_FILE).read_bytes())
    assert not head.is_calibrated
    assert head.outliers is None
    page = (tmp_path / "out" / REPORT_HTML_FILE).read_text()
    assert "The accuracy is not known" in page


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
    again = run(make_spec(folder, gate=gate, **before), told.append)
    assert again.figures == first.figures
    check = not_worse(again)
    assert (check.verdict, check.passed) == ("passed", True)
    assert "12 images" in check.detail


def test_what_few_images_cannot_tell_is_said_and_decided_as_asked(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    folder = make_folder(per_class=6)
    first = run(make_spec(folder, out_dir=str(tmp_path / "first")), told.append)
    shutil.copytree(make_folder("more", per_class=6, seed=5), folder / "..", dirs_exist_ok=True)
    for label in ("blue", "red"):
        for n, path in enumerate(sorted((tmp_path / "more" / label).iterdir())):
            path.rename(folder / label / f"more-{n}.png")
    gate = Gate(not_worse_than="latest", when_uncertain="promote")
    spec = make_spec(folder, gate=gate, **incumbent(tmp_path / "first", first))
    check = not_worse(run(spec, told.append))
    assert (check.verdict, check.passed) == ("undecided", True)
    # On those that the version before learned from too: by its answers out of fold.
    assert "24 images" in check.detail
    assert check.images_needed > 24
    assert f"about {check.images_needed} would be enough" in check.detail


def test_new_classes_are_judged_apart(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    folder = make_folder(per_class=6)
    first = run(make_spec(folder, out_dir=str(tmp_path / "first")), told.append)
    new = make_folder("new", per_class=5, classes=("green",), seed=3)
    (new / "green").rename(folder / "green")
    gate = Gate(not_worse_than="latest")
    spec = make_spec(folder, gate=gate, **incumbent(tmp_path / "first", first))
    check = not_worse(run(spec, told.append))
    assert "12 images" in check.detail
    assert "of 5 images of classes that it does not know" in check.detail


@pytest.mark.parametrize("damage", [b"no answers", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_version_before_without_its_answers_passes_no_gate(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path, damage: bytes
) -> None:
    folder = make_folder(per_class=6)
    first = run(make_spec(folder, out_dir=str(tmp_path / "first")), told.append)
    before = incumbent(tmp_path / "first", first)
    (tmp_path / "first" / ANSWERS_FILE).write_bytes(damage)
    gate = Gate(not_worse_than="latest", when_uncertain="promote")
    spec = make_spec(folder, gate=gate, **before, previous_answers="answers")
    check = not_worse(run(spec, told.append))
    assert (check.verdict, check.passed) == ("failed", False)
    assert any("version before learned from is not known" in n.text for n in told.of(Note))  # type: ignore[attr-defined]
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


def test_a_validation_part_of_copies_is_told_and_not_measured_on(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    folder = make_folder("parts/train", per_class=12).parent
    for path in (folder / "train").rglob("*.png"):
        to = folder / "val" / path.parent.name / f"frame-{path.name}"
        to.parent.mkdir(parents=True, exist_ok=True)
        # The same scene, told by another byte of the file.
        to.write_bytes(path.read_bytes() + b"\0")
    spec = make_spec(folder, method=ModelBased(epochs=1, batch_size=8))
    manifest = run(spec, told.append)
    (figure,) = manifest.figures
    assert figure.measured_on == "held_out"
    assert any(
        "validation images are not measured on: a near copy" in n.text for n in told.of(Note)
    )  # type: ignore[attr-defined]


def test_baselines_that_find_nothing_held_out_are_left_out_with_a_word(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    spec = make_spec(
        make_folder(per_class=2), validation_fraction=0.05, baselines=["full_fine_tune"]
    )
    run(spec, told.append)
    assert any("baselines that train are left out" in n.text for n in told.of(Note))  # type: ignore[attr-defined]


def darkened(folder: Path, to: Path) -> Path:
    for path in folder.rglob("*.png"):
        out = to / path.relative_to(folder)
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).point(lambda value: int(value * 0.45)).save(out)
    return to


def test_an_adapted_version_is_compared_on_target_images_that_neither_knew(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    source = make_folder("source", per_class=15)
    target = darkened(make_folder("other", per_class=15, seed=9), tmp_path / "target")
    first = run(make_spec(source, out_dir=str(tmp_path / "first")), told.append)
    before = incumbent(tmp_path / "first", first)
    adapted = make_spec(
        source,
        out_dir=str(tmp_path / "adapted"),
        method=DomainAdaptation(technique="coral", always_adapt=True, evaluate_on_target=True),
        target=source_of(target),
        gate=Gate(not_worse_than="latest"),
        **before,
    )
    check = not_worse(run(adapted, told.append))
    assert "30 images" in check.detail


def test_an_adapted_version_without_target_labels_lends_nobody_its_answers(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    source = make_folder("source", per_class=15)
    target = darkened(make_folder("other", per_class=15, seed=9), tmp_path / "target")
    spec = make_spec(
        source,
        out_dir=str(tmp_path / "first"),
        method=DomainAdaptation(technique="coral", always_adapt=True),
        target=source_of(target),
    )
    first = run(spec, told.append)
    known = answers.load(tmp_path / "first" / ANSWERS_FILE)
    assert {one.role for one in known.values()} == {Role.LEARNED}
    assert len(known) == 60
    # Source and target are no groups of each other, and the target's images no group of all.
    assert len({one.group for one in known.values()}) > 50
    again = make_spec(
        source, gate=Gate(not_worse_than="latest"), **incumbent(tmp_path / "first", first)
    )
    check = not_worse(run(again, told.append))
    assert check.verdict == "undecided"
    assert "30 images could not be compared on fairly" in check.detail


def test_target_images_that_are_copies_of_the_source_s_are_not_measured_on(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    source = make_folder("source", per_class=15)
    target = tmp_path / "target"
    for path in source.rglob("*.png"):
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes() + b"\0")
    spec = make_spec(
        source,
        method=DomainAdaptation(evaluate_on_target=True),
        target=source_of(target),
    )
    manifest = run(spec, told.append)
    assert manifest.headline is None
    assert any("or near copies of them" in n.text for n in told.of(Note))  # type: ignore[attr-defined]


def test_images_that_changed_their_class_are_not_compared_on_and_told(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    folder = make_folder(per_class=8)
    first = run(make_spec(folder, out_dir=str(tmp_path / "first")), told.append)
    (folder / "red").rename(folder / "was-red")
    (folder / "blue").rename(folder / "red")
    (folder / "was-red").rename(folder / "blue")
    gate = Gate(not_worse_than="latest")
    spec = make_spec(folder, gate=gate, **incumbent(tmp_path / "first", first))
    check = not_worse(run(spec, told.append))
    assert (check.verdict, check.passed) == ("undecided", False)
    assert any("16 images are in another class than in version 1" in n.text for n in told.of(Note))  # type: ignore[attr-defined]


def test_a_gate_on_a_class_that_is_not_there_is_refused_with_those_that_are(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    spec = make_spec(make_folder(), gate=Gate(class_recalls={"wasp": 0.5}))
    with pytest.raises(InvalidInput, match="'wasp'; theirs are 'blue', 'red'") as caught:
        run(spec, told.append)
    assert caught.value.field == "gate.class_recalls"


def test_names_of_groups_that_look_unmeant_are_told(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    folder = make_folder(per_class=6)
    run(make_spec(folder, grouping=Grouping(name_pattern="{group}.png")), told.append)
    assert any("6 groups have images of several classes" in n.text for n in told.of(Note))  # type: ignore[attr-defined]
    for label in ("blue", "red"):
        for path in list((folder / label).iterdir()):
            path.rename(path.with_name(f"{label}{path.name}"))
    told.clear()
    again = make_spec(
        folder, grouping=Grouping(name_pattern="{group}.png"), out_dir=str(folder.parent / "again")
    )
    run(again, told.append)
    assert any(
        "each of 12 images that have a group is the only one" in n.text for n in told.of(Note)
    )  # type: ignore[attr-defined]
