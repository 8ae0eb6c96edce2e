"""Several processes as one program: who they are, how they find each other, what they tell each other."""

import itertools
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax._src import clusters, distributed  # jax has no public way to ask who is there, and to tell them something
from jax.experimental import multihost_utils

from adaptrm import progress
from adaptrm.errors import RESTART, InputError
from adaptrm.parallel.stopping import stop_together

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
JOIN_SECONDS = "ADAPTRM_JOIN_SECONDS"
FOREVER = 30 * 24 * 3600 * 1000  # milliseconds; that a process has died is found out by jax, which ends the others
PIECE = 1 << 20  # bytes of a message: gRPC by itself takes no more than 4 MiB
_messages, _kept = itertools.count(), []


@dataclass(frozen=True)
class Launcher:
    """A launcher of processes, by the variables that it sets for each of them.

    Attributes:
        count, number: how many processes there are, and which of them this is.
        local_number: which it is on its host.
        hosts: how many hosts there are; None where ``local_count`` says how many processes this one has.
    """

    name: str
    cluster: type[clusters.ClusterEnv]
    count: str
    number: str
    local_number: str
    local_count: str | None = None
    hosts: str | None = None


# Of Slurm the step's tasks, where jax reads the job's: in an interactive step those would be waited for in vain.
LAUNCHERS = (
    Launcher(
        "Open MPI",
        clusters.OmpiCluster,
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        local_count="OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher(
        "Slurm",
        clusters.SlurmCluster,
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        hosts="SLURM_STEP_NUM_NODES",
    ),
)


@dataclass(frozen=True)
class Processes:
    """The processes of one program.

    Attributes:
        coordinator: host:port where process 0 listens.
        count, number: how many there are, and which of them this is.
        devices: of its host that are this process's; None for all.
    """

    coordinator: str
    count: int
    number: int
    devices: list[int] | None = None


def start_processes() -> None:
    """Join the other processes where there are any, else stay alone; from then on only process 0 talks.

    Processes that do not all come within ``ADAPTRM_JOIN_SECONDS`` (300) end with one line and exit code 75. Those that
    have joined before stay together. SIGTERM to one of them ends all, see ``stopping``.

    Raises:
        InputError: what the environment says of the other processes is not whole.
    """
    if jax.distributed.is_initialized():
        return
    seconds = _number(JOIN_SECONDS, os.environ.get(JOIN_SECONDS, "300"))
    found = find_processes(seconds)
    if found is None:
        return
    # When jax's own time is up it aborts with a page of C++ frames.
    timer = threading.Timer(seconds, _give_up, (found, seconds))
    timer.daemon = True
    timer.start()
    joined = stop_together(found.number, found.count)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, and say nothing
    jax.distributed.initialize(
        found.coordinator,
        found.count,
        found.number,
        found.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=seconds + 60,
    )
    multihost_utils.sync_global_devices("start")  # connects the devices while nobody is late
    timer.cancel()
    joined.set()
    if found.number > 0:
        progress.silence()


def find_processes(seconds: int = 300) -> Processes | None:
    """What the environment says of the processes of this program; None for one that is alone.

    The first that says anything: ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``; Open MPI;
    Slurm; the metadata of a TPU on GKE or of a TPU VM; an indexed Kubernetes Job.

    Args:
        seconds: to wait until the name of the first host is known.

    Raises:
        InputError: it does not say enough.
    """
    given = {name: value for name in EXPLICIT if (value := os.environ.get(name))}
    launcher = next((launcher for launcher in LAUNCHERS if launcher.count in os.environ), None)
    if given and (launcher is None or given.keys() != {EXPLICIT[0]}):
        found = _explicit(given)
    elif launcher is not None:
        found = _launched(launcher, given.get(EXPLICIT[0]))
    else:
        found = _asked(seconds)
    return None if found is None or found.count == 1 else found


def _explicit(given: dict[str, str]) -> Processes:
    if missing := [name for name in EXPLICIT if name not in given]:
        raise InputError(f"{missing[0]} is not set, other settings of a multi-process run are; set all three")
    address, count, number = (given[name] for name in EXPLICIT)
    if not count.isdecimal() or not number.isdecimal() or int(number) >= int(count):
        raise InputError(
            f"JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={number} must be numbers, the second below the first"
        )
    return _placed(Processes(address, int(count), int(number)))


