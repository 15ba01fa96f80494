"""Finds variables LORRY_… in the environment that nothing reads: misspelled, or of another version."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from catalog.settings import Settings

PREFIX = "LORRY_"
OF_API_SERVER = frozenset(
    {
        "ALLOWED_HOSTS",
        "PUBLIC_URL",
        "TRUSTED_PROXIES",
        "MAX_BODY_BYTES",
        "REQUESTS_PER_MINUTE",
        "JOBS_PER_DAY",
        "WEBHOOK_ALLOWED_NETWORKS",
        "WEBHOOK_ALLOW_HTTP",
        "STREAM_POLL_SECONDS",
        "STREAM_HEARTBEAT_SECONDS",
        "SHUTDOWN_SECONDS",
    }
)
"""The fields of api.settings, which workers may see too."""
OF_OTHERS = frozenset(
    {
        "DEVICE",
        "LOG_FORMAT",
        "URL",
        "API_KEY",
        "TRACEBACK",
        "GROUPS",
        "LISTEN",
        "MODELS_DIR",
        "SUBNET",
        "VERSION",
        "DEMO_DIR",
    }
)
"""Read by workers, by clients, by the Compose file and by the demo."""
OF_TESTS = "TEST_"
LINKED_SERVICE = re.compile(r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP)(_\w+)?)")
"""Variables that Kubernetes sets for a Service whose name begins with `lorry`."""


def unknown(given: Mapping[str, str]) -> list[str]:
    """Return a warning for each variable LORRY_… that is set and has no effect. Values do not appear."""
    known = {name.upper() for name in Settings.model_fields} | OF_API_SERVER | OF_OTHERS
    warnings: list[str] = []
    for variable in sorted(given):
        name = variable.upper().removeprefix(PREFIX)
        if not variable.upper().startswith(PREFIX) or name in known or not given[variable]:
            continue
        if name.startswith(OF_TESTS) or LINKED_SERVICE.fullmatch(name) or given[variable].startswith("tcp://"):
            continue
        similar = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
        fix = f"Did you mean {PREFIX}{similar[0]}?" if similar else "Unset it, or see the reference of settings."
        warnings.append(f"{variable} is not a setting of this version of Lorry, so it has no effect. {fix}")
    return warnings
