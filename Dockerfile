# syntax=docker/dockerfile:1
#
#   docker build --target cpu -t graft:cpu .
#   docker build --target gpu -t graft:gpu .
#
# The cpu image has PyTorch without CUDA and is several gigabytes smaller. The gpu image has
# the CUDA libraries that come as wheels, and needs the NVIDIA driver and container toolkit
# on its host alone.
ARG PYTHON_IMAGE=python:3.11-slim

# What both build on: what is other people's, in an environment of its own, before the sources,
# so that a change of these rebuilds in seconds. Every package is held to the version and the
# hashes that `make lock` wrote, comes as a wheel (so that nobody's set-up code runs here), and
# brings nothing that the lock does not name.
FROM ${PYTHON_IMAGE} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1
RUN python -m venv /opt/graft
ENV PATH=/opt/graft/bin:$PATH
WORKDIR /build
COPY deploy/locks ./

# Our own two packages, as wheels without their requirements.
FROM builder AS wheels
RUN pip install --only-binary :all: --no-deps --require-hashes -r build.txt
COPY pyproject.toml README.md LICENSE ./
COPY proto/python proto/python
COPY service service
COPY trainer trainer
RUN pip wheel --no-build-isolation --no-deps --wheel-dir /wheels ./proto/python .

FROM builder AS cpu-environment
# PyTorch has wheels without CUDA on an index of its own; all else comes from the usual one.
# A mirror of that index can be given. Its two wheels are held to their hashes when the lock
# has them (deploy/lock.py says how), else to their versions alone.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN pip install --only-binary :all: --no-deps --require-hashes -r cpu.txt \
    && pip install --only-binary :all: --no-deps --index-url "${TORCH_INDEX_URL}" -r cpu-torch.txt \
    && pip check
RUN --mount=from=wheels,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl \
    && python -m trainer prepare

FROM builder AS gpu-environment
RUN pip install --only-binary :all: --no-deps --require-hashes -r gpu.txt && pip check
RUN --mount=from=wheels,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl \
    && python -m trainer prepare

FROM ${PYTHON_IMAGE} AS runtime
# tini is process 1: it reaps what a killed trainer leaves, and hands signals on.
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 graft \
    && useradd --uid 10001 --gid graft --no-create-home --home-dir /tmp --shell /usr/sbin/nologin graft \
    && install --directory --owner=graft --group=graft /data
# What libraries would keep at home goes to /tmp, for the root file system may be read-only. The
# safe path keeps `python -m trainer` from taking folders of the data for packages. Listening
# beyond the container takes GRAFT_ACCESS_FILE or client certificates: without either the
# service refuses to start, and nothing here says otherwise for it.
ENV PATH=/opt/graft/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONSAFEPATH=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    GRAFT_HOST=0.0.0.0 \
    GRAFT_METRICS_HOST=0.0.0.0 \
    GRAFT_DATA_DIR=/data
WORKDIR /
USER 10001:10001
VOLUME /data
EXPOSE 50051 9464
STOPSIGNAL SIGTERM
# Over the metrics port, which asks for neither certificate nor token.
HEALTHCHECK --interval=10s --timeout=10s --start-period=30s --retries=6 \
    CMD ["python", "-c", "import http.client, os, sys; at = http.client.HTTPConnection('localhost', int(os.environ.get('GRAFT_METRICS_PORT', '9464')), timeout=8); at.request('GET', '/healthz'); sys.exit(at.getresponse().status != 200)"]
# Whatever else graft-server can do: `docker run ... graft:cpu COMMAND`.
ENTRYPOINT ["tini", "--", "graft-server"]
CMD ["run"]

FROM runtime AS gpu
# What the NVIDIA container toolkit brings in.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=gpu-environment /opt/graft /opt/graft

# Last, so that it is what a build without a target makes.
FROM runtime AS cpu
COPY --from=cpu-environment /opt/graft /opt/graft
