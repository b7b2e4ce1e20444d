"""The part of the soak that does what careful users do: models, aliases, datasets, exports.

Each call says what it may answer, and what is answered is checked.
"""

import io
import itertools
import random
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from graftml import Gate, GraftError
from graftml.types import Prediction, StateChanged
from PIL import Image

from bench.soak import verdict
from bench.soak.book import OK, REFUSALS, Book
from bench.soak.server import Tenant

STABLE = "stable"
"""The model that the steady load asks for."""
NAMES, KEPT = 3, 3
"""Names that fresh models take in turn; versions of each."""
DELETE_EVERY, GATE_EVERY = 8, 4
"""In rounds."""
UNREACHABLE = Gate(max_latency_ms=0.001)
SURE = 0.6
"""A probability that no noise of the numbers brings below that of another class."""
JOB_TIMEOUT_S = 300.0
_RANKED = "efficientnet_lite0"
_SUBSETS = 4
"""Different datasets that are learned from; the same images are one dataset."""

Pairs = list[tuple[str, Path]]


def subsets(folder: Path, per_class: int = 8) -> list[Pairs]:
    """Cuts a folder per class into small sets of real images that share some."""
    labels = sorted(path for path in folder.iterdir() if path.is_dir())[:3]
    found: list[Pairs] = [[] for _ in range(_SUBSETS)]
    for label in labels:
        photos = sorted(label.rglob("*.jpg"))
        for number, pairs in enumerate(found):
            first = number * per_class // 2 % max(1, len(photos) - per_class)
            pairs += [(label.name, photo) for photo in photos[first : first + per_class]]
    return found


