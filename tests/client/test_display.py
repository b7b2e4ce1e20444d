"""What notebooks show of jobs, versions and predictions: the main things, and nothing unescaped."""

from html.parser import HTMLParser
from typing import Any

import graftml
import pytest
from graftml import _answers
from graftml.testing import Answer, FakeGraft, failed, progress, published, running, succeeded
from graftml_stubs.v1 import fine_tuning_pb2, model_pb2

EVIL = "<img src=x onerror=\"alert('1')\"> & \u202eb"
SHOWN = "<img src=x onerror=\"alert('1')\"> & \\u202eb"
DATA = graftml.ServerPath("/images")


class Page(HTMLParser):
    """The tags of a page, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        assert not attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def texts(value: Any) -> list[str]:
    """Returns the texts of what a notebook shows, which is a table and nothing else."""
    page = Page(value._repr_html_())
    assert page.tags == {"table", "caption", "tr", "th", "td"}
    return page.texts


def test_a_job_shows_how_it_stands(connect: Any) -> None:
    with FakeGraft(script=[running(), progress("features", 0.505)]) as server:
        job = connect(server.target).fine_tune(DATA, "pets")
        assert texts(job)[:5] == ["Job job-1", "model", "pets", "state", "QUEUED"]
        job.refresh()
        told = texts(job)
        assert told == texts(job.job)
        assert told[4:7] == ["RUNNING", "stage", "features, 50 %"]
        server.play(job.job_id, published(gate_failures=["too low"]), succeeded())
        job.refresh()
        told = texts(job)
        assert told[4] == "SUCCEEDED, a candidate"
        assert told[-2:] == ["version", "1"]


def test_a_version_shows_how_well_it_does(client: Any, server: FakeGraft) -> None:
    server.add_model("pets")
    told = texts(client.get_version("pets"))
    assert told[:3] == [
        "pets version 1", "accuracy", "1.000 [0.96 to 1.00] by cross-validation over 10 images",
    ]  # fmt: skip
    assert told[told.index("classes") + 1] == "cat, dog"
    assert "candidate" not in told


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (Answer({"cat": 0.75, "dog": 0.25}), ["answer", "cat", "cat", "75.0%", "dog", "25.0%"]),
        (
            Answer({"cat": 0.75, "dog": 0.25}, 2.0, label=""),
            ["answer", "none", "cat", "75.0%", "dog", "25.0%",
             "warning", "unlike the training images"],
        ),
    ],
)  # fmt: skip
def test_a_prediction_shows_its_answer_and_its_scores(
    connect: Any, answer: Answer, shown: list[str]
) -> None:
    with FakeGraft(predict=lambda _model, _image: answer) as server:
        server.add_model("pets")
        [prediction] = connect(server.target).predict(b"x", "pets", top_k=2)
        assert texts(prediction) == ["pets version 1", *shown]


def test_a_prediction_that_failed_shows_its_error(client: Any, server: FakeGraft) -> None:
    server.add_model("pets")
    [prediction] = client.predict(b"", "pets")
    assert texts(prediction) == ["pets version 1", "error", "the image is empty"]


def test_what_strangers_named_is_escaped() -> None:
    error = failed(EVIL).state_change.error
    job = _answers.job(fine_tuning_pb2.Job(job_id=EVIL, model=EVIL, error=error))
    version = _answers.version(
        model_pb2.Version(
            model=EVIL,
            job_id=EVIL,
            classes=[EVIL],
            aliases=[EVIL],
            labels={EVIL: EVIL},
            backbone=EVIL,
            is_candidate=True,
            gate_checks=[model_pb2.GateCheck(detail=EVIL)],
        )
    )
    score = graftml.ClassScore(EVIL, 0.5, 0)
    answered = graftml.Prediction(EVIL, 1, (score,), answer=score)
    refused = graftml.Prediction(EVIL, None, error=graftml.InvalidArgument(EVIL))
    for value in (job, version, answered, refused):
        assert any(SHOWN in text for text in texts(value))
