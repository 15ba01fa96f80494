-- Creates the three database roles of Lorry, and lets only them connect. Run it with psql as a superuser, connected to
-- the database of the service, with POSTGRES_OWNER_PASSWORD, POSTGRES_API_PASSWORD and POSTGRES_WORKER_PASSWORD in the
-- environment (psql 15 or later; the server may be older):
--
--   psql -f deploy/postgres/roles.sql DATABASE
--
-- lorry_owner creates and changes the tables (`python -m api bootstrap`, `restore`), lorry_api is for API servers and
-- backups, lorry_worker for workers. catalog/tables/privileges.py defines the privileges of the latter two, which each
-- `bootstrap` grants. Run this again to change the passwords. A PostgreSQL server can have these roles for one service only.
\set ON_ERROR_STOP on
\set owner ''
\set api ''
\set worker ''
\getenv owner POSTGRES_OWNER_PASSWORD
\getenv api POSTGRES_API_PASSWORD
\getenv worker POSTGRES_WORKER_PASSWORD
select '' not in (:'owner', :'api', :'worker') as has_passwords
\gset
\if :has_passwords
\else
do $$ begin
    raise exception 'Set POSTGRES_OWNER_PASSWORD, POSTGRES_API_PASSWORD and POSTGRES_WORKER_PASSWORD in the environment.';
end $$;
\endif
select format('create role %I login', name)
from unnest(array['lorry_owner', 'lorry_api', 'lorry_worker']) as name
where not exists (select from pg_roles where rolname = name)
\gexec
alter role lorry_owner with nosuperuser nocreatedb nocreaterole password :'owner';
alter role lorry_api with nosuperuser nocreatedb nocreaterole password :'api';
alter role lorry_worker with nosuperuser nocreatedb nocreaterole password :'worker';

-- In a database that existed before these roles, the tables get the new owner.
select format('alter table %I.%I owner to lorry_owner', schemaname, tablename)
from pg_tables
where schemaname = 'public' and tableowner <> 'lorry_owner'
\gexec
select format('alter database %I owner to lorry_owner', current_database())
\gexec
revoke create on schema public from public;
grant usage, create on schema public to lorry_owner; -- PostgreSQL 14 and older grant this only to public
select format('revoke all on database %I from public', current_database())
\gexec
select format('grant connect on database %I to lorry_api, lorry_worker', current_database())
\gexec
