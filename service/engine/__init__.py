"""Inference: images in, probabilities out. Knows no RPC, no jobs, no database.

What it computes with reports to nobody: ONNX Runtime and OpenVINO would tell their
makers of each start, from a process that holds customers' images. Both are told
not to before either is imported, which nobody does but through this package.
"""

import os
import sys
from types import ModuleType

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# It has no switch, but does without a package that is not there; this one is empty.
sys.modules.setdefault("openvino_telemetry", ModuleType("openvino_telemetry"))
