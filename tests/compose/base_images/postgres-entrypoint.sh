#!/bin/bash
# What Lorry uses of the official image's entrypoint: initdb in an empty PGDATA, POSTGRES_DB, POSTGRES_PASSWORD, and the
# scripts of /docker-entrypoint-initdb.d on a temporary server that listens on the socket only.
set -Eeo pipefail
export POSTGRES_USER=postgres POSTGRES_DB
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    chmod 700 "$PGDATA"
    initdb --username=postgres --pwfile=<(printf '%s\n' "${POSTGRES_PASSWORD:?}")
    printf '\nhost all all all scram-sha-256\n' >>"$PGDATA/pg_hba.conf"
    pg_ctl -D "$PGDATA" -o "-c listen_addresses=''" -w start
    psql -v ON_ERROR_STOP=1 --username postgres --dbname postgres --set db="${POSTGRES_DB:?}" <<<'CREATE DATABASE :"db" ;'
    for script in /docker-entrypoint-initdb.d/*.sh; do
        if [ -x "$script" ]; then "$script"; else . "$script"; fi
    done
    pg_ctl -D "$PGDATA" -m fast -w stop
fi
# Debian's server listens on localhost only; that of the official image listens on all addresses.
exec "$@" -c listen_addresses='*'
