# The GPU profile: CUDA, Python 3.12, the `gpu` extra. This project's checks do NOT build or run it,
# because they run on machines without a GPU. The CPU profile is tools/bootstrap.sh.
#   docker build -t megatron_rl .
#   docker run --gpus all --shm-size 16g --rm -it -v "$PWD/runs:/workspace/runs" megatron_rl \
#       launch/torchrun.sh megatron_rl.train configs/CONFIG.yaml
# --shm-size is for NCCL and vLLM's own workers. Weights go from the learners to a vLLM server through a
# memory file that the server opens as /proc/<pid>/fd/<n>. Both must therefore run as the same user in
# the same process namespace: in one container (as above), or in containers started with --pid host.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

RUN apt-get update && apt-get install --yes --no-install-recommends \
        python3.12 python3.12-dev python3.12-venv build-essential git ninja-build \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:/usr/local/cuda/bin:$PATH CUDA_HOME=/usr/local/cuda
RUN python3.12 -m venv /opt/venv

WORKDIR /workspace
# setup.py looks for CUDA_HOME, not for a visible GPU. Torch comes first, because Transformer Engine
# and this package are built against it.
RUN pip install --no-cache-dir "setuptools>=77,<81" wheel ninja packaging torch==2.13.0
COPY . .
# Transformer Engine's part for torch is source, and is compiled against this torch.
RUN grep -v '^transformer-engine-torch==' requirements/gpu.lock > /tmp/wheels.txt \
    && pip install --no-cache-dir --no-deps -r /tmp/wheels.txt \
    && pip install --no-cache-dir --no-deps --no-build-isolation \
        "$(grep -o '^transformer-engine-torch==[^ ;]*' requirements/gpu.lock)"
RUN MEGATRON_RL_CUDA=1 pip install --no-cache-dir --no-build-isolation ".[gpu,test]"
