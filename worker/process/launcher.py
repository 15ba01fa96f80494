"""Starts trainers and other child processes: command line, environment, process group, heartbeat pipe.

No configuration file is read. No secret of the worker reaches a trainer.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from catalog import failpoints, logs
from catalog.clock import boot_seconds
from worker.node import cgroup, devices
from worker.process import sandbox
from worker.process.confined_child import OPTION, SIGN, confined
from worker.process.sandbox import Sandbox
from worker.protocol.mailbox import Json, TrainerDirectory
from worker.protocol.rendezvous import RANKS_FILE

SYSTEM = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD")
ALLOWED = frozenset({*SYSTEM, "CC", "SSL_CERT_FILE", "SSL_CERT_DIR", "NCCL_IB_PKEY", failpoints.VARIABLE, logs.FORMAT})
ALLOWED_PREFIXES = (
    *("LC_", "CUDA_", "NVIDIA_", "NCCL_", "MKL_", "OMP_", "GOMP_", "KMP_", "ATEN_", "TORCH_", "PYTORCH_"),
    *("TORCHINDUCTOR_", "TRITON_"),
)
CREDENTIAL_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PEPPER|CREDENTIAL", re.IGNORECASE)
"""A variable with such a name may hold a credential, for example NVIDIA_API_KEY. It is passed on only if ALLOWED or
HUB names it. NCCL_IB_PKEY is allowed because it is the index of an InfiniBand partition."""
HUB = ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "XDG_CACHE_HOME")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "REQUESTS_CA_BUNDLE")
CUDA = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
"""CUDA numbers GPUs as NVML does. A fixed workspace makes the sums of cuBLAS reproducible. No other setting for
determinism is needed: torch's own switch rejects or slows operations that no job's result depends on, and the engine's
probe at start-up measures what this machine guarantees.

cuDNN's attention builds a plan for each new length, which takes up to a second (torch prefers it on compute capability
9 and 10). Ticks differ in their number of tokens, which fragments memory unless segments can grow."""
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
LAUNCHED = (
    "--multi_gpu",  # several processes, also on a CPU: accelerate's --cpu would start only one
    "--num_machines=1",
    "--machine_rank=0",
    "--rdzv_backend=c10d",
    "--rdzv_conf=store_type=file,keep_alive_interval=86400",  # each keep-alive is appended to the file
    "--mixed_precision=no",
    "--dynamo_backend=no",
    "--max_restarts=0",
)
"""Complete, so that accelerate reads no configuration file. It runs nvidia-smi once, for the names of the GPUs."""
ROOT = Path(__file__).resolve().parents[2]
KILL_SECONDS = 10.0
"""Killed processes usually disappear within this time."""
UNKILLABLE_SECONDS = 60.0
"""After this time, a killed process that still exists is left behind. A driver may take long to free its memory."""
TEMPORARY = "tmp"
"""Folder for temporary files, in the child's own folder."""
NICENESS = 10
"""Niceness of processes that compute on the cores, relative to their worker."""


