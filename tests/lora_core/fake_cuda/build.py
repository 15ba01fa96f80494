"""Compiles device.cpp against the installed torch, once per version of both, and loads it into a process."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

SOURCE = Path(__file__).with_name("device.cpp")
COMPILER = "g++"


def why_not() -> str | None:
    """Return why the device can't be built on this machine, or None."""
    if shutil.which(COMPILER) is None:
        return f"needs {COMPILER} to build the fake CUDA device"
    if not (_torch_folder() / "include" / "ATen").is_dir():
        return "needs the headers of torch to build the fake CUDA device"
    return None


def built() -> Path:
    """Return the shared library. It is compiled if this source was not compiled for this torch before."""
    torch_folder = _torch_folder()
    version = (torch_folder / "version.py").read_bytes()
    digest = hashlib.sha256(SOURCE.read_bytes() + version + str(torch_folder).encode()).hexdigest()[:16]
    folder = Path(gettempdir()) / f"lorry-fake-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{digest}.so"
    if not library.exists():
        with TemporaryDirectory(dir=folder) as scratch:
            new = Path(scratch) / library.name
            subprocess.run([COMPILER, *_options(torch_folder), str(SOURCE), "-o", str(new)], check=True)
            new.rename(library)  # another process may have built the same file meanwhile
    return library


def load(library: Path) -> None:
    """Load the device. Call it before the process imports torch, which registers devices once."""
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _options(torch_folder: Path) -> list[str]:
    include, lib = torch_folder / "include", torch_folder / "lib"
    return ["-std=c++20", "-shared", "-fPIC", f"-I{include}", f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu"]


def _torch_folder() -> Path:
    found = find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent
