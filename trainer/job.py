"""What a job works with: its records, its clock, what computes, and the backbone it starts from."""

import functools
import hashlib
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from service.backbones import find, is_registered
from service.contract import (
    BACKBONE_FILE,
    NETWORK_TECHNIQUES,
    REFERENCE_FILE,
    BackbonesRanked,
    DomainAdaptation,
    EpochEnded,
    ExportedBackbone,
    FeatureBased,
    JobSpec,
    ModelBased,
    Note,
    PretrainedBackbone,
    Progressed,
    RankSpec,
    Record,
    form_name,
)
from service.domain import Framing
from service.engine.feature_cache import FeatureCache
from service.engine.head import Floats, Head
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime, Session
from service.errors import NotFound, Reason, unloadable
from service.ops.cpus import available_cores
from trainer import answers, divided, framing, reference
from trainer.arrays import Ints
from trainer.backbone_file import OPSET, BackboneFile, narrowest, runtime_of, settle, takes_int8
from trainer.data import Data, Files, Part
from trainer.divided import Divided
from trainer.features import Features
from trainer.framing import Comparison
from trainer.records import Send
from trainer.reference import Reference
from trainer.stages import Stages
from trainer.weights import Weights

if TYPE_CHECKING:
    from trainer.backbones import Backbone
    from trainer.methods.feature_based import FittedHead

FROZEN_FILE = "frozen.onnx"
"""The pretrained backbone beside one that the job trains; nobody else's."""
FLOAT_FILE = "float.onnx"
"""The pretrained backbone beside its form in int8, which serves; nobody else's."""
_FIRST_HEAD = (0.2, 0.4)
"""Begin and end of the first head within the stage "preparing", as fractions of it."""
_TRAINING_PART = 0.85
"""Of the time that the request allows; export, check and report need the rest."""
_RANKING_PART = 0.25
_RANKING_S = 60.0
"""Longest time to choose a backbone, and the part of the job's budget that it may take."""


