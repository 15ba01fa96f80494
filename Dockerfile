# Packages are installed from lock files with hashes, and before the code is copied: a change of the code installs none.
# Three targets: `api` (without torch), `worker` (with torch), `store` (the S3 gateway as an unprivileged user).
# The tag of Python is exact, but has no digest yet. `docker buildx imagetools inspect NAME:TAG` prints it.

FROM python:3.12.14-slim-trixie AS python
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    HOME=/var/lib/lorry HF_HOME=/var/lib/lorry/hub
RUN groupadd --gid 10001 lorry \
    && useradd --uid 10001 --gid lorry --home-dir /var/lib/lorry --no-create-home --shell /usr/sbin/nologin lorry \
    && install -d -o lorry -g lorry -m 700 /var/lib/lorry
WORKDIR /opt/lorry

FROM python AS api
COPY requirements/api.lock requirements/
RUN pip install --require-hashes --no-deps -r requirements/api.lock
COPY . .
RUN pip install --no-deps --no-build-isolation --editable client --editable . && python -m compileall -q .
USER lorry
EXPOSE 8000
CMD ["python", "-m", "api", "serve", "--host", "0.0.0.0", "--port", "8000"]

FROM python AS worker
# torch (PyPI's build with CUDA) or torch-cpu.
ARG TORCH=torch
# Triton compiles the launchers of GPU kernels at run time, with this C compiler.
RUN if [ "$TORCH" = torch ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
COPY requirements/$TORCH.lock requirements/
RUN pip install --require-hashes --no-deps -r "requirements/$TORCH.lock"
COPY requirements/worker.lock requirements/
RUN pip install --require-hashes --no-deps -r requirements/worker.lock
COPY . .
RUN pip install --no-deps --no-build-isolation --editable client --editable . && python -m compileall -q .
ENV OMP_WAIT_POLICY=PASSIVE
USER lorry
# The build fails if an image with CUDA can't compile and load a shared object, as Triton does at run time.
RUN python <<'EOF'
import ctypes, os, subprocess, sys, sysconfig, tempfile
from worker.process.sandbox import environment

if os.environ["TORCH"] != "torch":
    sys.exit()
source = b"#include <Python.h>\nint version(void) { return PY_VERSION_HEX; }"
with tempfile.TemporaryDirectory(dir=environment()["TRITON_CACHE_DIR"]) as folder:
    compiler = ["cc", "-shared", "-fPIC", "-I", sysconfig.get_path("include"), "-x", "c", "-", "-o", f"{folder}/probe.so"]
    subprocess.run(compiler, input=source, check=True)
    assert ctypes.CDLL(f"{folder}/probe.so").version() == sys.hexversion
EOF
CMD ["python", "-P", "-m", "worker.entrypoints.celery_worker"]

FROM versity/versitygw:v1.8.0@sha256:30292fc2eeacc67a36993b01f7a7a5e3361a19cced0e80c1d71cfa2a4b0a2499 AS store
RUN mkdir -p /data && chown 10001:10001 /data
USER 10001:10001
