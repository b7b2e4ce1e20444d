"""The arrays that the trainer computes with, by what they hold."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Singles = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Looks = npt.NDArray[np.uint64]
"""Perceptual hashes of images."""
