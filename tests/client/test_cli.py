"""The `graft` command: what it prints, where, and how it ends."""

import json
import sys
from pathlib import Path
from typing import Any

import graftml
import pytest
from google.protobuf.duration_pb2 import Duration
from graftml.cli import main
from graftml.testing import FakeGraft, failed, running
from graftml_stubs.v1 import fine_tuning_pb2 as pb

from tests.client.conftest import Run


@pytest.fixture(autouse=True)
def pets(server: FakeGraft) -> None:
    server.add_model("pets")


OF_HEADS = ("--method", "feature-based", "--l2", "0.1")


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_fine_tune_is_followed_to_its_version(run: Run, folder: Path) -> None:
    code, out, err = run("finetune", folder, "--name", "cats")
    assert (code, err) == (0, "")
    assert out.splitlines()[2:4] == [
        "running",
        "6 images of 2 classes (cat, dog); 6 of 8 files are used; left out: 1 link, 1 hidden",
    ]
    assert "\nfeatures\n" in out
    assert "cats version 1: 0.950 [0.91 to 0.99] by cross-validation over 20 images" in out
    assert out.endswith("Try it: graft predict cats IMAGE\n")


def test_a_fine_tune_tells_programs_the_job_its_events_and_its_version(
    run: Run, folder: Path
) -> None:
    code, out, _ = run("finetune", folder, "--name", "cats", "--json")
    told = lines(out)
    assert code == 0
    assert [line.get("type") for line in told] == [
        "job",
        "state_change",
        "state_change",
        "data",
        "progress",
        "epoch",
        "epoch",
        "progress",
        "published",
        "state_change",
        "version",
    ]
    assert told[0]["job_id"] == "job-1"
    assert told[-1]["version"] == 1


def test_every_option_of_a_fine_tune_reaches_the_service(
    run: Run, server: FakeGraft, folder: Path
) -> None:
    options = (
        "--method model-based --backbone resnet18 --weights IMAGENET1K_V1 --recipe classic "
        "--epochs 3 --batch-size 8 --lr 0.01 --momentum 0.8 --weight-decay 0.1 "
        "--label-smoothing 0.2 --train-from-stage layer4 --freeze-batch-norm "
        "--precision fp32 --validation-fraction 0.3 --seed 5 --time-budget 60 --device cpu "
        "--label team=blue --label note=a=b --request-id mine --detach --base pets:1 "
        "--baseline linear-probe --baseline from_scratch --min-accuracy 0.9 "
        "--min-class-recall 0.5 --class-recall ants=0.8 --class-recall a=b=0.7 "
        "--not-worse-than latest --max-regression 0.01 --when-uncertain promote "
        "--max-latency-ms 12.5 --gate-alias prod --background #20c040 --group-by-folder 2 "
        "--outlier-false-alarms 0.01 --no-mirror --min-scale 0.5 --rotation 15 --colour 0.2 "
        "--trivial-augment --serving-precision int8"
    )
    code, out, _ = run("finetune", folder, "--name", "cats", *options.split())
    assert (code, out) == (0, "job-1\n")
    with graftml.Client(server.target) as client:
        request = client.get_job("job-1").request
    assert request.model_based == pb.ModelBased(
        recipe=pb.RECIPE_CLASSIC,
        epochs=3,
        batch_size=8,
        learning_rate=0.01,
        momentum=0.8,
        weight_decay=0.1,
        label_smoothing=0.2,
        train_from_stage="layer4",
        freeze_batch_norm=True,
        precision=pb.PRECISION_FP32,
    )
    assert (request.backbone, request.weights) == ("resnet18", "IMAGENET1K_V1")
    assert (request.validation_fraction, request.seed) == (0.3, 5)
    assert request.time_budget.seconds == 60
    assert request.outlier_false_alarm_rate == 0.01
    assert (request.device, request.request_id) == (pb.DEVICE_CPU, "mine")
    assert request.labels == {"team": "blue", "note": "a=b"}
    assert request.background == "#20c040"
    assert request.serving_precision == pb.SERVING_PRECISION_INT8
    assert request.base == pb.BaseVersion(version=1, model="pets")
    assert request.baselines == [pb.BASELINE_LINEAR_PROBE, pb.BASELINE_FROM_SCRATCH]
    assert request.gate == pb.Gate(
        min_accuracy=0.9,
        min_class_recall=0.5,
        class_recalls={"ants": 0.8, "a=b": 0.7},
        not_worse_than="latest",
        max_regression=0.01,
        when_uncertain=pb.WHEN_UNCERTAIN_PROMOTE,
        max_latency=Duration(nanos=12_500_000),
        alias="prod",
    )
    assert request.grouping == pb.Grouping(folder_level=2)
    assert request.augmentation == pb.Augmentation(
        mirror=False, min_scale=0.5, rotation_degrees=15.0, colour=0.2, trivial_augment=True
    )
    told = json.loads(run("--json", "jobs", "get", "job-1")[1])
    assert told["request"]["model_based"]["recipe"] == "RECIPE_CLASSIC"