class User:
    """One tenant's, who never does two things at once with a fresh model."""

    def __init__(
        self, address: str, book: Book, tenant: Tenant, folder: Path, *, trains: bool
    ) -> None:
        self._trains = trains
        self._client = tenant.client(address)
        self._book = book
        self._tenant = tenant
        self.data = [
            [(tenant.label(label), photo) for label, photo in pairs] for pairs in subsets(folder)
        ]
        self._round = 0
        self._known: list[tuple[str, Path]] = []

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()

    def is_sound(self) -> None:
        """Finds what is lost."""
        with self._book.at_work("the search for what is lost"):
            verdict.nothing_is_lost(self._client, self._book, self._tenant)

    def make_stable(self) -> None:
        """Makes the model of the steady load, and asks which images it is sure of."""
        handle = self._client.fine_tune(self.data[0], name=STABLE)
        self._book.job_started(handle.job_id, self._tenant.name)
        version = handle.wait(timeout_s=JOB_TIMEOUT_S)
        self._book.job_ended(handle.job_id, "SUCCEEDED", handle.job.attempts)
        self._book.published(self._tenant.name, STABLE, version.version)
        answers = self._client.predict([photo for _, photo in self.data[0]], STABLE)
        self._known = [
            pair for pair, answer in zip(self.data[0], answers, strict=True)
            if answer.label == pair[0] and (answer.probability or 0) >= SURE
        ]  # fmt: skip
        if self._trains:
            enough = 2 * len(self._known) >= len(answers)
            self._book.expect("a stable model is sure of little", enough, len(self._known))

    def look(self) -> None:
        """Asks for known images, and lists everything, page by page."""
        book, client = self._book, self._client
        if self._known:
            photos = [photo for _, photo in self._known]
            may = {OK, *REFUSALS}
            answers = book.call("Predict known images", may, client.predict, photos, STABLE)
            if answers is not None:
                right = [each.label for each in answers] == [label for label, _ in self._known]
                book.expect("known images answered wrongly", right, answers)
        book.call("ListModels", OK, lambda: list(client.list_models()))
        book.call("ListDatasets", OK, lambda: list(client.list_datasets()))
        book.call("ListJobs", OK, lambda: [*zip(client.list_jobs(), range(50), strict=False)])

    def fine_tune(self) -> None:
        """Takes a fresh model from its images to its deletion, at some point."""
        book, client, name = self._book, self._client, f"fresh-{self._round % NAMES}"
        self._round += 1
        pairs = random.choice(self.data)
        gate = UNREACHABLE if self._trains and self._round % GATE_EVERY == 0 else None
        handle = book.call(
            "FineTune", OK, client.fine_tune, pairs, name, seed=self._round, gate=gate
        )
        if handle is None:
            return
        book.job_started(handle.job_id, self._tenant.name)
        version = handle.refresh().version if self._follow(handle.job_id) else None
        if version is None:
            return
        book.published(self._tenant.name, name, version)
        image = pairs[0][1]
        if gate is not None:
            made = book.call("GetVersion", OK, client.get_version, name, version=version)
            held = made is None or (made.is_candidate and "latest" not in made.aliases)
            book.expect("a gate let all through", held, made)
            self._first_answer(image, name, version, version=version)
            promoted = book.call("PromoteVersion", OK, client.promote_version, name, version)
            moved = promoted is None or promoted.aliases.get("latest") == version
            book.expect("a promotion did not move latest", moved, promoted)
        self._first_answer(image, name, version)
        self._move(name, version)
        self._first_answer(image, name, version, alias="live")
        self._tidy(name, image)

    def _first_answer(self, image: Path, name: str, expected: int, **which: Any) -> None:
        may, client = {OK, *REFUSALS}, self._client
        answers = self._book.call("Predict a fresh model", may, client.predict, image, name,
                                  **which)  # fmt: skip
        if answers is not None:
            right = answers[0].version == expected and self._owns(answers)
            self._book.expect("a fresh model answered wrongly", right, (name, expected, answers))

    def _owns(self, answers: list[Prediction]) -> bool:
        return self._tenant.owns(answer.label or "" for answer in answers)

    def _move(self, name: str, version: int) -> None:
        # Points `live` to a version, back, and there again.
        book, client = self._book, self._client
        book.call("SetAlias", OK, client.set_alias, name, "live", version)
        # Where `live` pointed before may have been deleted, or it is new.
        back = book.call("RollbackAlias", {OK, "NO_EARLIER_VERSION"}, client.rollback_alias,
                         name, "live")  # fmt: skip
        if back is not None:
            now = book.call("GetVersion", OK, client.get_version, name, alias="live")
            right = now is None or now.version == back.to_version != version
            book.expect("a rollback went elsewhere", right, (name, version, back, now))
        book.call("SetAlias", OK, client.set_alias, name, "live", version)

    def _tidy(self, name: str, image: Path) -> None:
        book, client, known = self._book, self._client, self._book.versions
        mine = known.setdefault((self._tenant.name, name), set())
        listed = book.call("ListVersions", OK, lambda: list(client.list_versions(name)))
        if listed is not None:
            numbers = {each.version for each in listed}
            book.expect("versions were lost", mine <= numbers, f"{name}: {mine} of {numbers}")
            free = sorted(each.version for each in listed if not each.aliases)
            for old in free[: max(0, len(listed) - KEPT)]:
                book.call("DeleteVersion", OK, client.delete_version, name, old)
                mine.discard(old)
        if self._round % DELETE_EVERY == 0:
            book.call("DeleteModel", OK, client.delete_model, name, force=True)
            mine.clear()
            book.call("Predict a deleted model", "MODEL_NOT_FOUND", client.predict, image, name)

    def _follow(self, job_id: str) -> bool:
        # Watches a job to its end, with a break; whether it succeeded.
        book, client, state = self._book, self._client, ""
        numbers: list[int] = []
        leave_after = random.randint(1, 6)
        try:
            for most in (leave_after, None):
                events = client.watch_job(job_id, after=len(numbers), timeout_s=JOB_TIMEOUT_S)
                for event in itertools.islice(events, most):
                    numbers.append(event.sequence)
                    if isinstance(event.payload, StateChanged):
                        state = event.payload.state.value
            book.count("WatchJob", OK, OK, "")
        except GraftError as error:
            book.count("WatchJob", error.reason or error.code.name, OK, str(error))
        right = numbers == list(range(1, len(numbers) + 1))
        book.expect("events with gaps", right, f"{job_id}: {numbers}")
        job = book.call("GetJob", OK, client.get_job, job_id)
        if job is not None:
            agree = job.state.value == state
            book.expect("a watcher and GetJob disagree", agree, f"{job_id}: {state}, {job.state}")
            book.job_ended(job_id, job.state.value, job.attempts)
        return state == "SUCCEEDED"

    def cancel(self, stop: threading.Event) -> None:
        """Starts a job and asks for its end a moment later; both ends are right."""
        book, client = self._book, self._client
        handle = book.call("FineTune", OK, client.fine_tune, self.data[1], "cancelled")
        if handle is None:
            return
        book.job_started(handle.job_id, self._tenant.name, is_cancelled=True)
        stop.wait(random.choice([0.0, random.uniform(0, 2)]))
        book.call("CancelJob", {OK, "JOB_FINISHED"}, client.cancel_job, handle.job_id)
        if self._follow(handle.job_id):
            # Too late: it is there, and goes.
            book.call("DeleteModel", OK, client.delete_model, "cancelled", force=True)

    def upload(self) -> None:
        """Uploads images that were never there, has a look at them, deletes them."""
        book, client = self._book, self._client
        images: list[Any] = [*self.data[2][:3], *self.data[2][-3:]]
        images += [(label, _new_image()) for label in {label for label, _ in self.data[2]}]
        dataset = book.call("UploadDataset", OK, client.upload_dataset, images)
        if dataset is None:
            return
        found = book.call("GetDataset", OK, client.get_dataset, dataset.dataset_id)
        right = found == dataset and dataset.image_count == len(images)
        book.expect("a dataset is not what was sent", right, (found, dataset))
        again = book.call("UploadDataset again", OK, client.upload_dataset, images)
        same = again is None or again.dataset_id == dataset.dataset_id
        book.expect("the same images are another dataset", same, (again, dataset))
        book.call("DeleteDataset", OK, client.delete_dataset, dataset.dataset_id)
        book.call("GetDataset of a deleted one", "DATASET_NOT_FOUND", client.get_dataset,
                  dataset.dataset_id)  # fmt: skip

    def export(self) -> None:
        """Takes the stable model away as one file, its report, and a stream of answers."""
        book, client = self._book, self._client
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "stable.onnx"
            if book.call("ExportModel", OK, client.export_model, STABLE, path) is not None:
                onnx.checker.check_model(onnx.load(path))
        version = book.call("GetVersion", OK, client.get_version, STABLE)
        owns = version is None or self._tenant.owns(version.classes)
        book.expect("a version's classes are another's", owns, version)
        report = book.call("GetReport", OK, client.get_report, STABLE)
        book.expect("a report is empty", report is not None, "GetReport gave nothing")
        book.call("GetReport as HTML", OK, client.get_report_html, STABLE)
        images = [photo for _, photo in self.data[0][:8]]
        streamed = book.call(
            "PredictStream", {OK, *REFUSALS}, lambda: list(client.predict_stream(images, STABLE))
        )
        right = streamed is None or (len(streamed) == len(images) and self._owns(streamed))
        book.expect("a stream answered wrongly", right, streamed)

    def rank(self) -> None:
        """Ranks the default backbone alone; takes a trainer and its time."""
        ranked: Callable[..., Any] = self._client.rank_backbones
        found = self._book.call("RankBackbones", OK, ranked, self.data[3], backbones=[_RANKED],
                                time_budget_s=60)  # fmt: skip
        right = found is None or [each.backbone for each in found.backbones] == [_RANKED]
        self._book.expect("a ranking is of others", right, found)


def _new_image() -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng().integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
