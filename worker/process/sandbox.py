"""Restricts the files, sockets and resources of a worker's child processes by Landlock, seccomp and resource limits.

`worker.process.confined_child` applies a `Sandbox` to itself before it becomes the child. The sandbox also confines all
processes that the child starts, and needs no privilege. On a kernel without Landlock, children run with resource
limits only, and the worker logs this. If the kernel has Landlock but it can't be applied, no child starts. Landlock
restricts neither UDP nor the reading of file attributes.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import site
import stat
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from catalog import failpoints
from worker.process import seccomp

log = logging.getLogger(__name__)
Kind = Literal["trainer", "tokenization", "import", "export", "upload"]
Limit = Literal["data", "cpu", "fsize"]

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""Numbers of the system calls, the same on every architecture that Lorry runs on."""
GET_VERSION = 1
PATH_BENEATH = 1
PR_SET_NO_NEW_PRIVS = 38

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE = 1 << 4, 1 << 5
MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = (1 << bit for bit in range(6, 13))
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
BIND_TCP, CONNECT_TCP = 1 << 0, 1 << 1
SCOPE_ABSTRACT_UNIX_SOCKET, SCOPE_SIGNAL = 1 << 0, 1 << 1

FIRST_ABI_WITH = {"rename": 2, "truncate": 3, "TCP": 4, "device ioctl": 5, "signals and abstract sockets": 6}
READ = READ_FILE | READ_DIR
RUN = READ | EXECUTE
WRITE = READ | WRITE_FILE | TRUNCATE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SOCK | REFER
"""Links and pipes are excluded, so that nothing that a child writes redirects its reader."""
DEVICE = READ | WRITE_FILE | TRUNCATE | IOCTL_DEV
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
"""The rights that a rule for a file, and not a folder, can have."""

SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/nix", "/proc", "/sys", "/run/nvidia-persistenced")
VENDORS = ("amazon", "amdgpu", "aws-ofi-nccl", "cuda", "hpcx", "intel", "mellanox", "nvidia", "rocm")
"""Folders of libraries in /opt, where Lorry's own checkout and other programs may be as well."""
DEV = Path("/dev")
DEVICES = ("null", "zero", "full", "random", "urandom")
GPU_DEVICES = ("nvidia*", "dri", "kfd", "dxg", "infiniband", "gdrdrv")
"""Patterns of the devices that CUDA, ROCm and NCCL open in /dev."""
ETC = (
    *("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "passwd", "group", "nsswitch.conf", "hosts", "host.conf"),
    *("gai.conf", "resolv.conf", "services", "protocols", "localtime", "timezone", "os-release", "machine-id"),
    *("ssl", "pki", "ca-certificates", "alternatives", "nvidia", "OpenCL", "vulkan", "libibverbs.d"),
    "nccl.conf",
)
"""Readable entries of /etc. Other entries may be an operator's secrets."""
PATH_VARIABLES = (
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CUDA_HOME"),
    *("NCCL_CONF_FILE", "NCCL_TOPO_FILE"),
)
PACKAGES = ("catalog", "lora_core", "lorry", "worker")
ROOT = Path(__file__).resolve().parents[2]
KERNEL_CACHES = {
    "NUMBA_CACHE_DIR": "numba",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch-extensions",
    "CUDA_CACHE_PATH": "cuda",
}
"""Where libraries keep compiled code between processes, by the variable that names the folder."""
ASSUMED_HUB_BYTES = 256 * 2**30
"""Assumed size of a repository of the hub, because it is unknown before the download."""
BESIDE_GGUF = "tokenizer_config.json"
"""File next to a GGUF file that its import reads; see lora_core.model_files.gguf."""
TEMPLATES = "additional_chat_templates"
"""Folder of a base model with named chat templates."""
LIMITS = {"data": (resource.RLIMIT_DATA, 0), "cpu": (resource.RLIMIT_CPU, 60), "fsize": (resource.RLIMIT_FSIZE, 0)}
"""The resource, and by how much its hard limit exceeds the soft one: SIGKILL follows SIGXCPU. The number of processes
is not limited, because Linux counts all processes and threads of the user together, including trainers."""
SHARED_MEMORY = "/dev/shm"  # noqa: S108  (where torch's processes share tensors)
REFUSED = 115
"""Exit status of a child to which its sandbox could not be applied.

worker.process.exit_status and worker.process.confined_child define others.
"""
REFUSAL = "The sandbox of this process could not be applied: "
"""Printed by such a child, before the kernel's error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sandbox:
    """The access of one child in addition to the system's own files. Paths are absolute; missing ones are skipped."""

    kind: Kind
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    """Writable folders in which it may also create symbolic links, of which the hub's cache consists."""
    tcp: bool = False
    """Whether it may connect and listen."""
    gpu: bool = False
    """Whether it uses a GPU. It then has access to the GPUs' devices and to Unix sockets, through which CUDA reaches
    MPS and nvidia-persistenced."""
    limits: dict[Limit, int] = field(default_factory=dict[Limit, int])
    """By resource: bytes of its own memory (data), seconds of processor time (cpu), bytes of a file (fsize)."""

    def as_argument(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_argument(cls, text: str) -> Sandbox:
        fields = json.loads(text)
        paths = {name: tuple(fields[name]) for name in ("reads", "writes", "links")}
        return cls(kind=fields["kind"], tcp=fields["tcp"], gpu=fields["gpu"], limits=fields["limits"], **paths)


def trainer(folder: Path, *, bases_dir: Path, tcp: bool, gpu: bool = False) -> Sandbox:
    """Return the sandbox of a trainer: it reads base models, and writes its own folder, shared memory and the caches of
    compiled code.

    tcp: its processes, on this machine or on others, communicate with each other.
    """
    mps = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")  # noqa: S108  (the driver's default)
    caches = (environment()[name] for name in KERNEL_CACHES)
    writes = (str(folder.absolute()), SHARED_MEMORY, mps, *caches, *failpoints.folders())
    return Sandbox(kind="trainer", reads=(str(bases_dir.absolute()),), writes=writes, tcp=tcp, gpu=gpu)


def tokenization(folder: Path, *, base_dir: Path | None, num_bytes: int) -> Sandbox:
    """Return the sandbox of a child that works on a data file of `num_bytes`: it reads the base model's tokenizer, and
    writes the folder of this preparation.

    Its limits are ten times the needs of a usual file, so that only a runaway template or an endless file reaches them.
    """
    limits: dict[Limit, int] = {
        "data": 4 * 2**30 + 16 * num_bytes,
        "cpu": 600 + 60 * (num_bytes // 2**20),
        "fsize": 2**30 + 64 * num_bytes,
    }
    reads = () if base_dir is None else (str(base_dir.absolute()),)
    return Sandbox(kind="tokenization", reads=reads, writes=(str(folder.absolute()),), limits=limits)


def base_import(folder: Path, *, source: Path | None) -> Sandbox:
    """Return the sandbox of a child that imports a base model from `source`, a local folder or file, or from the hub
    (None).

    A quantized GGUF file grows up to twelvefold in memory while it is converted. Raises OSError, and RuntimeError for a
    loop of links.
    """
    num_bytes = ASSUMED_HUB_BYTES if source is None else _size_of(source)
    limits: dict[Limit, int] = {
        "data": 8 * 2**30 + 20 * num_bytes,
        "cpu": 3600 + 600 * (num_bytes // 2**30),
        "fsize": 2**30 + 12 * num_bytes,
    }
    reads, links = (), (str(folder.absolute()),)
    if source is None:
        links = (*links, *hub_folders())
    else:
        # a snapshot of the hub consists of links
        entries = [source.with_name(BESIDE_GGUF)]
        if source.is_dir():
            entries = sorted([*source.iterdir(), *(source / TEMPLATES).glob("*.jinja")])
        reads = tuple(str(path.resolve()) for path in (source, *entries))
    return Sandbox(kind="import", reads=reads, links=links, tcp=source is None, limits=limits)


def export(folder: Path, *, base_dir: Path, converter: Path | None) -> Sandbox:
    """Return the sandbox of a child that exports an adapter: it reads the base model and the folder of the GGUF
    converter, and writes the folder of this export.

    A model of 16 bits is held in 32 bits while it is merged and verified, with copies of some weights.
    """
    num_bytes = _size_of(base_dir)
    limits: dict[Limit, int] = {
        "data": 8 * 2**30 + 20 * num_bytes,
        "cpu": 3600 + 3600 * (num_bytes // 2**30),
        "fsize": 2**30 + 4 * num_bytes,
    }
    reads = (str(base_dir.absolute()), *(str(path.resolve().parent) for path in (converter,) if path is not None))
    return Sandbox(kind="export", reads=reads, writes=(str(folder.absolute()),), limits=limits)


def hub_upload(folder: Path) -> Sandbox:
    """Return the sandbox of a child that uploads files in `folder` to the hub. Raises OSError."""
    return Sandbox(kind="upload", links=(str(folder.absolute()), *hub_folders()), tcp=True)


def environment() -> dict[str, str]:
    """Return the folders for compiled code, which outlives a trainer, by the variable that names them. They are those
    of the worker's environment, or else folders in the user's cache. Creates them."""
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorry-kernels"
    with suppress(OSError):
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = {name: os.environ.get(name) or str(own / folder) for name, folder in KERNEL_CACHES.items()}
    for folder in found.values():
        with suppress(OSError):  # a home that can't be written: libraries that need the folder report an error
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    return found


def hub_folders() -> tuple[str, ...]:
    """Create and return the folders of the hub's client: HF_HOME, with its token and the data of hf_xet, and the cache
    of repositories, which HF_HUB_CACHE may place elsewhere. Raises OSError."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = os.environ.get("HF_HOME") or Path(cache_home) / "huggingface"
    found = [Path(path).expanduser().absolute() for path in (home, os.environ.get("HF_HUB_CACHE")) if path]
    for path in found:
        path.mkdir(parents=True, exist_ok=True)
    return tuple(map(str, found))


def _size_of(source: Path) -> int:
    paths = source.iterdir() if source.is_dir() else [source]
    return sum(path.stat().st_size for path in paths if path.is_file())


def apply(sandbox: Sandbox) -> None:
    """Put this process, and all that it will start, into the sandbox. Raises OSError."""
    for name, value in sandbox.limits.items():
        number, grace = LIMITS[name]
        hard = resource.getrlimit(number)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (most, most + grace if hard == resource.RLIM_INFINITY else hard))
    if (abi := landlock_abi()) > 0:
        _restrict(sandbox, abi)
    if not sandbox.gpu and seccomp.is_available():
        seccomp.deny_unix_sockets()


_announced: set[Kind] = set()


def announce(sandbox: Sandbox) -> None:
    """Log once for each kind of child how it is confined."""
    if sandbox.kind not in _announced:
        _announced.add(sandbox.kind)
        abi, has_filter = landlock_abi(), seccomp.is_available()
        sockets = "no Unix sockets"
        if sandbox.gpu:
            sockets = "they may open Unix sockets, which CUDA uses"
        elif not has_filter:
            sockets = "they may open Unix sockets, because this kernel or processor offers no filter of system calls"
        level = logging.INFO if abi and (has_filter or sandbox.gpu) else logging.WARNING
        log.log(level, "%s of %s processes; %s", description(abi), sandbox.kind, sockets)


@cache
def landlock_abi() -> int:
    """The version of Landlock that the kernel offers; 0 if it has none, or it is switched off."""
    if sys.platform != "linux":
        return 0
    return max(0, _libc().syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(GET_VERSION)))


def description(abi: int) -> str:
    """Return what a sandbox with this version of Landlock covers, for the log."""
    if abi == 0:
        return "sandbox: resource limits only, because this kernel offers no Landlock (Linux 5.13, switched on at boot)"
    missing = [what for what, first in FIRST_ABI_WITH.items() if abi < first]
    not_covered = f"; not covered before a later kernel: {', '.join(missing)}" if missing else ""
    return f"sandbox: landlock ABI {abi}{not_covered}"


def handled(abi: int) -> tuple[int, int, int]:
    """Return all rights that this version can restrict: for files, for TCP, and the scopes. A right that is handled but
    not granted is denied."""
    files = (MAKE_SYM << 1) - 1
    files |= (REFER if abi >= 2 else 0) | (TRUNCATE if abi >= 3 else 0) | (IOCTL_DEV if abi >= 5 else 0)
    tcp = BIND_TCP | CONNECT_TCP if abi >= 4 else 0
    scopes = SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL if abi >= 6 else 0
    return files, tcp, scopes


def rules(sandbox: Sandbox) -> list[tuple[str, int]]:
    """Return paths with the rights for each of them and for everything in it."""
    named = [part for name in PATH_VARIABLES for part in os.environ.get(name, "").split(os.pathsep) if part]
    packages = [str(ROOT / name) for name in PACKAGES]
    vendors = [f"/opt/{name}" for name in VENDORS]
    devices = [str(DEV / name) for name in DEVICES]
    if sandbox.gpu:
        devices += [str(path) for pattern in GPU_DEVICES for path in sorted(DEV.glob(pattern))]
    return [
        *((path, RUN) for path in (*SYSTEM, *vendors, *_python_folders(), *packages)),
        *((f"/etc/{name}", READ) for name in ETC),
        *((path, READ) for path in (*named, *sandbox.reads)),
        (str(ROOT), READ_DIR),  # Python lists it to find the packages
        *((path, DEVICE) for path in devices),
        *((path, WRITE) for path in sandbox.writes),
        *((path, WRITE | MAKE_SYM) for path in sandbox.links),
    ]


def _python_folders() -> list[str]:
    """Return the folders of Python's installation, its virtual environment and its module path.

    The working directory and Lorry's own folder are excluded, because they may hold secrets next to the packages.
    """
    sites = [*site.getsitepackages(), site.getusersitepackages()]
    on_path = [entry for entry in sys.path if entry not in ("", str(Path.cwd()), str(ROOT)) and Path(entry) != ROOT]
    return list(dict.fromkeys([sys.prefix, sys.base_prefix, sys.exec_prefix, *sites, *on_path]))


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("tcp", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def _restrict(sandbox: Sandbox, abi: int) -> None:
    files, tcp, scopes = handled(abi)
    attributes = _Ruleset(files, 0 if sandbox.tcp else tcp, scopes)
    num_bytes = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = _called(CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(num_bytes), ctypes.c_uint32(0))
    for path, rights in rules(sandbox):
        _allow(ruleset, path, rights & files)
    if _libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise _failed("prctl(PR_SET_NO_NEW_PRIVS)")
    _called(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # it does not exist here, or may not be reached anyway
        return
    try:
        allowed = rights if stat.S_ISDIR(os.fstat(descriptor).st_mode) else rights & OF_FILES
        rule = _PathBeneath(allowed, descriptor)
        _called(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(PATH_BENEATH), ctypes.byref(rule), ctypes.c_uint32(0))
    finally:
        os.close(descriptor)


def _called(number: int, *arguments: Any) -> int:
    """Raises OSError."""
    result = int(_libc().syscall(number, *arguments))
    if result < 0:
        raise _failed(f"Landlock's system call {number}")
    return result


def _failed(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