class TrainerProcess:
    """A running trainer: a child process in its own process group."""

    def __init__(self, process: subprocess.Popen[bytes], directory: TrainerDirectory) -> None:
        self.directory = directory
        self.started_at = time.monotonic()
        self.oom_kills_before = cgroup.oom_kills()
        self._process = process
        self._killed_at: float | None = None
        self._killed: set[psutil.Process] = set()
        """Processes that the trainer had started when it was killed."""

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    @property
    def is_killed(self) -> bool:
        """Whether its worker has killed it."""
        return self._killed_at is not None

    @property
    def is_awaited(self) -> bool:
        """Whether it runs, or was killed and may still exit."""
        return self._is_running() and not self.is_left_behind

    @property
    def is_left_behind(self) -> bool:
        """Whether it was killed long ago and still exists. It then waits in the kernel, for a driver or a disk, where
        no signal reaches it."""
        killed_at = self._killed_at
        return killed_at is not None and time.monotonic() - killed_at > UNKILLABLE_SECONDS and self._is_running()

    def _is_running(self) -> bool:
        return self.returncode is None or any(map(_is_alive, self._killed))

    @property
    def pid(self) -> int:
        return self._process.pid

    def pids(self) -> list[int]:
        """Return the ids of all its processes, including the launcher."""
        return [self._process.pid, *(process.pid for process in self._started())]

    def memory_bytes(self) -> int:
        """Return its own memory, without mapped pages of files. 0 after it has exited. Takes microseconds."""
        try:
            held = psutil.Process(self._process.pid).memory_info()
        except psutil.Error:
            return 0
        return int(held.rss - getattr(held, "shared", 0))

    def begin(self, settings: Json) -> None:
        """Have it load its base model. The time limit for loading starts now. Raises OutOfSpace."""
        self.directory.begin(settings)
        self.started_at = time.monotonic()
        self.oom_kills_before = cgroup.oom_kills()

    def send_heartbeat(self, began_at: float | None = None) -> None:
        """Send the trainer the `boot_seconds` at which its worker's heartbeat began, by default now. Never blocks."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            os.write(self._process.stdin.fileno(), SIGN.pack(boot_seconds() if began_at is None else began_at))

    def wait(self, seconds: float) -> bool:
        """Wait until it exits, for at most `seconds`. Returns whether it has exited."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Kill the process group and all processes that it has started, which may have their own groups. Waits for
        them for a limited time; see `is_left_behind`."""
        started = self._started()
        self._killed |= set(started)
        self._killed_at = self._killed_at or time.monotonic()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in started:
            with contextlib.suppress(psutil.Error):
                process.kill()
        seconds = 0 if self.is_left_behind else KILL_SECONDS
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        psutil.wait_procs(started, timeout=seconds)

    def _started(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.Error:
            return []

    def close(self) -> None:
        """Kill its remaining processes, and close its standard input."""
        self.kill()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()


def _is_alive(process: psutil.Process) -> bool:
    """Return whether the process runs. A zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def launch(
    directory: TrainerDirectory,
    device: devices.Device,
    *,
    silence_seconds: float,
    bases_dir: Path,
    num_processes: int = 1,
    in_gang: bool = False,
) -> TrainerProcess:
    """Start the trainer of `directory` on `device`. Call it from a thread that outlives the trainer.

    The trainer imports its libraries, and waits for its settings if the directory has none yet. It exits if it gets no
    `send_heartbeat` for `silence_seconds`. Each of its `num_processes` has its own GPU, or an equal part of the cores.
    If one process fails, all exit. Its sandbox lets it read no base models except those in `bases_dir`. It can use TCP
    only if it has several processes here or, with `in_gang`, on other machines.
    """
    if device.kind == "cuda":
        devices.create_uvm_node()
    tcp, gpu = num_processes > 1 or in_gang, device.kind != "cpu"
    box = sandbox.trainer(directory.path, bases_dir=bases_dir, tcp=tcp, gpu=gpu)
    sandbox.announce(box)
    (directory.path / TEMPORARY).mkdir(exist_ok=True)
    threads = max(1, devices.num_threads() // num_processes)
    environment = trainer_environment(directory.path, device, num_threads=threads)
    argv = trainer_argv(directory.path, silence_seconds=silence_seconds, num_processes=num_processes)
    with directory.log_path.open("ab") as log:
        process = subprocess.Popen(
            confined(argv, box),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment | rendezvous(directory.path, num_processes),
            cwd=directory.path,
            start_new_session=True,
        )
    if device.kind == "cpu":
        lower_priority(process.pid)
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    return TrainerProcess(process, directory)


def lower_priority(pid: int) -> None:
    """Lower the priority of a process that has just started, and of all that it starts.

    The API server, the database and the worker's heartbeats on this machine then stay as fast as without training.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)


def rendezvous(path: Path, num_processes: int) -> dict[str, str]:
    """Return the variables by which the launcher and the processes on one machine find each other.

    They use files in the trainer's folder, with names that no other launch has. torch's default stores would listen on
    every address, and torch's launcher unpickles the content of one of them. The processes communicate over the
    loopback interface, whatever the host name of the machine is.
    """
    if num_processes == 1:
        return {}
    name = secrets.token_hex(8)
    return {
        "PET_RDZV_ENDPOINT": str(path / f"launch-{name}"),  # read by torchrun: accelerate has no argument for it
        "PET_RDZV_ID": name,
        "PET_LOCAL_ADDR": "127.0.0.1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        RANKS_FILE: str(path / f"ranks-{name}"),
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "NCCL_SOCKET_IFNAME": f"={LOOPBACK}",
    }


def trainer_argv(path: Path, *, silence_seconds: float, num_processes: int = 1) -> list[str]:
    """Return the trainer's command line. A single process is started directly: accelerate's launcher would import
    torch, which takes seconds and memory, to set variables that are not needed."""
    entry = ["-m", "worker.children.trainer.main", str(path), f"{OPTION}{silence_seconds}"]
    if num_processes == 1:
        return [sys.executable, *entry]
    return [sys.executable, "-m", "accelerate.commands.launch", *LAUNCHED, f"--num_processes={num_processes}", *entry]


def trainer_environment(path: Path, device: devices.Device, *, num_threads: int) -> dict[str, str]:
    """Return the environment of a trainer. It has no access to the hub, and has its own cache folder."""
    return child_environment() | {
        "OMP_NUM_THREADS": str(num_threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(path / "hub"),  # accelerate would also read a configuration file in it
        "TMPDIR": str(path / TEMPORARY),
        **sandbox.environment(),
        **({"CUDA_VISIBLE_DEVICES": ""} if device.kind == "cpu" else CUDA | {"CUDA_VISIBLE_DEVICES": _visible(device)}),
    }


def _visible(device: devices.Device) -> str:
    """Return all GPUs of the device group, in its order. The first one is cuda:0."""
    return ",".join(device.uuids)


def child_environment(*, with_hub: bool = False) -> dict[str, str]:
    """Return the allow-listed part of the worker's environment. with_hub: also the variables for downloads."""
    wanted = {*ALLOWED, *HUB, *PROXIES} if with_hub else ALLOWED
    kept = {name: value for name, value in os.environ.items() if name in wanted or _is_tuning(name)}
    path = os.pathsep.join(part for part in (str(ROOT), kept.get("PYTHONPATH", "")) if part)
    return kept | {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _is_tuning(name: str) -> bool:
    """Whether a variable tunes a library, by its prefix, and holds no credential."""
    return name.startswith(ALLOWED_PREFIXES) and not CREDENTIAL_NAMES.search(name)


def run_child(module: str, *arguments: str, log_path: Path, box: Sandbox) -> subprocess.Popen[bytes]:
    """Start `python -m module arguments…` in its sandbox. The kernel kills it when the calling thread ends.

    Its temporary files are in the folder of `log_path`. A child without TCP gets neither the hub's token nor its
    cache.
    """
    sandbox.announce(box)
    temporary = log_path.parent.absolute() / TEMPORARY
    temporary.mkdir(exist_ok=True)
    offline = {} if box.tcp else {"HF_HUB_OFFLINE": "1", "HF_HOME": str(temporary / "hub")}
    with log_path.open("ab") as log:
        child = subprocess.Popen(
            confined([sys.executable, "-m", module, *arguments], box),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=child_environment(with_hub=box.tcp) | {"TMPDIR": str(temporary)} | offline,
            start_new_session=True,
        )
    lower_priority(child.pid)
    return child
