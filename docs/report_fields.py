"""Meanings of the report's fields that have no docstring in the code."""

from collections.abc import Mapping

PLAIN: Mapping[str, str] = {
    "Manifest.format": "Version of this format.",
    "Manifest.model": "Name of the model.",
    "Manifest.job_id": "The job that made the version.",
    "Manifest.recipe": 'Training recipe; `""` where no network was trained.',
    "Manifest.backbone": "Name of the backbone.",
    "Manifest.feature_dim": "Number of features that the head takes.",
    "Manifest.classes": "Names of the classes, in the order of the probabilities.",
    "Manifest.temperature": "Divides the head's logits before softmax.",
    "Manifest.dataset_digest": "sha256 of the dataset's content.",
    "Manifest.seed": "Seed of everything random.",
    "Manifest.hyperparameters": "As they were used, the defaults too.",
    "Manifest.preprocess": "How an image file becomes the network's input.",
    "Manifest.decoding": "How an image file becomes pixels.",
    "Manifest.parity": "How well serving agrees with PyTorch.",
    "Manifest.opset": "Opset of the ONNX file.",
    "Manifest.device": "Device that trained it.",
    "Manifest.duration_s": "Time that training took.",
    "Manifest.labels": "Labels that the request gave.",
    "Manifest.base": "The version that it grew from.",
    "Manifest.grouping": "How groups of images were given.",
    "Manifest.augmentation": "As the request gave it.",
    "Manifest.case_sensitive_labels": "Whether class names may differ in case alone.",
    "Figure.measured_on": (
        "The set of images: `test` and `validation` are parts of the data, `held_out` images "
        "that a network was not trained on, `cross_validation` all images, `target` labelled "
        'images of a target domain, `source` those of the source; `""` means none.'
    ),
    "Figure.accuracy": "Fraction of the images that are classified correctly.",
    "ReadSummary.seen": "Files that were found.",
    "ReadSummary.used": "Images that are used.",
    "LeftOut.reason": "See [data](data.md).",
    "LeftOut.label": "The class.",
    "LeftOut.count": "Number of files.",
    "LeftOutFile.reason": "See [data](data.md).",
    "ImageDecoding.framing": "The middle square of an image, or all of it squeezed to a square.",
    "GateCheck.name": "The condition.",
    "Base.version": "Its number.",
    "Augmentation.mirror": "Whether images are mirrored left to right.",
    "Augmentation.trivial_augment": (
        "Whether one of 14 operations is applied in a random strength."
    ),
    "EpochEnded.epoch": "Number of the epoch, from 1.",
    "EpochEnded.epochs": "Epochs that are planned.",
    "EpochEnded.train_loss": "Mean loss over the training images.",
    "EpochEnded.train_accuracy": "Accuracy on the training images, as augmented.",
    "EpochEnded.validation_accuracy": "Accuracy on the same images.",
    "EpochEnded.images_per_second": "Training speed.",
    "EpochEnded.eta_s": "Estimated time until training ends.",
    "EpochEnded.learning_rate": "Learning rate at the end of the epoch.",
    "BackbonesRanked.ranking": "Best first.",
    "RankedBackbone.backbone": "Name of the backbone.",
    "RankedBackbone.feature_dim": "Number of its features.",
    "ClassCount.label": "Name of the class.",
    "ClassCount.train": "Images to learn from.",
    "ClassCount.validation": "Images to validate on.",
    "ClassCount.test": "Images to test on.",
}
