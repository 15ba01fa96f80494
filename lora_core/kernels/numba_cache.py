# pyright: basic
"""Compiled kernels kept between processes: Numba's cache, which knows of a kernel's own file alone.

Kernels share code (numba_jit.py), so what is kept is made anew where any of their files has changed. A disk that is
full costs a compilation in each process and nothing else.
"""

import hashlib
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache


@cache
def shared_digest() -> str:
    """Of all sources that kernels are made of."""
    folder = Path(__file__).parent
    sources = sorted(folder.glob("*.py"))
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()


class KernelCache(FunctionCache):
    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return *super()._index_key(sig, codegen), shared_digest()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with suppress(OSError):
            return super().load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)
