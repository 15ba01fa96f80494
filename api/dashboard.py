"""Serves the dashboard's static pages from the `dashboard` folder. They contain no secrets and require no API key."""

from __future__ import annotations

import mimetypes
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent.parent / "dashboard"
SERVED = frozenset({".html", ".js", ".css", ".svg", ".png", ".ico", ".woff2", ".json", ".txt", ".webmanifest"})
mimetypes.add_type("font/woff2", ".woff2")
mimetypes.add_type("text/javascript", ".js")


class Dashboard(StaticFiles):
    """Serves only the file types of web pages. The browser revalidates each file before it uses a cached copy."""

    def __init__(self) -> None:
        super().__init__(directory=FOLDER, html=True, check_dir=False)

    async def get_response(self, path: str, scope: Scope) -> Response:
        suffix = Path(path).suffix
        if suffix and suffix not in SERVED:
            raise HTTPException(404)
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "no-cache"
        return response
