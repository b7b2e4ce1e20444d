"""What a job's data brought on top of the version that it grew from."""

import numpy as np

from service.contract import JobSpec
from trainer.data import Data
from trainer.reporting.findings import Growth


def told(spec: JobSpec, data: Data) -> Growth | None:
    """For the report; None for a job that grew from nothing."""
    if spec.base is None:
        return None
    parts = (data.train, data.validation, data.test)
    targets = np.concatenate([part.targets for part in parts])
    # The job's own dataset is the newest.
    is_new = np.concatenate([part.ages for part in parts]) == len(spec.base_data)
    known = set(targets[~is_new].tolist())
    return Growth(
        base_model=spec.base.model,
        base_version=spec.base.version,
        base_images=int((~is_new).sum()),
        added_images=int(is_new.sum()),
        added_classes=[label for i, label in enumerate(data.classes) if i not in known],
    )