class Job:
    """One job's means; made at its start. `start_from` must come before frozen features."""

    def __init__(self, spec: JobSpec, tell: Send) -> None:
        self.spec = spec
        self.started, self.started_at = time.monotonic(), datetime.now(UTC)
        self.stages = Stages("reading")
        self.epochs: list[EpochEnded] = []
        self.out = Path(spec.out_dir)
        self._tell = tell
        # Images are many, and run side by side.
        self.runtime = runtime_of(spec)
        self.cache = _cache(spec, self.send)
        self.weights = ""
        self.weights_licence = ""
        self.known: ExportedBackbone | None = None
        """The frozen backbone's file, where it was made before."""
        self.plain: ExportedBackbone | None = None
        """The same in fp32."""
        # A method that trains writes the version's own backbone under the usual name.
        self.frozen_file = self.out / (FROZEN_FILE if _trains(spec) else BACKBONE_FILE)
        self.choosers: frozenset[str] = frozenset()
        """Digests of the images that chose the backbone."""
        self.precision_note = ""
        """Says for people why frozen features are in int8 though nobody asked for it."""
        self.compared: Comparison | None = None
        """What a sample of the training images tells of their framings."""
        self.framings: tuple[Framing, ...] = ()
        """Framings that are compared on all of the training images, beside theirs."""
        self._frozen: Features | None = None
        self._floating: Features | None = None

    def send(self, record: Record) -> None:
        """Tells a record; epochs are kept for the report."""
        if isinstance(record, EpochEnded):
            self.epochs.append(record)
        self._tell(record)

    def send_without_epochs(self, record: Record) -> None:
        """The same for work whose epochs are not the job's."""
        if not isinstance(record, EpochEnded):
            self._tell(record)

    def _send_first_head(self, record: Record) -> None:
        # The first head is fitted before the training, and is part of preparing it.
        if isinstance(record, Progressed) and record.stage == "training":
            low, high = _FIRST_HEAD
            share = low + (high - low) * record.fraction
            record = Progressed("preparing", share, record.detail)
        self.send_without_epochs(record)

    def choose_backbone(self, part: Part) -> BackbonesRanked:
        """Starts from the backbone whose frozen features fit the training images best."""
        from trainer import ranking

        spec = self.spec
        budget_s = _RANKING_S
        if spec.time_budget_s is not None:
            budget_s = min(budget_s, spec.time_budget_s * _RANKING_PART)
        asked = RankSpec(
            data=spec.data,
            files=spec.files,
            backbones=spec.backbones,
            work_dir=spec.out_dir,
            weights_dir=spec.weights_dir,
            time_budget_s=budget_s,
            seed=spec.seed,
            threads=spec.threads,
            provider=spec.provider,
            precision=spec.precision,
            provider_table=spec.provider_table,
            feature_cache=spec.feature_cache,
            feature_cache_bytes=spec.feature_cache_bytes,
            feature_cache_owner=spec.feature_cache_owner,
            only_available=True,
        )
        asking = ranking.choosers(part, spec.seed)
        chosen, ranked = ranking.choose(asked, asking, self.runtime, self.send_without_epochs)
        self.choosers = frozenset(asking.digests)
        self.send(Note("info", ranked.explanation))
        self.start_from(chosen)
        return ranked

    def start_from(self, pretrained: PretrainedBackbone) -> None:
        """Settles the backbone and its weights; nothing is loaded yet.

        Weights that are named by their file's digest are downloaded now, and stay these.
        """
        folder = Path(self.spec.weights_dir)
        asked = Weights(pretrained.backbone, pretrained.weights, self.spec.seed, folder)
        if asked.is_named_by_digest:
            self.send(Progressed("preparing", 0.0, f"looking for the weights of {asked.row.name}"))
            asked.fetch()
        self.weights, self.weights_licence = asked.name, asked.licence
        self.spec = msgspec.structs.replace(
            self.spec,
            backbone=pretrained.backbone,
            weights=self.weights if asked.is_named_by_digest else pretrained.weights,
            exported=pretrained.exported,
        )
        if asked.is_random:
            text = "the backbone starts from random weights: it was never pretrained"
            self.send(Note("warning", text))
        self.plain = plain = self._exported(self.weights)
        precision = narrowest(self.spec.precision, self.runtime)
        self.known = self._exported(form_name(self.weights, precision))
        if self.is_registered:
            if plain is None:
                raise NotFound(
                    Reason.BACKBONE_NOT_FOUND,
                    f"the file of the registered backbone {pretrained.backbone} is not on this "
                    "server: register it again, or name another backbone",
                )
            self.weights_licence = plain.licence
        else:
            self._reference_of(plain, self.known)
        int8 = takes_int8(self.spec, self.weights, self.runtime)
        float_file = self.out / FLOAT_FILE if int8 else self.frozen_file
        self._file = self._backbone_file(self.known, float_file, self._make)
        self._floating = self._frozen = self._features_of(self._file)
        if int8:
            form = self._exported(form_name(self.weights, "int8"))
            made = self._backbone_file(form, self.frozen_file, self._quantise)
            self._frozen = self._features_of(made)
            self.precision_note = (
                "int8 where nobody chose: heads on this backbone were shown to lose little by it "
                "(docs/evidence/quality.md). What it costs this version is measured where the "
                "request names it"
            )
            self.frozen_file = made.path
        else:
            self.frozen_file = self._file.path

    def _backbone_file(
        self, known: ExportedBackbone | None, path: Path, make: Callable[[Path], None]
    ) -> BackboneFile:
        if known is not None:
            return BackboneFile(self.file(known.digest), self.runtime, known.digest)
        return BackboneFile(path, self.runtime, "", make)

    def _features_of(self, file: BackboneFile) -> Features:
        return Features(file, self.cache, self.spec.threads, self.send)

    def _reference_of(self, *forms: ExportedBackbone | None) -> None:
        """Finds the reference beside a form; without one the backbone is exported anew."""
        digests = [form.reference for form in forms if form is not None]
        self._known_reference = next((d for d in digests if d in self.spec.files), "")
        if self._known_reference:
            self._reference_file = self.file(self._known_reference)
        else:
            self._reference_file = self.out / REFERENCE_FILE
            self.plain = self.known = None

    def _exported(self, name: str) -> ExportedBackbone | None:
        exported = self.spec.exported
        return next(
            (e for e in exported if e.weights == name and e.digest in self.spec.files), None
        )

    def file(self, digest: str) -> Path:
        """Returns the path of a stored file that the spec names by its sha256."""
        return Path(self.spec.files[digest])

    @property
    def is_registered(self) -> bool:
        """Whether the backbone is a file that a tenant registered, without a network to train."""
        return is_registered(self.spec.backbone)

    @property
    def opset(self) -> int:
        """Returns the version of ONNX's operators that the frozen backbone's file is made of."""
        return self._file.opset if self.is_registered else OPSET

    @property
    def frozen(self) -> Features:
        """Features of the pretrained backbone."""
        assert self._frozen is not None, "start_from comes first"
        return self._frozen

    @property
    def floating(self) -> Features:
        """Features of the pretrained backbone in floats, where `frozen` are those in int8.

        Else the same.
        """
        assert self._floating is not None, "start_from comes first"
        return self._floating

    def timed_session(self) -> Session:
        """Loads what a forward pass is timed on, to estimate what training the network would take.

        In fp32 where frozen features are in int8: bf16, in which the floats may be meant to be
        served, speeds PyTorch's training up by much less than OpenVINO's serving.
        """
        if self.floating is self.frozen or self.plain is None:
            return self.floating.session
        runtime = OnnxRuntime(Provider("cpu", "to be timed"), self.spec.threads, is_narrow=True)
        return BackboneFile(self.file(self.plain.digest), runtime, self.plain.digest).load()

    @property
    def size(self) -> int:
        """Returns the side of the images that the backbone takes, pixels."""
        row = find(self.spec.backbone)
        return row.size if row and row.size else self._file.size

    @functools.cached_property
    def backbone(self) -> "Backbone":
        """The network, which a method that trains changes in place."""
        return self.pretrained()

    def pretrained(self) -> "Backbone":
        """Builds the network as it was pretrained.

        Imports torch: seconds that neither bad data nor a repeated job need wait for.
        """
        import torch

        from trainer import backbones

        torch.set_num_threads(self.spec.threads or available_cores())
        weights_dir = Path(self.spec.weights_dir)
        return backbones.load(self.spec.backbone, self.spec.weights, self.spec.seed, weights_dir)

    @functools.cached_property
    def reference(self) -> Reference:
        """What is known of the frozen backbone's file, which is made if need be.

        Of a shared backbone: a registered one has none.
        """
        if not self._reference_file.exists():
            self._file.ensure()
        found = reference.load(self._reference_file)
        if self.plain is not None and found.backbone_digest != self.plain.digest:
            raise unloadable("backbone's reference", "is another file's")
        return found

    @property
    def reference_digest(self) -> str:
        """Returns the sha256 of the reference's file; "" of a registered backbone, without one."""
        if self.is_registered:
            return ""
        if self._known_reference:
            return self._known_reference
        with self._reference_file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def sureness(self, features: Floats) -> float | None:
        """Measures how well the pretrained classifier knows images by last-layer features [n, d].

        Returns the mean of its highest probability; None without one.
        """
        known = None if self.is_registered else self.reference.classifier
        return None if known is None else known.sureness(features)

    def features_of_file(self, file: Path, digest: str = "") -> Features:
        """Of another backbone's file; kept between jobs where its digest is known."""
        cache = self.cache if digest else None
        source = BackboneFile(file, self.runtime, digest)
        return Features(source, cache, self.spec.threads, self.send)

    def framed(self, data: Data) -> Data:
        """Returns the images in the framing that a sample of them chooses, if it is open."""
        if framing.is_open(self.spec, data.train):
            self.compared = framing.compare(data.train, self.frozen, self.spec.threads)
            if self.compared is None:
                self.framings = framing.BOTH[1:]
            else:
                decoding = data.train.decoding
                chosen = msgspec.structs.replace(decoding, framing=self.compared.best)
                return data.decoded(chosen)
        return data

    def divided(self, data: Data) -> Divided:
        """Finds which of the images belong together, by their frozen features.

        Those of training images in further framings that they are compared in are computed
        meanwhile.
        """
        previous: dict[str, answers.Answer] = {}
        if self.spec.previous_answers:
            try:
                previous = answers.load(self.file(self.spec.previous_answers))
            except (KeyError, OSError, ValueError) as error:
                text = f"what the version before learned from is not known ({error})"
                self.send(Note("warning", text))
        parts = [part for part in (data.train, data.validation, data.test) if len(part)]
        if not self.framings:
            # In one pass, of which no core waits for the end of another part's.
            self.frozen.of(Files.joined(parts))
        rows = [self.frozen.of(data.train, "training images", self.framings)]
        rows += [self.frozen.of(part, "images to measure on") for part in parts[1:]]
        return divided.divide(data, np.concatenate(rows), previous, self.choosers)

    def linear_probe(self, part: Part, folds: Ints, classes: tuple[str, ...]) -> Head:
        """Fits a head to the frozen backbone's last layer, which training may begin with."""
        from trainer.methods import feature_based

        def told(done: float) -> None:
            self._send_first_head(
                Progressed("training", done, "the head that training begins with")
            )

        spec = self.spec
        return feature_based.linear_probe(
            self.frozen.of(part), part.targets, folds, classes, spec.seed, spec.threads, told
        )

    def first_head(self, part: Part, folds: Ints, classes: tuple[str, ...]) -> "FittedHead":
        """Fits a head to the frozen backbone: source-only, where a domain is adapted to."""
        from trainer.methods import feature_based

        return feature_based.fit_head(
            FeatureBased(), part, folds, classes, self.frozen, self.spec.seed,
            self._send_first_head, self.spec.threads,
        )  # fmt: skip

    @property
    def training_deadline(self) -> float | None:
        """Returns when epochs must have ended, as a `time.monotonic()`; None for no bound."""
        budget_s = self.spec.time_budget_s
        return None if budget_s is None else self.started + _TRAINING_PART * budget_s

    @property
    def training_budget_s(self) -> float | None:
        """Returns the seconds that are left for training; None where the request names none."""
        if (asked_s := self.spec.asked_budget_s) is None:
            return None
        return max(0.0, _TRAINING_PART * asked_s - (time.monotonic() - self.started))

    def set_frozen_aside(self) -> None:
        """Leaves the backbone's usual name to one that was trained."""
        if self.frozen_file == self.out / BACKBONE_FILE:
            self.frozen_file = self.frozen_file.rename(self.out / FROZEN_FILE)

    def publish_frozen(self) -> None:
        """Gives the backbone's usual name back to the pretrained one."""
        (self.out / BACKBONE_FILE).unlink(missing_ok=True)
        if self.frozen_file == self.out / FROZEN_FILE:
            self.frozen_file = self.frozen_file.rename(self.out / BACKBONE_FILE)

    def close(self) -> None:
        """Ends the use of the feature cache."""
        if self.cache is not None:
            self.cache.close()

    def _make(self, path: Path) -> None:
        if self.plain is not None:
            shutil.copyfile(self.file(self.plain.digest), path)
        else:
            self._export(path)
        settle(path, self.spec.precision, self.runtime)

    def _quantise(self, path: Path) -> None:
        from trainer import quantise

        self._file.ensure()
        self.send(Progressed("preparing", 0.1, f"quantising {self.spec.backbone} to int8"))
        is_made = quantise.to_int8(self._file.path, path)
        assert is_made, "what holds in int8 has layers between its ends"

    def _export(self, path: Path) -> None:
        from trainer import backbones, export

        spec = self.spec
        self.send(Progressed("preparing", 0.1, f"exporting {spec.backbone}"))
        # Frozen features may be asked for when the network was trained already.
        network = self.pretrained() if _trains(spec) else self.backbone
        top = backbones.classifier(spec.backbone, spec.weights, Path(spec.weights_dir))
        export.shared(network, top, path, self._reference_file)


def _trains(spec: JobSpec) -> bool:
    method = spec.method
    if isinstance(method, DomainAdaptation):
        return method.technique in NETWORK_TECHNIQUES
    return isinstance(method, ModelBased)


def _cache(spec: JobSpec, send: Send) -> FeatureCache | None:
    if not spec.feature_cache:
        return None
    return FeatureCache(
        Path(spec.feature_cache),
        spec.feature_cache_bytes,
        lambda text: send(Note("info", text)),
        owner=spec.feature_cache_owner,
    )