def test_a_base_is_named_as_versions_are_everywhere(run: Run, server: FakeGraft) -> None:
    server.add_model("pets")
    server.add_model("cats")
    assert run("models", "alias", "pets", "prod", "1")[0] == 0
    for text, base in (
        ("pets@prod", pb.BaseVersion(alias="prod", model="pets")),
        ("pets:prod", pb.BaseVersion(alias="prod", model="pets")),
        ("pets:1", pb.BaseVersion(version=1, model="pets")),
        ("1", pb.BaseVersion(version=1)),
        ("latest", pb.BaseVersion(alias="latest")),
    ):
        start = ("finetune", "server:/x", "--name", "cats", "--detach")
        assert run(*start, "--base", text)[0] == 0
        assert server.requests("FineTune")[-1].base == base


def test_images_on_the_server_are_named_by_their_path(run: Run, server: FakeGraft) -> None:
    assert run("finetune", "server:/images", "--name", "cats", *OF_HEADS, "--detach")[0] == 0
    [request] = server.requests("FineTune")
    assert request.server_path.path == "/images"
    assert request.feature_based.l2 == 0.1


def test_a_model_is_adapted_to_a_folder_of_another_domain(
    run: Run, server: FakeGraft, folder: Path
) -> None:
    options = ("--method", "domain-adaptation", "--target", folder)
    code, _, err = run(
        "finetune", folder, "--name", "cats", *options, "--technique", "pseudo-labels"
    )
    assert (code, err) == (0, "")
    assert "domain-adaptation" in run("models", "versions", "cats")[1]
    run("finetune", folder, "--name", "cats", *options, "--always-adapt", "--evaluate-on-target")
    with graftml.Client(server.target) as client:
        first, second = (client.get_job(f"job-{n}").request.domain_adaptation for n in (1, 2))
    assert (first.technique, first.always_adapt, first.evaluate_on_target) == (
        pb.ADAPTATION_TECHNIQUE_PSEUDO_LABELS, False, False,
    )  # fmt: skip
    assert (second.technique, second.always_adapt, second.evaluate_on_target) == (
        pb.ADAPTATION_TECHNIQUE_AUTO, True, True,
    )  # fmt: skip
    assert [sent[0].header.is_unlabelled for sent in server.requests("UploadDataset")] == [
        False, True, False, True,
    ]  # fmt: skip


def test_a_target_on_the_server_is_named_by_its_path(run: Run, server: FakeGraft) -> None:
    start = ("finetune", "server:/x", "--name", "cats", "--detach")
    adapting = ("--method", "domain-adaptation", "--target", "server:/phone")
    views = ("--augmented-views", "2")
    code, _, err = run(*start, *adapting, *views)
    assert (code, "augmented_views is a hyperparameter of feature_based" in err) == (2, True)
    assert run(*start, *adapting)[0] == 0
    [request] = server.requests("FineTune")
    assert request.domain_adaptation.target_path.path == "/phone"
    assert run(*start, *views, "--method", "feature-based")[0] == 0
    assert server.requests("FineTune")[1].feature_based.augmented_views == 2


def test_an_alias_is_rolled_back(run: Run, server: FakeGraft) -> None:
    server.add_model("pets", versions=2)
    code, out, _ = run("rollback", "pets")
    assert (code, out) == (0, "pets@latest is version 2 again; it was 3\n")
    run("models", "alias", "pets", "prod", 3)
    [told] = lines(run("rollback", "pets", "prod", "--json")[1])
    assert (told["from_version"], told["to_version"]) == (3, 2)
    assert told["model"]["aliases"] == {"latest": 2, "prod": 2}
    reason = graftml.Reason.NO_EARLIER_VERSION
    server.fail("RollbackAlias", graftml.FailedPrecondition("no other", reason=reason))
    code, _, err = run("rollback", "pets", "prod")
    assert (code, "[NO_EARLIER_VERSION]" in err) == (1, True)


def test_a_job_that_fails_ends_the_command_with_3(
    server: FakeGraft, capsys: pytest.CaptureFixture[str]
) -> None:
    script = [running(), failed("one class only", "DATASET_UNUSABLE")]
    with FakeGraft(script=script) as failing:
        code = main(["finetune", "server:/x", "--name", "cats", "--server", failing.target])
    assert code == 3
    expected = "graft: job job-1 of model cats failed: one class only [DATASET_UNUSABLE]\n"
    assert capsys.readouterr().err == expected


