"""The baseline: responses of FastAPI and SQLAlchemy alone. Run `python -m benchmarks.api.bare URL`.

Serves a constant, a constant from a thread, and one row of a table of jobs, until the process is terminated.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from sqlalchemy import create_engine, make_url, select
from sqlalchemy.orm import Session, sessionmaker

from catalog.tables.jobs import Job

CONSTANT, IN_A_THREAD, A_ROW = "/constant", "/in-a-thread", "/row/{job_id}"


def bare(sessions: sessionmaker[Session]) -> FastAPI:
    app = FastAPI()

    async def constant() -> dict[str, Any]:
        return {"id": "constant"}

    def in_a_thread() -> dict[str, Any]:
        return {"id": "constant"}

    def a_row(job_id: str) -> dict[str, Any]:
        with sessions() as session:
            job = session.scalars(select(Job).where(Job.id == job_id)).one()
            return {"id": job.id, "state": job.state, "spec": job.spec}

    app.add_api_route(CONSTANT, constant)
    app.add_api_route(IN_A_THREAD, in_a_thread)
    app.add_api_route(A_ROW, a_row)
    return app


class _Server(uvicorn.Server):
    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        print(json.dumps({"event": "ready", "url": f"http://{host}:{port}"}), flush=True)


def main(database_url: str) -> None:
    url = make_url(database_url)
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    engine = create_engine(url, pool_size=40, isolation_level="AUTOCOMMIT")
    config = uvicorn.Config(bare(sessionmaker(engine)), port=0, log_config=None, access_log=False, http="h11")
    _Server(config).run()


if __name__ == "__main__":
    main(sys.argv[1])
