"""The Open Inference Protocol (KServe V2): its stubs, and what answers it."""
