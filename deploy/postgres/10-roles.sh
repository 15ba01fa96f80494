#!/bin/sh
# The image `postgres` runs it once, when its data folder is empty: /docker-entrypoint-initdb.d.
set -eu
psql --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --file /roles.sql
# The superuser is reached from within this container alone.
psql --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --command "alter role \"$POSTGRES_USER\" password null"
