# The trainer on a CPU:       docker build -t gluon .
# on NVIDIA GPUs:             docker build -t gluon --build-arg TORCH=cu130 .
#
#   docker run --rm -v "$PWD/runs:/app/runs" gluon train_gpt.py --config configs/quickstart_mvr2.py
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/app/runs" -v "$PWD/data/fineweb10B:/app/data/fineweb10B" gluon \
#     -m torch.distributed.run --nproc_per_node=8 train_gpt.py --config configs/mvr1_b512.py
#
# TORCH names one of the wheel sets of download.pytorch.org/whl. A CUDA wheel brings CUDA, cuDNN and NCCL; the host needs the
# driver and the NVIDIA container toolkit. This file passes hadolint 2.15; no image has been built from it yet.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
ARG TORCH=cpu

# The compiler is for torch.compile; git records the revision of a run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.txt .
RUN grep '^torch==' requirements.txt > torch.txt \
    && pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/${TORCH}" -r torch.txt \
    && pip install --no-cache-dir -r requirements.txt \
    && rm torch.txt

COPY . .
ENTRYPOINT ["python"]
CMD ["train_gpt.py", "--help"]
