# syntax=docker/dockerfile:1
# Packages are installed from lock files with hashes, and base images are pinned by digest.
# `docker buildx imagetools inspect NAME:TAG` prints the digest of a newer image.
# Three targets: `api` (without torch), `worker` (with torch), `store` (the S3 gateway as an unprivileged user).

FROM python:3.12.14-slim-bookworm@sha256:782412e85d0f0984994c290652577d4018aff08145c85b262bb63dc0c7522254 AS code
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HOME=/var/lib/lorry HF_HOME=/var/lib/lorry/hub
RUN groupadd --gid 10001 lorry \
    && useradd --uid 10001 --gid lorry --home-dir /var/lib/lorry --create-home --shell /usr/sbin/nologin lorry
WORKDIR /opt/lorry
COPY requirements requirements
COPY pyproject.toml setup.py README.md LICENSE alembic.ini ./
COPY client client
COPY lorry lorry
COPY migrations migrations
COPY catalog catalog
COPY lora_core lora_core
COPY worker worker
COPY dashboard dashboard
COPY api api

FROM code AS api
RUN pip install --require-hashes --no-deps -r requirements/api.lock \
    && pip install --no-deps --no-build-isolation --editable client --editable .
USER lorry
EXPOSE 8000
CMD ["python", "-m", "api", "serve", "--host", "0.0.0.0", "--port", "8000"]

FROM code AS worker
# Triton compiles the launchers of GPU kernels at run time, with this C compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# torch (PyPI's build with CUDA) or torch-cpu.
ARG TORCH=torch
RUN pip install --require-hashes --no-deps -r requirements/worker.lock \
    && pip install --require-hashes --no-deps -r "requirements/$TORCH.lock" \
    && pip install --no-deps --no-build-isolation --editable client --editable .
ENV OMP_WAIT_POLICY=PASSIVE
USER lorry
# The build fails if the image can't compile and load a shared object, as Triton does at run time.
RUN python <<'EOF'
import ctypes, subprocess, sys, sysconfig, tempfile
from worker.process.sandbox import environment

source = b"#include <Python.h>\nint version(void) { return PY_VERSION_HEX; }"
with tempfile.TemporaryDirectory(dir=environment()["TRITON_CACHE_DIR"]) as folder:
    compiler = ["cc", "-shared", "-fPIC", "-I", sysconfig.get_path("include"), "-x", "c", "-", "-o", f"{folder}/probe.so"]
    subprocess.run(compiler, input=source, check=True)
    assert ctypes.CDLL(f"{folder}/probe.so").version() == sys.hexversion
EOF
CMD ["celery", "--app=worker.entrypoints.celery_app", "worker", "--queues=lorry", "--concurrency=1", "--without-gossip", "--without-mingle"]

FROM versity/versitygw:v1.8.0@sha256:30292fc2eeacc67a36993b01f7a7a5e3361a19cced0e80c1d71cfa2a4b0a2499 AS store
RUN mkdir -p /data && chown 10001:10001 /data
USER 10001:10001