def test_ctrl_c_stops_watching_and_the_job_goes_on(
    run: Run, server: FakeGraft, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(graftml.JobHandle, "wait", interrupted)
    code, _, err = run("finetune", folder, "--name", "cats")
    assert code == 130
    assert "detached; job job-1 goes on" in err
    assert "graft jobs watch job-1" in err
    assert "graft jobs cancel job-1" in err
    assert "CancelJob" not in {call.method for call in server.calls}


def test_jobs_are_listed_described_watched_and_cancelled(run: Run, server: FakeGraft) -> None:
    run("finetune", "server:/x", "--name", "cats", "--detach")
    assert "job-1" in run("jobs")[1]
    assert [job["job_id"] for job in lines(run("jobs", "list", "--json")[1])] == ["job-1"]
    assert lines(run("jobs", "list", "--json", "--state", "failed")[1]) == []
    assert lines(run("jobs", "get", "job-1", "--json")[1])[0]["state"] == "SUCCEEDED"
    assert "succeeded" in run("jobs", "get", "job-1")[1].lower()
    code, out, _ = run("jobs", "watch", "job-1", "--json")
    assert (code, lines(out)[-1]["type"]) == (0, "version")
    code, _, err = run("jobs", "cancel", "job-1")
    assert (code, err) == (1, "graft: job job-1 has ended already [JOB_FINISHED]\n")


def test_a_job_is_cancelled(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeGraft(script=[running()]) as server:
        where = ["--server", server.target]
        assert main(["finetune", "server:/x", "--name", "cats", "--detach", *where]) == 0
        assert main(["jobs", "cancel", "job-1", *where]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "job job-1: will be cancelled"
        assert main(["jobs", "watch", "job-1", *where]) == 3
        assert capsys.readouterr().err == "graft: job job-1 of model cats was cancelled\n"


def test_models_versions_and_aliases_are_looked_after(run: Run, server: FakeGraft) -> None:
    server.add_model("pets")
    assert "latest = 2" in run("models")[1]
    assert lines(run("models", "list", "--json")[1])[0]["version_count"] == 2
    assert lines(run("models", "alias", "pets", "prod", 1, "--json")[1])[0]["aliases"] == {
        "latest": 2,
        "prod": 1,
    }
    assert lines(run("models", "get", "pets@prod", "--json")[1])[0]["version"] == 1
    assert lines(run("models", "get", "pets:2", "--json")[1])[0]["aliases"] == ["latest"]
    assert "feature-based" in run("models", "versions", "pets")[1]
    assert run("models", "alias", "pets", "prod", "--delete")[0] == 0
    assert lines(run("models", "delete", "pets:1", "--json")[1]) == [{"deleted": "pets:1"}]
    assert run("models", "delete", "pets", "--yes")[:2] == (0, "deleted pets\n")
    assert lines(run("models", "list", "--json")[1]) == []


def test_reports_and_exports_are_written(run: Run, tmp_path: Path) -> None:
    assert json.loads(run("report", "pets")[1])["model"] == "pets"
    page = tmp_path / "report.html"
    code, out, _ = run("report", "pets", "--html", "-o", page, "--json")
    assert (code, lines(out)[0]["path"]) == (0, str(page))
    assert page.read_text().startswith("<!doctype html>")
    code, _, err = run("report", "pets", "-o", tmp_path / "report.pdf")
    assert code == 2
    assert "report.pdf with .html or .json" in err
    assert run("report", "pets", "-o", tmp_path / "report.txt", "--json")[0] == 0
    file = tmp_path / "pets.onnx"
    assert run("export", "pets", "-o", file)[0] == 0
    assert file.read_bytes() == b"fake onnx of pets 1\n" * 200


def test_a_servers_data_folder_is_not_sent_as_images(run: Run, tmp_path: Path) -> None:
    for name in ("data/graft.sqlite3", "data/blobs/x", "new/one.png", "digits/one/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for folder, hint in (
        (tmp_path, f"; did you mean {tmp_path}/digits?"),
        (tmp_path / "data", "a folder of images for each class\n"),
    ):
        code, _, err = run("finetune", folder, "--name", "pets")
        assert code == 2
        assert f"{tmp_path}/data is the data folder of a server" in err
        assert hint in err


def test_datasets_are_uploaded_listed_and_deleted(run: Run, folder: Path) -> None:
    code, out, err = run("datasets", "upload", folder, "--name", "mine", "--json")
    [dataset] = lines(out)
    assert (code, dataset["display_name"], dataset["image_count"]) == (0, "mine", 6)
    assert dataset["summary"]["seen_count"] == 8
    assert "6 of 8 files are used; left out: 1 link, 1 hidden" in err
    assert "dog/link.jpg: link" in err
    assert "mine" in run("datasets")[1]
    assert lines(run("datasets", "get", dataset["dataset_id"], "--json")[1]) == [dataset]
    assert run("datasets", "delete", dataset["dataset_id"])[0] == 0
    [unlabelled] = lines(run("datasets", "upload", folder, "--unlabelled", "--json")[1])
    assert (unlabelled["is_unlabelled"], unlabelled["classes"]) == (True, [])
    assert "unlabelled" in run("datasets")[1]
    assert run("datasets", "delete", unlabelled["dataset_id"])[0] == 0
    assert lines(run("datasets", "list", "--json")[1]) == []


def test_labels_that_differ_in_case_alone_are_asked_for_by_a_flag(
    run: Run, server: FakeGraft, folder: Path
) -> None:
    flag = "--case-sensitive-labels"
    [dataset] = lines(run("datasets", "upload", folder, flag, "--json")[1])
    assert dataset["case_sensitive_labels"]
    assert run("finetune", folder, "--name", "cats", flag)[0] == 0
    assert run("rank", folder, flag)[0] == 0
    assert server.requests("FineTune")[-1].case_sensitive_labels
    assert server.requests("RankBackbones")[-1].case_sensitive_labels


def test_what_a_job_left_out_is_shown_as_it_goes(run: Run, folder: Path) -> None:
    code, out, _ = run("finetune", folder, "--name", "cats")
    assert code == 0
    assert "(cat, dog); 6 of 8 files are used; left out: 1 link, 1 hidden" in out


def test_health_says_whether_the_server_serves(run: Run, server: FakeGraft) -> None:
    assert run("health", "--wait", "60")[:2] == (0, f"{server.target} serves\n")
    server.is_serving = False
    code, out, err = run("health", "--json")
    why = f"{server.target} answers, but does not serve: it starts, or stops"
    assert (code, lines(out)) == (5, [{"server": server.target, "serving": False, "why": why}])
    assert json.loads(err)["error"] == {
        "message": why, "reason": "", "code": "", "exit_code": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["predict", "nope", __file__], 1, "[MODEL_NOT_FOUND]"),
        (["predict", "pets", "/no/such.jpg"], 2, "/no/such.jpg: no such file or folder"),
        (["predict", "pets:x", __file__], 2, "'x' is not a version"),
        (["predict", "pets@", __file__], 2, "names no alias"),
        (["models", "delete", "pets@prod"], 2, "not by an alias"),
        (["models", "alias", "pets", "prod"], 2, "either the VERSION"),
        (["finetune", "server:/x", "--name", "cats", "--epochs", "3"], 2, "epochs is a hyper"),
        (
            ["finetune", "server:/x", "--name", "cats", "--method", "domain-adaptation"],
            2,
            "domain_adaptation needs the target",
        ),
        (["finetune", "server:/x", "--name", "cats", "--base", "cats:"], 2, "names no version"),
        (["finetune", "server:/x", "--name", "cats", "--base", "cats@"], 2, "names no alias"),
        (["finetune", "server:/x", "--name", "cats", "--base", "0"], 2, "'0' is not a version"),
        (["finetune", "server:/x", "--name", "pets", "--base", "no"], 1, "[ALIAS_NOT_FOUND]"),
        (["promote", "pets", "latest"], 2, "'latest' is not a version"),
        (["export", "pets", "-o", "/no/such/folder/pets.onnx"], 2, "graft: /no/such/folder: there"),
        (["export", "pets", "-o", "/"], 2, "graft: /: is a folder: name a file"),
        (["finetune", "server:/x", "--name", "a\ud800"], 1, "are not UTF-8"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    run: Run, arguments: list[str], code: int, message: str
) -> None:
    ended, out, err = run(*arguments)
    assert (ended, out) == (code, "")
    assert err.startswith("graft: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["finetune"], ["predict"], ["jobs", "get"], ["--timeout", "0"]],
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("graft")
    assert "--help)" in err
    assert err.count("\n") == 1


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeGraft() as gone:
        target = gone.target
    assert main(["models", "--server", target]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"graft: nothing listens at {target}: is the server running")
    assert err.count("\n") == 1


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"graft {graftml.__version__}\n"


def test_the_environment_names_the_server_and_the_token(
    server: FakeGraft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRAFT_SERVER", server.target)
    monkeypatch.setenv("GRAFT_TOKEN", "secret")
    assert main(["--json", "models"]) == 0
    assert server.calls[0].metadata["authorization"] == "Bearer secret"


def test_without_rich_programs_are_served_and_people_are_told(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    code, _, err = run("models")
    assert code == 2
    assert "pip install 'graftml[cli]'" in err
    assert lines(run("models", "--json")[1])[0]["name"] == "pets"


def test_an_interrupt_outside_of_watching_ends_with_130(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(graftml.Client, "list_models", interrupted)
    assert run("models")[::2] == (130, "graft: interrupted\n")
