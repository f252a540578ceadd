# The GPU profile: CUDA 13, Python 3.12, the packages of requirements/gpu.lock. No step needs a GPU. The
# CPU profile is tools/bootstrap.sh.
#   docker build -t megatron_rl .
#   docker build -t megatron_rl --build-arg APEX=1 .     # with Apex, compiled from its source
#   docker run --gpus all --shm-size 16g --rm -it -v "$PWD/runs:/workspace/runs" megatron_rl \
#       launch/torchrun.sh megatron_rl.train configs/CONFIG.yaml
# --shm-size is for NCCL and vLLM's own workers. With sync.transport=shared_memory weights go from the
# learners to a vLLM server through a memory file that the server opens as /proc/<pid>/fd/<n>. Both must
# therefore run as the same user in the same process namespace: in one container (as above), or in
# containers started with --pid host. The user of the image must be able to write runs/:
# docker run --user "$(id -u):$(id -g)".
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

RUN apt-get update && apt-get install --yes --no-install-recommends \
        python3.12 python3.12-dev python3.12-venv build-essential git ninja-build iproute2 \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:/usr/local/cuda/bin:$PATH CUDA_HOME=/usr/local/cuda \
    PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3.12 -m venv /opt/venv

WORKDIR /workspace
# The lock is complete, so that no dependency is looked for. Transformer Engine's part for torch comes as
# source and is compiled against the torch of the lock (--no-build-isolation; about an hour on two cores).
# These layers are built again only if the lock changes.
COPY requirements/gpu.lock requirements/gpu.lock
RUN grep -v '^transformer-engine-torch==' requirements/gpu.lock >/tmp/wheels.txt \
    && pip install --no-deps -r /tmp/wheels.txt
RUN NVTE_BUILD_USE_NVIDIA_WHEELS=1 pip install --no-deps --no-build-isolation \
        "$(grep -o '^transformer-engine-torch==[^ ;]*' requirements/gpu.lock)"

# Off by default: Megatron-Core uses it only to add the output layer's gradients in one kernel
# (gradient_accumulation_fusion). The package of this name on PyPI is another one.
ARG APEX=0
RUN if [ "$APEX" = 1 ]; then APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-deps \
        --no-build-isolation "git+https://github.com/NVIDIA/apex"; fi

# setup.py looks for CUDA_HOME, not for a visible GPU.
COPY . .
RUN MEGATRON_RL_CUDA=1 pip install --no-deps --no-build-isolation .

RUN useradd --create-home --uid 10001 trainer && mkdir -p runs && chown trainer runs
USER trainer
# Healthy: the package and torch import, and torch sees the GPUs that the container has been given.
HEALTHCHECK --interval=5m --timeout=2m --start-period=2m CMD python -c "import sys, torch, megatron_rl; \
    sys.exit(not torch.cuda.is_available())"
CMD ["bash"]
