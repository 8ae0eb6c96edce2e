"""How the processes of one program find each other, and what becomes of one whose peers do not come."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from commands import ADAPTRM, ENV, free_port, start_together

from adaptrm.errors import RESTART, InputError
from adaptrm.parallel.distributed import Processes, find_processes, start_processes

NAMES = (
    "JAX_",
    "SLURM_",
    "OMPI_",
    "TPU_",
    "MEGASCALE_",
    "KUBERNETES_",
    "JOB_COMPLETION_INDEX",
    "CUDA_VISIBLE",
    "ADAPT",
)
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
# A step of eight tasks on two nodes; and that of srun --pty or salloc, a single task in a job of eight.
SLURM = {
    "SLURM_JOB_ID": "8192",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
INTERACTIVE = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0"}
A_NODE = SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
ORTE = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in list(os.environ):
        if name.startswith(NAMES) and name not in ("JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (EXPLICIT, Processes("10.0.0.1:1234", 4, 2)),
        (EXPLICIT | SLURM | OMPI, Processes("10.0.0.1:1234", 4, 2)),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, Processes("node07:61440", 8, 5, [1])),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "1"}, Processes("node07:61440", 8, 5)),  # srun --gpus-per-task 1
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Processes("node07:61440", 8, 5, [1])),
        (SLURM | {"JAX_COORDINATOR_PORT": "1234"}, Processes("node07:1234", 8, 5, [1])),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "ib07:1234"}, Processes("ib07:1234", 8, 5, [1])),
        (A_NODE, Processes("node07:61440", 2, 1)),
        (INTERACTIVE, None),
        ({name: value for name, value in SLURM.items() if "STEP" not in name}, None),  # in an sbatch script
        (OMPI | ORTE, Processes("10.96.0.1:62624", 4, 3, [1])),
        (OMPI | ORTE | INTERACTIVE, Processes("10.96.0.1:62624", 4, 3, [1])),
        (OMPI | {"JAX_COORDINATOR_ADDRESS": "a:1"}, Processes("a:1", 4, 3, [1])),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod of no job: a notebook
    ],
)
def test_processes_are_found_by_the_environment(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_processes() == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS is not set, other settings of a multi-process run are"),
        (SLURM | {"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS is not set"),
        (
            EXPLICIT | {"JAX_PROCESS_ID": "4"},
            "JAX_NUM_PROCESSES=4 and JAX_PROCESS_ID=4 must be numbers, the second bel",
        ),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "x"}, "JAX_NUM_PROCESSES=x and JAX_PROCESS_ID=2 must be numbers"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "h"}, "JAX_COORDINATOR_ADDRESS is 'h'; it must be host:port of proc"),
        (OMPI, "Open MPI runs 4 processes and does not say where the first is; set JAX_COORDINATOR_ADDRESS to a host"),
        ({"ADAPTRM_JOIN_SECONDS": "soon"}, "ADAPTRM_JOIN_SECONDS is 'soon'; it must be a number"),
    ],
)
def test_an_environment_that_says_too_little_is_an_error(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        start_processes()


@contextmanager
def metadata(attributes: dict[str, str]):
    """The metadata server of a TPU VM."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit("/", 1)[-1]
            known = name in attributes and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(attributes.get(name, "").encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


# jax looks for chips when it is imported, and keeps what it found to itself.
ON_A_TPU = """
import json, os, sys, jax
del os.environ["TPU_SKIP_MDS_QUERY"]
from adaptrm.parallel.distributed import find_processes
for case in json.loads(sys.argv[1]):
    os.environ.update(case)
    print(find_processes(5))
    for name in case:
        del os.environ[name]
"""


def test_processes_are_found_by_the_metadata_of_tpus():
    gke = {"TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.3", "TPU_WORKER_ID": "1"}
    one_slice = {"MEGASCALE_COORDINATOR_ADDRESS": "", "MEGASCALE_NUM_SLICES": "", "MEGASCALE_SLICE_ID": ""}
    second = {"MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.2:8080", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    vm = {"agent-worker-number": "1", "worker-network-endpoints": "a:b:127.0.0.1,c:d:127.0.0.4", "tpu-env": "X: 'y'"}
    slices = "\n".join(f"{name}: '{value}'" for name, value in second.items())
    alone = vm | {"agent-worker-number": "0", "worker-network-endpoints": "a:b:127.0.0.1"}
    with metadata(vm) as of_vm, metadata(vm | {"tpu-env": slices}) as of_slices, metadata(alone) as of_one:
        cases = [
            (gke | one_slice, Processes("127.0.0.1:8482", 2, 1)),
            (gke | second, Processes("127.0.0.2:8482", 4, 3)),
            ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"} | one_slice, None),
            ({"GCE_METADATA_IP": of_vm}, Processes("127.0.0.1:8482", 2, 1)),
            ({"GCE_METADATA_IP": of_slices}, Processes("127.0.0.2:8482", 4, 3)),
            ({"GCE_METADATA_IP": of_one}, None),
        ]
        command = [sys.executable, "-c", ON_A_TPU, json.dumps([case for case, _ in cases])]
        env = ENV | {"JAX_FORCE_TPU_INIT": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [str(expected) for _, expected in cases], done.stderr


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_whose_peers_do_not_come_says_so_and_may_start_again(number):
    address = f"127.0.0.1:{free_port()}"
    env = ENV | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number)}
    command = [ADAPTRM, "train", "reward", "demo", "--out", os.devnull]
    done = subprocess.run(command, env=env | {"ADAPTRM_JOIN_SECONDS": "2"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == RESTART
    assert done.stderr == (
        f"adaptrm: process {number} of 2 (0 to 1): the others did not all come to process 0 at {address} within 2 s; "
        "look whether each has started and reaches that address, or raise ADAPTRM_JOIN_SECONDS\n"
    )


GATHER = """
import os, sys, numpy as np
from adaptrm.parallel.distributed import exchanged, gathered, start_processes
start_processes()
import jax
mine = np.array([[1 / 3, np.nan], [jax.process_index(), 5e-324]])
bulk = bytes(5 << 20)  # more than gRPC takes at once
arrived = exchanged((bulk, jax.process_index())) == [(bulk, 0), (bulk, 1)]
said = gathered(mine).tobytes().hex(), exchanged("x" * (1 + 9 * jax.process_index()))
kept = jax._src.distributed.global_state.client.key_value_dir_get_bytes("adaptrm/")
forgotten = sum(len(value) for _, value in kept) < 1000
print(*said, arrived, forgotten, flush=True)
"""


def test_what_processes_tell_each_other_arrives_bit_for_bit():
    env = ENV | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    both = [
        subprocess.Popen([sys.executable, "-c", GATHER], env=env | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE)
        for i in range(2)
    ]
    said = [process.communicate(timeout=120)[0].decode().splitlines()[-1] for process in both]
    expected = np.stack([np.array([[1 / 3, np.nan], [i, 5e-324]]) for i in range(2)])
    assert said == [f"{expected.tobytes().hex()} ['x', 'xxxxxxxxxx'] True True"] * 2


# The second process waits in C++ for the first, which sleeps.
WAITS = """
import sys, time, numpy as np
from adaptrm.parallel.distributed import gathered, start_processes
start_processes()
import jax
print("here", flush=True)
time.sleep(300) if jax.process_index() == 0 else gathered(np.zeros(1))
"""


def are_here(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        assert "here\n" in iter(process.stdout.readline, "")


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_process_ends_all_of_them_at_once(told):
    both = start_together(sys.executable, "-c", WAITS)
    are_here(both)
    both[told].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=30)[1] for process in both]
    line = "adaptrm: stopped by SIGTERM; what was saved is kept; start the same command again to go on\n"
    assert [process.returncode for process in both] == [RESTART] * 2 and said == [line] * 2


@pytest.mark.slow
def test_sigterm_to_a_process_that_waits_for_the_others_ends_it_at_once():
    first, second = both = start_together(sys.executable, "-c", WAITS)
    are_here(both)
    second.kill()
    time.sleep(1)
    first.send_signal(signal.SIGTERM)
    assert "adaptrm: stopped by SIGTERM" in first.communicate(timeout=30)[1]
    assert first.returncode == RESTART
    second.communicate()


# Processes that are not in step ask so often, until they are told to stop; or leave, each when it likes.
ASKS = """
import sys, time
from adaptrm.errors import Stopped
from adaptrm.parallel.distributed import start_processes
from adaptrm.train.preemption import stops_when_asked
start_processes()
import jax
asked, most = 1, int(sys.argv[1])
try:
    with stops_when_asked() as told:
        print("here", flush=True)
        while not told() and asked < most:
            asked += 1
            time.sleep(0.02 * (1 + jax.process_index()))
        if asked == most:
            time.sleep(3)
        print(asked, flush=True)
except Stopped:
    print("stopped", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("most", [10**9, 5])
def test_processes_that_ask_stop_at_the_same_question_or_behind_the_last(most):
    both = start_together(sys.executable, "-c", ASKS, most)
    are_here(both)
    time.sleep(1)
    both[1].send_signal(signal.SIGTERM)
    one, other = ([*process.communicate(timeout=60), process.returncode] for process in both)
    assert one == other and one[2] == 0 and one[1] == ""
    asked, *rest = one[0].splitlines()
    assert rest == ["stopped"] and (int(asked) == 5) == (most == 5)


# A verb that the first process takes longer for; what is registered last for the end comes before jax's own end.
ENDS = """
import atexit, sys, time
from adaptrm import cli
def verb():
    from adaptrm.parallel.distributed import start_processes
    start_processes()
    import jax
    joined = time.monotonic()
    atexit.register(lambda: print("ended", time.monotonic() - joined, flush=True))
    time.sleep(6 if jax.process_index() == 0 else 0)
    sys.exit(0)
cli.app = verb
cli.main()
"""


@pytest.mark.slow
def test_a_process_that_is_done_waits_for_the_others():
    both = start_together(sys.executable, "-c", ENDS)
    said = [process.communicate(timeout=60)[0].splitlines()[-1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(line.startswith("ended") and float(line.split()[1]) > 4 for line in said)
