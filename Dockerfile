# NVIDIA's PyTorch image brings torch, triton, Transformer Engine and flash-attn compiled for each other: they stay.
#   docker build -t soar_mega . && docker run --gpus all --rm soar_mega doctor
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.02-py3
FROM ${BASE_IMAGE}

WORKDIR /opt/soar_mega
COPY setup.py pyproject.toml README.md ./
COPY soar_mega/__init__.py soar_mega/__init__.py
COPY tools/keep_torch.py tools/keep_torch.py

# Dependencies first, so that a change of the sources does not install them again. The image pins some packages in a
# constraints file of its own; only those of tools/keep_torch.py must hold.
ENV PIP_CONSTRAINT=
RUN python tools/keep_torch.py > /opt/image-constraints.txt \
    && cat /opt/image-constraints.txt \
    && pip install --no-cache-dir --no-build-isolation -c /opt/image-constraints.txt -e '.[gpu,dev]'

COPY . .
RUN pip install --no-cache-dir --no-build-isolation --no-deps -e . \
    && python -c "import soar_mega.kernels, torch; assert torch.version.cuda, 'the CUDA build of torch was replaced'"

ENTRYPOINT ["soar-mega"]
