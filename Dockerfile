# syntax=docker/dockerfile:1
#
#   docker build --target cpu -t graft:cpu .
#   docker build --target gpu -t graft:gpu .
#
# The cpu image has PyTorch without CUDA and is several gigabytes smaller. The gpu image has
# the CUDA libraries that come as wheels, and needs the NVIDIA driver and container toolkit
# on its host alone.
ARG PYTHON_IMAGE=python:3.11-slim

# What both build on: requirements in an environment of their own, before the sources, so
# that a change of these rebuilds in seconds.
FROM ${PYTHON_IMAGE} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1
RUN python -m venv /opt/graft
ENV PATH=/opt/graft/bin:$PATH
WORKDIR /build
COPY pyproject.toml ./
COPY clients/python/pyproject.toml clients/python/
COPY deploy/requirements.py deploy/

# Our own two packages, as wheels without their requirements.
FROM builder AS wheels
COPY README.md LICENSE ./
COPY clients/python clients/python
COPY service service
COPY trainer trainer
RUN pip wheel --no-deps --wheel-dir /wheels ./clients/python .

FROM builder AS cpu-environment
# PyTorch has wheels without CUDA on an index of its own; all else comes from the usual one.
# A mirror of that index can be given. The versions are then held, so that nothing
# changes them for the usual index's CUDA builds.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN python deploy/requirements.py cpu > requirements.txt \
    && grep -E '^torch(vision)?[^a-z]' requirements.txt > torch.txt \
    && pip install --index-url "${TORCH_INDEX_URL}" -r torch.txt \
    && pip freeze | grep -E '^torch(vision)?==' > held.txt \
    && pip install -c held.txt -r requirements.txt
RUN --mount=from=wheels,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl

FROM builder AS gpu-environment
RUN python deploy/requirements.py gpu > requirements.txt && pip install -r requirements.txt
RUN --mount=from=wheels,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl

FROM ${PYTHON_IMAGE} AS runtime
# tini is process 1: it reaps what a killed trainer leaves, and hands signals on.
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 graft \
    && useradd --uid 10001 --gid graft --no-create-home --home-dir /tmp --shell /usr/sbin/nologin graft \
    && install --directory --owner=graft --group=graft /data
# Caches of libraries go to /tmp, for the root file system may be read-only. The safe path
# keeps `python -m trainer` from taking folders of the data for packages.
ENV PATH=/opt/graft/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONSAFEPATH=1 \
    GRAFT_HOST=0.0.0.0 \
    GRAFT_METRICS_HOST=0.0.0.0 \
    GRAFT_DATA_DIR=/data
WORKDIR /
USER 10001:10001
VOLUME /data
EXPOSE 50051 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=10s --start-period=30s --retries=6 \
    CMD ["python", "-c", "import os, sys, grpc; from grpc_health.v1 import health_pb2 as pb, health_pb2_grpc as rpc; port = os.environ.get('GRAFT_PORT', '50051'); answer = rpc.HealthStub(grpc.insecure_channel('localhost:' + port, [('grpc.enable_http_proxy', 0)])).Check(pb.HealthCheckRequest(), timeout=5); sys.exit(answer.status != pb.HealthCheckResponse.SERVING)"]
ENTRYPOINT ["tini", "--", "graft-server"]

FROM runtime AS gpu
# What the NVIDIA container toolkit brings in.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=gpu-environment /opt/graft /opt/graft

# Last, so that it is what a build without a target makes.
FROM runtime AS cpu
COPY --from=cpu-environment /opt/graft /opt/graft
