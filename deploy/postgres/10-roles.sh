#!/bin/sh
# The `postgres` image runs this script once, when its data folder is empty (/docker-entrypoint-initdb.d).
set -eu
psql --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --file /roles.sql
# Only processes in this container can then log in as superuser.
psql --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --command "alter role \"$POSTGRES_USER\" password null"