def _launched(launcher: Launcher, address: str | None) -> Processes | None:
    count, number = (_number(name, os.environ.get(name)) for name in (launcher.count, launcher.number))
    if count == 1:
        return None
    if address is None:
        with suppress(RuntimeError):  # of a newer jax under Open MPI 5 without mpi4py
            if launcher.cluster.is_env_present():
                address = launcher.cluster.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT"))
        if address is None:
            raise InputError(
                f"{launcher.name} runs {count} processes and does not say where the first is; set {EXPLICIT[0]} to a "
                "host:port of its host"
            )
    if launcher.hosts is None:
        several = _number(launcher.local_count, os.environ.get(launcher.local_count)) > 1
    else:
        several = count > _number(launcher.hosts, os.environ.get(launcher.hosts))
    # Several processes on a host take a device each; of devices that the launcher has dealt out, each sees its own.
    dealt_out = os.environ.get("CUDA_VISIBLE_DEVICES", "").isdecimal()
    local = _number(launcher.local_number, os.environ.get(launcher.local_number))
    return _placed(Processes(address, count, number, [local] if several and not dealt_out else None))


def _asked(seconds: int) -> Processes | None:
    """From the metadata of TPUs, or from Kubernetes."""
    on_kubernetes = [clusters.K8sCluster] if "JOB_COMPLETION_INDEX" in os.environ else []  # no other pod has peers
    try:
        for cluster in (clusters.GkeTpuCluster, clusters.GceTpuCluster, *on_kubernetes):
            if cluster.is_env_present():
                count = cluster.get_process_count()
                if count == 1:
                    return None
                address = cluster.get_coordinator_address(seconds, os.environ.get("JAX_COORDINATOR_PORT"))
                return _placed(Processes(address, count, cluster.get_process_id()))
    except (RuntimeError, OSError, LookupError) as wrong:
        reason = str(wrong).splitlines()[0] if str(wrong) else type(wrong).__name__
        raise InputError(f"cannot find out about the other processes: {reason}; set {', '.join(EXPLICIT)}") from None
    return None


def _placed(found: Processes) -> Processes:
    host, colon, port = found.coordinator.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise InputError(f"{EXPLICIT[0]} is {found.coordinator!r}; it must be host:port of process 0")
    return found


def _number(name: str, value: str | None) -> int:
    if value is None or not value.isdecimal():
        raise InputError(f"{name} is {value!r}; it must be a number")
    return int(value)


def _give_up(found: Processes, seconds: int) -> None:
    print(
        f"adaptrm: process {found.number} of {found.count} (0 to {found.count - 1}): the others did not all come to "
        f"process 0 at {found.coordinator} within {seconds} s; look whether each has started and reaches that address, "
        f"or raise {JOIN_SECONDS}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(RESTART)


def gathered(values: np.ndarray) -> np.ndarray:
    """``[processes, ...]``: the arrays of all processes, alike in shape, bit for bit in any dtype."""
    sent = _sent_by_all(values.tobytes())
    return np.stack([np.frombuffer(of_one, values.dtype).reshape(values.shape) for of_one in sent])


def exchanged(value: Any) -> list[Any]:
    """What each process gives, from the first to the last: anything that pickle takes."""
    if jax.process_count() == 1:
        return [value]
    return [pickle.loads(sent) for sent in _sent_by_all(pickle.dumps(value))]


def _sent_by_all(mine: bytes) -> list[bytes]:
    """What each process sends, from the first to the last.

    By the processes' own service, not by their devices: collectives of a CPU give up on a process that is 30 s late.
    """
    if jax.process_count() == 1:
        return [mine]
    client, count, me = distributed.global_state.client, next(_messages), jax.process_index()
    number = -(-len(mine) // PIECE)
    names = [f"adaptrm/{count}/{me}/{piece}" for piece in range(1 + number)]
    client.key_value_set_bytes(names[0], str(number).encode())
    for piece, name in enumerate(names[1:]):
        client.key_value_set_bytes(name, mine[piece * PIECE : (piece + 1) * PIECE])

    def sent_by(process: int) -> bytes:
        get = lambda piece: client.blocking_key_value_get_bytes(f"adaptrm/{count}/{process}/{piece}", FOREVER)  # noqa: E731
        return b"".join(get(1 + piece) for piece in range(int(get(0))))

    found = [sent_by(process) for process in range(jax.process_count())]
    # Whoever has sent this message has read all of the one before: the service, which is the first process, forgets it.
    while _kept:
        client.key_value_delete(_kept.pop())
    _kept.extend(names)
    return found


def wait_for_all() -> None:
    """Return when every process has come here."""
    _sent_by_all(b"")


@contextmanager
def told_to_all(where: Any) -> Iterator[bool]:
    """What the first process does alone, as it is told whether it is: where it fails, all fail, and none waits for it.

    Raises:
        InputError: in the other processes, where the first one fails.
    """
    wrong = None
    try:
        yield jax.process_index() == 0
    except Exception as raised:
        wrong = raised
    if not gathered(np.array([wrong is None]))[0, 0]:
        raise wrong or InputError(f"{where}: the first process cannot write this; mend what it says")
    if wrong is not None:
        raise wrong


def to_host(value: jax.Array) -> np.ndarray:
    """The whole of an array, wherever its parts lie; every process has to ask for it."""
    if value.is_fully_addressable:
        return np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))
