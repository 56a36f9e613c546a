# For NVIDIA GPUs:  docker build -t qsr_engine .  &&  docker run --gpus all --ipc=host -v /data:/data qsr_engine train my.yaml
#
# It was written where no Docker is, and never built. CUDA's compiler is there because DeepSpeed builds its operators
# (FusedAdam) when they are first used; its major version must be that of torch's CUDA (python -c "import torch;
# print(torch.version.cuda)"), so change BASE with torch. --ipc=host: gloo and the loaders use shared memory.
ARG BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
FROM ${BASE}
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        python3-venv python3-dev build-essential libjpeg-turbo8-dev iproute2 openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
# What changes seldom first: the packages that pyproject.toml names.
COPY pyproject.toml README.md LICENSE MANIFEST.in ./
RUN mkdir qsr_engine && touch qsr_engine/__init__.py \
    && pip install --no-cache-dir '.[report]' && pip uninstall --yes qsr-engine
COPY qsr_engine qsr_engine
RUN pip install --no-cache-dir --no-deps . \
    && python -c "from qsr_engine.data import decoding; assert decoding.REGIONS, decoding.NO_REGIONS"
WORKDIR /work
ENTRYPOINT ["qsr"]
CMD ["doctor"]
