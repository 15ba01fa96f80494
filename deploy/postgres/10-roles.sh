#!/bin/sh
# Run once by the image `postgres`, when its data folder is empty: /docker-entrypoint-initdb.d.
set -eu
psql --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" \
  --set owner="$POSTGRES_OWNER_PASSWORD" --set api="$POSTGRES_API_PASSWORD" --set worker="$POSTGRES_WORKER_PASSWORD" \
  --file /roles.sql
# The superuser is reached from within this container alone.
psql --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --command "alter role \"$POSTGRES_USER\" password null"
