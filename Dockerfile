# syntax=docker/dockerfile:1
# Three targets: `api` (no torch), `worker` (with torch), `store` (the S3 gateway, not as root).

FROM python:3.12-slim-bookworm AS code
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HOME=/var/lib/lorry HF_HOME=/var/lib/lorry/hub
RUN groupadd --gid 10001 lorry \
    && useradd --uid 10001 --gid lorry --home-dir /var/lib/lorry --create-home --shell /usr/sbin/nologin lorry
WORKDIR /opt/lorry
COPY pyproject.toml requirements.lock README.md LICENSE alembic.ini ./
COPY lorry lorry
COPY migrations migrations
COPY catalog catalog
COPY lora_core lora_core
COPY worker worker
COPY dashboard dashboard
COPY api api

FROM code AS api
# What a backup calls, pg_dump and pg_restore, of the server's version or later: Debian's own may be older.
ARG POSTGRES_CLIENT=17
RUN apt-get update && apt-get install --yes --no-install-recommends ca-certificates postgresql-common \
    && /usr/share/postgresql-common/pgdg/apt.postgresql.org.sh -y \
    && apt-get install --yes --no-install-recommends "postgresql-client-$POSTGRES_CLIENT" \
    && rm -rf /var/lib/apt/lists/*
# psutil: celery beat imports the worker's parents, which need it and no more.
RUN pip install --constraint requirements.lock --editable '.[server,telemetry]' psutil
USER lorry
EXPOSE 8000
CMD ["python", "-m", "api", "serve", "--host", "0.0.0.0", "--port", "8000"]

FROM code AS worker
# An index of torch builds to look at beside PyPI, whose own build brings CUDA.
ARG TORCH_INDEX=
RUN if [ -n "$TORCH_INDEX" ]; then pip install --constraint requirements.lock --extra-index-url "$TORCH_INDEX" torch; fi \
    && pip install --constraint requirements.lock --editable '.[worker,telemetry]'
ENV OMP_WAIT_POLICY=PASSIVE
USER lorry
CMD ["celery", "--app=worker.celery_app", "worker", "--queues=lorry", "--concurrency=1", "--without-gossip", "--without-mingle"]

FROM versity/versitygw:v1.8.0 AS store
RUN mkdir -p /data && chown 10001:10001 /data
USER 10001:10001
