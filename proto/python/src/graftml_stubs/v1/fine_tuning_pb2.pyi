import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.rpc import status_pb2 as _status_pb2
from graftml_stubs.v1 import dataset_pb2 as _dataset_pb2
from graftml_stubs.v1 import decision_pb2 as _decision_pb2
from graftml_stubs.v1 import model_pb2 as _model_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_KIND_UNSPECIFIED: _ClassVar[JobKind]
    JOB_KIND_FINE_TUNE: _ClassVar[JobKind]
    JOB_KIND_RANKING: _ClassVar[JobKind]

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_SUCCEEDED: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]

class Device(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DEVICE_UNSPECIFIED: _ClassVar[Device]
    DEVICE_CPU: _ClassVar[Device]
    DEVICE_CUDA: _ClassVar[Device]

class Framing(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FRAMING_UNSPECIFIED: _ClassVar[Framing]
    FRAMING_CROP: _ClassVar[Framing]
    FRAMING_WHOLE: _ClassVar[Framing]
    FRAMING_COMPARE: _ClassVar[Framing]

class ServingPrecision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SERVING_PRECISION_UNSPECIFIED: _ClassVar[ServingPrecision]
    SERVING_PRECISION_FP32: _ClassVar[ServingPrecision]
    SERVING_PRECISION_BF16: _ClassVar[ServingPrecision]
    SERVING_PRECISION_FP16: _ClassVar[ServingPrecision]
    SERVING_PRECISION_INT8: _ClassVar[ServingPrecision]

class Recipe(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RECIPE_UNSPECIFIED: _ClassVar[Recipe]
    RECIPE_AUTO: _ClassVar[Recipe]
    RECIPE_CLASSIC: _ClassVar[Recipe]

class Precision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRECISION_UNSPECIFIED: _ClassVar[Precision]
    PRECISION_FP32: _ClassVar[Precision]
    PRECISION_BF16: _ClassVar[Precision]
    PRECISION_FP16: _ClassVar[Precision]

class AdaptationTechnique(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTATION_TECHNIQUE_UNSPECIFIED: _ClassVar[AdaptationTechnique]
    ADAPTATION_TECHNIQUE_AUTO: _ClassVar[AdaptationTechnique]
    ADAPTATION_TECHNIQUE_CORAL: _ClassVar[AdaptationTechnique]
    ADAPTATION_TECHNIQUE_MCC: _ClassVar[AdaptationTechnique]
    ADAPTATION_TECHNIQUE_PSEUDO_LABELS: _ClassVar[AdaptationTechnique]
    ADAPTATION_TECHNIQUE_CDAN: _ClassVar[AdaptationTechnique]

class Baseline(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BASELINE_UNSPECIFIED: _ClassVar[Baseline]
    BASELINE_LINEAR_PROBE: _ClassVar[Baseline]
    BASELINE_FULL_FINE_TUNE: _ClassVar[Baseline]
    BASELINE_FROM_SCRATCH: _ClassVar[Baseline]
    BASELINE_NEAREST_CLASS_MEAN: _ClassVar[Baseline]

class WhenUncertain(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WHEN_UNCERTAIN_UNSPECIFIED: _ClassVar[WhenUncertain]
    WHEN_UNCERTAIN_HOLD: _ClassVar[WhenUncertain]
    WHEN_UNCERTAIN_PROMOTE: _ClassVar[WhenUncertain]
JOB_KIND_UNSPECIFIED: JobKind
JOB_KIND_FINE_TUNE: JobKind
JOB_KIND_RANKING: JobKind
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_SUCCEEDED: JobState
JOB_STATE_FAILED: JobState
JOB_STATE_CANCELLED: JobState
DEVICE_UNSPECIFIED: Device
DEVICE_CPU: Device
DEVICE_CUDA: Device
FRAMING_UNSPECIFIED: Framing
FRAMING_CROP: Framing
FRAMING_WHOLE: Framing
FRAMING_COMPARE: Framing
SERVING_PRECISION_UNSPECIFIED: ServingPrecision
SERVING_PRECISION_FP32: ServingPrecision
SERVING_PRECISION_BF16: ServingPrecision
SERVING_PRECISION_FP16: ServingPrecision
SERVING_PRECISION_INT8: ServingPrecision
RECIPE_UNSPECIFIED: Recipe
RECIPE_AUTO: Recipe
RECIPE_CLASSIC: Recipe
PRECISION_UNSPECIFIED: Precision
PRECISION_FP32: Precision
PRECISION_BF16: Precision
PRECISION_FP16: Precision
ADAPTATION_TECHNIQUE_UNSPECIFIED: AdaptationTechnique
ADAPTATION_TECHNIQUE_AUTO: AdaptationTechnique
ADAPTATION_TECHNIQUE_CORAL: AdaptationTechnique
ADAPTATION_TECHNIQUE_MCC: AdaptationTechnique
ADAPTATION_TECHNIQUE_PSEUDO_LABELS: AdaptationTechnique
ADAPTATION_TECHNIQUE_CDAN: AdaptationTechnique
BASELINE_UNSPECIFIED: Baseline
BASELINE_LINEAR_PROBE: Baseline
BASELINE_FULL_FINE_TUNE: Baseline
BASELINE_FROM_SCRATCH: Baseline
BASELINE_NEAREST_CLASS_MEAN: Baseline
WHEN_UNCERTAIN_UNSPECIFIED: WhenUncertain
WHEN_UNCERTAIN_HOLD: WhenUncertain
WHEN_UNCERTAIN_PROMOTE: WhenUncertain

class ServerPath(_message.Message):
    __slots__ = ("path",)
    PATH_FIELD_NUMBER: _ClassVar[int]
    path: str
    def __init__(self, path: _Optional[str] = ...) -> None: ...

class InlineImages(_message.Message):
    __slots__ = ("images",)
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[_dataset_pb2.LabelledImage]
    def __init__(self, images: _Optional[_Iterable[_Union[_dataset_pb2.LabelledImage, _Mapping]]] = ...) -> None: ...

class Auto(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FeatureBased(_message.Message):
    __slots__ = ("l2", "augmented_views")
    L2_FIELD_NUMBER: _ClassVar[int]
    AUGMENTED_VIEWS_FIELD_NUMBER: _ClassVar[int]
    l2: float
    augmented_views: int
    def __init__(self, l2: _Optional[float] = ..., augmented_views: _Optional[int] = ...) -> None: ...

class ModelBased(_message.Message):
    __slots__ = ("recipe", "epochs", "batch_size", "learning_rate", "momentum", "weight_decay", "label_smoothing", "train_from_stage", "freeze_batch_norm", "precision")
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    LABEL_SMOOTHING_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FROM_STAGE_FIELD_NUMBER: _ClassVar[int]
    FREEZE_BATCH_NORM_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    recipe: Recipe
    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    train_from_stage: str
    freeze_batch_norm: bool
    precision: Precision
    def __init__(self, recipe: _Optional[_Union[Recipe, str]] = ..., epochs: _Optional[int] = ..., batch_size: _Optional[int] = ..., learning_rate: _Optional[float] = ..., momentum: _Optional[float] = ..., weight_decay: _Optional[float] = ..., label_smoothing: _Optional[float] = ..., train_from_stage: _Optional[str] = ..., freeze_batch_norm: _Optional[bool] = ..., precision: _Optional[_Union[Precision, str]] = ...) -> None: ...

class DomainAdaptation(_message.Message):
    __slots__ = ("target_path", "target_dataset_id", "target_images", "technique", "always_adapt", "evaluate_on_target", "epochs", "batch_size", "learning_rate")
    TARGET_PATH_FIELD_NUMBER: _ClassVar[int]
    TARGET_DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    TARGET_IMAGES_FIELD_NUMBER: _ClassVar[int]
    TECHNIQUE_FIELD_NUMBER: _ClassVar[int]
    ALWAYS_ADAPT_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_ON_TARGET_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    target_path: ServerPath
    target_dataset_id: str
    target_images: InlineImages
    technique: AdaptationTechnique
    always_adapt: bool
    evaluate_on_target: bool
    epochs: int
    batch_size: int
    learning_rate: float
    def __init__(self, target_path: _Optional[_Union[ServerPath, _Mapping]] = ..., target_dataset_id: _Optional[str] = ..., target_images: _Optional[_Union[InlineImages, _Mapping]] = ..., technique: _Optional[_Union[AdaptationTechnique, str]] = ..., always_adapt: _Optional[bool] = ..., evaluate_on_target: _Optional[bool] = ..., epochs: _Optional[int] = ..., batch_size: _Optional[int] = ..., learning_rate: _Optional[float] = ...) -> None: ...

class Gate(_message.Message):
    __slots__ = ("min_accuracy", "min_class_recall", "class_recalls", "not_worse_than", "max_regression", "when_uncertain", "max_parity_difference", "max_latency", "alias")
    class ClassRecallsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MIN_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    MIN_CLASS_RECALL_FIELD_NUMBER: _ClassVar[int]
    CLASS_RECALLS_FIELD_NUMBER: _ClassVar[int]
    NOT_WORSE_THAN_FIELD_NUMBER: _ClassVar[int]
    MAX_REGRESSION_FIELD_NUMBER: _ClassVar[int]
    WHEN_UNCERTAIN_FIELD_NUMBER: _ClassVar[int]
    MAX_PARITY_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    MAX_LATENCY_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    min_accuracy: float
    min_class_recall: float
    class_recalls: _containers.ScalarMap[str, float]
    not_worse_than: str
    max_regression: float
    when_uncertain: WhenUncertain
    max_parity_difference: float
    max_latency: _duration_pb2.Duration
    alias: str
    def __init__(self, min_accuracy: _Optional[float] = ..., min_class_recall: _Optional[float] = ..., class_recalls: _Optional[_Mapping[str, float]] = ..., not_worse_than: _Optional[str] = ..., max_regression: _Optional[float] = ..., when_uncertain: _Optional[_Union[WhenUncertain, str]] = ..., max_parity_difference: _Optional[float] = ..., max_latency: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., alias: _Optional[str] = ...) -> None: ...

class Grouping(_message.Message):
    __slots__ = ("folder_level", "name_pattern")
    FOLDER_LEVEL_FIELD_NUMBER: _ClassVar[int]
    NAME_PATTERN_FIELD_NUMBER: _ClassVar[int]
    folder_level: int
    name_pattern: str
    def __init__(self, folder_level: _Optional[int] = ..., name_pattern: _Optional[str] = ...) -> None: ...

class Augmentation(_message.Message):
    __slots__ = ("mirror", "min_scale", "rotation_degrees", "colour", "trivial_augment")
    MIRROR_FIELD_NUMBER: _ClassVar[int]
    MIN_SCALE_FIELD_NUMBER: _ClassVar[int]
    ROTATION_DEGREES_FIELD_NUMBER: _ClassVar[int]
    COLOUR_FIELD_NUMBER: _ClassVar[int]
    TRIVIAL_AUGMENT_FIELD_NUMBER: _ClassVar[int]
    mirror: bool
    min_scale: float
    rotation_degrees: float
    colour: float
    trivial_augment: bool
    def __init__(self, mirror: _Optional[bool] = ..., min_scale: _Optional[float] = ..., rotation_degrees: _Optional[float] = ..., colour: _Optional[float] = ..., trivial_augment: _Optional[bool] = ...) -> None: ...

class BaseVersion(_message.Message):
    __slots__ = ("version", "alias", "model")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    version: int
    alias: str
    model: str
    def __init__(self, version: _Optional[int] = ..., alias: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class FineTuneRequest(_message.Message):
    __slots__ = ("model", "server_path", "dataset_id", "inline_images", "backbone", "weights", "auto", "feature_based", "model_based", "domain_adaptation", "validation_fraction", "seed", "time_budget", "device", "background", "framing", "serving_precision", "labels", "request_id", "baselines", "gate", "base", "grouping", "case_sensitive_labels", "decision", "outlier_false_alarm_rate", "augmentation", "validate_only")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SERVER_PATH_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    INLINE_IMAGES_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    AUTO_FIELD_NUMBER: _ClassVar[int]
    FEATURE_BASED_FIELD_NUMBER: _ClassVar[int]
    MODEL_BASED_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_ADAPTATION_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_FRACTION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TIME_BUDGET_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BACKGROUND_FIELD_NUMBER: _ClassVar[int]
    FRAMING_FIELD_NUMBER: _ClassVar[int]
    SERVING_PRECISION_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BASELINES_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    GROUPING_FIELD_NUMBER: _ClassVar[int]
    CASE_SENSITIVE_LABELS_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    OUTLIER_FALSE_ALARM_RATE_FIELD_NUMBER: _ClassVar[int]
    AUGMENTATION_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    model: str
    server_path: ServerPath
    dataset_id: str
    inline_images: InlineImages
    backbone: str
    weights: str
    auto: Auto
    feature_based: FeatureBased
    model_based: ModelBased
    domain_adaptation: DomainAdaptation
    validation_fraction: float
    seed: int
    time_budget: _duration_pb2.Duration
    device: Device
    background: str
    framing: Framing
    serving_precision: ServingPrecision
    labels: _containers.ScalarMap[str, str]
    request_id: str
    baselines: _containers.RepeatedScalarFieldContainer[Baseline]
    gate: Gate
    base: BaseVersion
    grouping: Grouping
    case_sensitive_labels: bool
    decision: _decision_pb2.Decision
    outlier_false_alarm_rate: float
    augmentation: Augmentation
    validate_only: bool
    def __init__(self, model: _Optional[str] = ..., server_path: _Optional[_Union[ServerPath, _Mapping]] = ..., dataset_id: _Optional[str] = ..., inline_images: _Optional[_Union[InlineImages, _Mapping]] = ..., backbone: _Optional[str] = ..., weights: _Optional[str] = ..., auto: _Optional[_Union[Auto, _Mapping]] = ..., feature_based: _Optional[_Union[FeatureBased, _Mapping]] = ..., model_based: _Optional[_Union[ModelBased, _Mapping]] = ..., domain_adaptation: _Optional[_Union[DomainAdaptation, _Mapping]] = ..., validation_fraction: _Optional[float] = ..., seed: _Optional[int] = ..., time_budget: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., device: _Optional[_Union[Device, str]] = ..., background: _Optional[str] = ..., framing: _Optional[_Union[Framing, str]] = ..., serving_precision: _Optional[_Union[ServingPrecision, str]] = ..., labels: _Optional[_Mapping[str, str]] = ..., request_id: _Optional[str] = ..., baselines: _Optional[_Iterable[_Union[Baseline, str]]] = ..., gate: _Optional[_Union[Gate, _Mapping]] = ..., base: _Optional[_Union[BaseVersion, _Mapping]] = ..., grouping: _Optional[_Union[Grouping, _Mapping]] = ..., case_sensitive_labels: _Optional[bool] = ..., decision: _Optional[_Union[_decision_pb2.Decision, _Mapping]] = ..., outlier_false_alarm_rate: _Optional[float] = ..., augmentation: _Optional[_Union[Augmentation, _Mapping]] = ..., validate_only: _Optional[bool] = ...) -> None: ...

class FineTuneResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("job_id", "model", "state", "create_time", "start_time", "end_time", "request", "version", "error", "last_sequence", "progress", "attempts", "cancel_requested", "elapsed", "is_candidate", "data_summary", "base", "kind", "ranking_request", "ranking")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    CANCEL_REQUESTED_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_FIELD_NUMBER: _ClassVar[int]
    IS_CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    DATA_SUMMARY_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RANKING_REQUEST_FIELD_NUMBER: _ClassVar[int]
    RANKING_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    model: str
    state: JobState
    create_time: _timestamp_pb2.Timestamp
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    request: FineTuneRequest
    version: int
    error: _status_pb2.Status
    last_sequence: int
    progress: Progress
    attempts: int
    cancel_requested: bool
    elapsed: _duration_pb2.Duration
    is_candidate: bool
    data_summary: _dataset_pb2.ReadSummary
    base: BaseVersion
    kind: JobKind
    ranking_request: RankBackbonesRequest
    ranking: Ranking
    def __init__(self, job_id: _Optional[str] = ..., model: _Optional[str] = ..., state: _Optional[_Union[JobState, str]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., request: _Optional[_Union[FineTuneRequest, _Mapping]] = ..., version: _Optional[int] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., last_sequence: _Optional[int] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., attempts: _Optional[int] = ..., cancel_requested: _Optional[bool] = ..., elapsed: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., is_candidate: _Optional[bool] = ..., data_summary: _Optional[_Union[_dataset_pb2.ReadSummary, _Mapping]] = ..., base: _Optional[_Union[BaseVersion, _Mapping]] = ..., kind: _Optional[_Union[JobKind, str]] = ..., ranking_request: _Optional[_Union[RankBackbonesRequest, _Mapping]] = ..., ranking: _Optional[_Union[Ranking, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("stage", "fraction", "detail", "elapsed", "remaining", "step", "steps")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_FIELD_NUMBER: _ClassVar[int]
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    stage: str
    fraction: float
    detail: str
    elapsed: _duration_pb2.Duration
    remaining: _duration_pb2.Duration
    step: int
    steps: int
    def __init__(self, stage: _Optional[str] = ..., fraction: _Optional[float] = ..., detail: _Optional[str] = ..., elapsed: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., remaining: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ...) -> None: ...

class StateChange(_message.Message):
    __slots__ = ("state", "error")
    STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    state: JobState
    error: _status_pb2.Status
    def __init__(self, state: _Optional[_Union[JobState, str]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class EpochMetrics(_message.Message):
    __slots__ = ("epoch", "epochs", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "images_per_second", "eta", "learning_rate")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_LOSS_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    IMAGES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    ETA_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    epochs: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    images_per_second: float
    eta: _duration_pb2.Duration
    learning_rate: float
    def __init__(self, epoch: _Optional[int] = ..., epochs: _Optional[int] = ..., train_loss: _Optional[float] = ..., train_accuracy: _Optional[float] = ..., validation_loss: _Optional[float] = ..., validation_accuracy: _Optional[float] = ..., images_per_second: _Optional[float] = ..., eta: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., learning_rate: _Optional[float] = ...) -> None: ...

class DataSummary(_message.Message):
    __slots__ = ("classes", "summary", "digest")
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    classes: _containers.RepeatedCompositeFieldContainer[_dataset_pb2.ClassCount]
    summary: _dataset_pb2.ReadSummary
    digest: str
    def __init__(self, classes: _Optional[_Iterable[_Union[_dataset_pb2.ClassCount, _Mapping]]] = ..., summary: _Optional[_Union[_dataset_pb2.ReadSummary, _Mapping]] = ..., digest: _Optional[str] = ...) -> None: ...

class Note(_message.Message):
    __slots__ = ("level", "text")
    class Level(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        LEVEL_UNSPECIFIED: _ClassVar[Note.Level]
        LEVEL_INFO: _ClassVar[Note.Level]
        LEVEL_WARNING: _ClassVar[Note.Level]
    LEVEL_UNSPECIFIED: Note.Level
    LEVEL_INFO: Note.Level
    LEVEL_WARNING: Note.Level
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    level: Note.Level
    text: str
    def __init__(self, level: _Optional[_Union[Note.Level, str]] = ..., text: _Optional[str] = ...) -> None: ...

class VersionPublished(_message.Message):
    __slots__ = ("model", "version", "accuracy", "accuracy_low", "accuracy_high", "measured_on", "measured_count", "measured_group_count", "is_candidate", "gate_failures")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_LOW_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_HIGH_FIELD_NUMBER: _ClassVar[int]
    MEASURED_ON_FIELD_NUMBER: _ClassVar[int]
    MEASURED_COUNT_FIELD_NUMBER: _ClassVar[int]
    MEASURED_GROUP_COUNT_FIELD_NUMBER: _ClassVar[int]
    IS_CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    GATE_FAILURES_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    measured_on: _model_pb2.MeasuredOn
    measured_count: int
    measured_group_count: int
    is_candidate: bool
    gate_failures: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., accuracy: _Optional[float] = ..., accuracy_low: _Optional[float] = ..., accuracy_high: _Optional[float] = ..., measured_on: _Optional[_Union[_model_pb2.MeasuredOn, str]] = ..., measured_count: _Optional[int] = ..., measured_group_count: _Optional[int] = ..., is_candidate: _Optional[bool] = ..., gate_failures: _Optional[_Iterable[str]] = ...) -> None: ...

class JobEvent(_message.Message):
    __slots__ = ("sequence", "time", "state_change", "progress", "epoch", "data", "note", "published")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    STATE_CHANGE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    time: _timestamp_pb2.Timestamp
    state_change: StateChange
    progress: Progress
    epoch: EpochMetrics
    data: DataSummary
    note: Note
    published: VersionPublished
    def __init__(self, sequence: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., state_change: _Optional[_Union[StateChange, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., epoch: _Optional[_Union[EpochMetrics, _Mapping]] = ..., data: _Optional[_Union[DataSummary, _Mapping]] = ..., note: _Optional[_Union[Note, _Mapping]] = ..., published: _Optional[_Union[VersionPublished, _Mapping]] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class GetJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "states", "model", "kind", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    states: _containers.RepeatedScalarFieldContainer[JobState]
    model: str
    kind: JobKind
    labels: _containers.ScalarMap[str, str]
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., states: _Optional[_Iterable[_Union[JobState, str]]] = ..., model: _Optional[str] = ..., kind: _Optional[_Union[JobKind, str]] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs", "next_page_token")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    next_page_token: str
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("job_id", "after_sequence")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    after_sequence: int
    def __init__(self, job_id: _Optional[str] = ..., after_sequence: _Optional[int] = ...) -> None: ...

class WatchJobResponse(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: JobEvent
    def __init__(self, event: _Optional[_Union[JobEvent, _Mapping]] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class CancelJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class DeleteJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class DeleteJobResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PretrainedBackbone(_message.Message):
    __slots__ = ("backbone", "weights")
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    backbone: str
    weights: str
    def __init__(self, backbone: _Optional[str] = ..., weights: _Optional[str] = ...) -> None: ...

class RankBackbonesRequest(_message.Message):
    __slots__ = ("server_path", "dataset_id", "inline_images", "backbones", "time_budget", "seed", "validate_only", "case_sensitive_labels", "request_id")
    SERVER_PATH_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    INLINE_IMAGES_FIELD_NUMBER: _ClassVar[int]
    BACKBONES_FIELD_NUMBER: _ClassVar[int]
    TIME_BUDGET_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    CASE_SENSITIVE_LABELS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    server_path: ServerPath
    dataset_id: str
    inline_images: InlineImages
    backbones: _containers.RepeatedCompositeFieldContainer[PretrainedBackbone]
    time_budget: _duration_pb2.Duration
    seed: int
    validate_only: bool
    case_sensitive_labels: bool
    request_id: str
    def __init__(self, server_path: _Optional[_Union[ServerPath, _Mapping]] = ..., dataset_id: _Optional[str] = ..., inline_images: _Optional[_Union[InlineImages, _Mapping]] = ..., backbones: _Optional[_Iterable[_Union[PretrainedBackbone, _Mapping]]] = ..., time_budget: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., seed: _Optional[int] = ..., validate_only: _Optional[bool] = ..., case_sensitive_labels: _Optional[bool] = ..., request_id: _Optional[str] = ...) -> None: ...

class RankedBackbone(_message.Message):
    __slots__ = ("backbone", "weights", "log_loss", "log_me", "image_ms", "feature_dim", "problem", "weights_licence")
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    LOG_LOSS_FIELD_NUMBER: _ClassVar[int]
    LOG_ME_FIELD_NUMBER: _ClassVar[int]
    IMAGE_MS_FIELD_NUMBER: _ClassVar[int]
    FEATURE_DIM_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_LICENCE_FIELD_NUMBER: _ClassVar[int]
    backbone: str
    weights: str
    log_loss: float
    log_me: float
    image_ms: float
    feature_dim: int
    problem: str
    weights_licence: str
    def __init__(self, backbone: _Optional[str] = ..., weights: _Optional[str] = ..., log_loss: _Optional[float] = ..., log_me: _Optional[float] = ..., image_ms: _Optional[float] = ..., feature_dim: _Optional[int] = ..., problem: _Optional[str] = ..., weights_licence: _Optional[str] = ...) -> None: ...

class RankBackbonesResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class Ranking(_message.Message):
    __slots__ = ("backbones", "explanation", "image_count")
    BACKBONES_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    IMAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    backbones: _containers.RepeatedCompositeFieldContainer[RankedBackbone]
    explanation: str
    image_count: int
    def __init__(self, backbones: _Optional[_Iterable[_Union[RankedBackbone, _Mapping]]] = ..., explanation: _Optional[str] = ..., image_count: _Optional[int] = ...) -> None: ...
