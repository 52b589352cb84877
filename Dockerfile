# syntax=docker/dockerfile:1
#   docker build -t dasd_megatron .                    for GPUs; docker run --gpus all dasd_megatron runs the smoke test
#   docker build -t dasd_megatron:cpu --target cpu .   docker run dasd_megatron:cpu trains the quickstart
# Neither has been built yet; docs/slurm.md says what of it has run. The image of 25.12 has Python 3.12, torch 2.10,
# CUDA 13.1, and Transformer Engine for them; `dasd doctor` says whether Apex is there.
ARG NVIDIA_IMAGE=nvcr.io/nvidia/pytorch:25.12-py3
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-bookworm AS cpu-build
# The CPU's build of torch; the package index's own is several gigabytes of CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY . .
RUN TORCH_INDEX=${TORCH_INDEX} docker/install_trainer.sh /opt/dasd

FROM python:${PYTHON_VERSION}-slim-bookworm AS cpu
COPY --from=cpu-build /opt/dasd /opt/dasd
COPY docker/smoke_test.sh /usr/local/bin/smoke-test
RUN useradd --create-home --uid 10001 dasd
USER 10001
WORKDIR /home/dasd
ENV PATH=/opt/dasd/bin:${PATH} DASD_PYTHON=/opt/dasd/bin/python
CMD ["dasd", "train", "experiment=quickstart"]

FROM ${NVIDIA_IMAGE} AS sglang-build
WORKDIR /src
COPY requirements requirements
COPY docker docker
RUN docker/install_sglang.sh /opt/sglang cuda

FROM ${NVIDIA_IMAGE} AS trainer-build
WORKDIR /src
COPY . .
RUN docker/install_trainer.sh /opt/dasd

# SGLang compiles kernels when it first needs them, so what runs has the compilers of the base image too.
FROM ${NVIDIA_IMAGE} AS gpu
COPY --from=sglang-build /opt/sglang /opt/sglang
COPY --from=trainer-build /opt/dasd /opt/dasd
COPY docker/smoke_test.sh /usr/local/bin/smoke-test
RUN useradd --create-home --uid 10001 dasd
USER 10001
WORKDIR /home/dasd
ENV PATH=/opt/dasd/bin:${PATH} DASD_PYTHON=/opt/dasd/bin/python DASD_SGLANG_PYTHON=/opt/sglang/bin/python
CMD ["smoke-test"]
