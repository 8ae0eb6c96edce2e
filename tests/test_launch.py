"""Launchers: what they would run, when they start again, and how processes end together."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
EXPECTED = Path(__file__).parent / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
BARE = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
# Words that a shell must not split, and quotes that YAML and shells read.
COMMAND = ("adaptrm", "train", "reward", "my config", "--out", "/shared/o'clock")
SOURCE = {"SOURCE": "git+https://host/owner/adaptrm@main"}
RENDERED = {
    "slurm": ("slurm.sh", {"ENVIRONMENT": "/env"}),
    "tpu-vm": ("tpu-vm.sh", SOURCE | {"MOUNT": "10.0.0.2:/share"}),
    "queued-resource": ("queued-resource.sh", SOURCE),
    "gke-tpu": ("gke.sh", SOURCE | {"SLICES": "2"}),
    "gke-gpu": ("gke.sh", SOURCE | {"ON": "gpu", "NODES": "4"}),
}


def launch(script: str, *command: str, **environment: str) -> subprocess.CompletedProcess:
    given = ["bash", str(LAUNCH / script), *command]
    return subprocess.run(given, env=BARE | environment, capture_output=True, text=True, timeout=60)


def programs(folder: Path, **does: str) -> dict[str, str]:
    """Programs that do what is given, and the environment in which they are found first."""
    for name, script in does.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return BARE | {"PATH": f"{folder}:{BARE['PATH']}", "HOME": str(folder)}


def on_a_host(*command: str) -> str:
    """What a host of a TPU VM is told to do."""
    return launch("tpu-vm.sh", *command, DRY_RUN="1", **SOURCE).stdout.split("--command=\n")[1]


def test_every_script_is_clean(tmp_path):
    (tmp_path / "host.sh").write_text("#!/usr/bin/env bash\n" + on_a_host(*COMMAND))
    shellcheck = [Path(sys.executable).parent / "shellcheck", *SCRIPTS, tmp_path / "host.sh"]
    done = subprocess.run(shellcheck, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(os.access(script, os.X_OK) for script in SCRIPTS)


@pytest.mark.parametrize("name", RENDERED)
def test_what_would_run_is_what_was_looked_at(name):
    script, environment = RENDERED[name]
    done = launch(script, *COMMAND, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace(os.getcwd(), "/here") == (EXPECTED / f"{name}.txt").read_text()


@pytest.mark.parametrize("script", [script.name for script in SCRIPTS])
def test_without_a_command_a_script_says_how_it_is_used(script):
    done = launch(script, DRY_RUN="1", **SOURCE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ") and done.stderr.count("\n") == 1


def test_a_host_runs_the_words_of_the_command_and_tells_its_exit_code(tmp_path):
    """With the programs that it calls replaced by ones that write down how."""
    environment = programs(tmp_path, python3="exit 0", adaptrm='printf "%s|" "$@"; echo $JAX_PLATFORMS; exit 75')
    script = ["bash", "-c", on_a_host(*COMMAND)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75, done.stderr
    said, code = done.stdout.splitlines()
    assert said == "train|reward|my config|--out|/shared/o'clock|tpu"
    assert code.endswith(": exit code 75")


def test_a_host_that_cannot_install_had_no_bad_input(tmp_path):
    environment = programs(tmp_path, python3="exit 2")
    assert subprocess.run(["bash", "-c", on_a_host("true")], env=environment, timeout=60).returncode == 1


# Counts its starts, and saves when it is told to stop.
SAVES = """
trap 'echo saved; exit 75' TERM
echo "start of $1" | tee -a starts
for ((i = 0; i < 600; i++)); do
  [ -e ended ] && exit 0
  sleep 0.1
done
exit 1
"""


def connected(tmp_path: Path, word: str, environment: dict[str, str]) -> subprocess.Popen:
    given = ["bash", "-c", on_a_host("adaptrm", word)]
    process = subprocess.Popen(given, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline().decode() == f"start of {word}\n"
    return process


def test_a_host_goes_on_without_its_connection_and_is_found_again(tmp_path):
    environment = programs(tmp_path, python3="exit 0", adaptrm=SAVES)
    first = connected(tmp_path, "one", environment)
    os.killpg(first.pid, signal.SIGKILL)
    again = connected(tmp_path, "one", environment)
    (tmp_path / "ended").touch()
    assert again.wait(timeout=30) == 0
    assert again.stdout.read().endswith(b": exit code 0\n")
    assert (tmp_path / "starts").read_text() == "start of one\n"


def test_another_command_has_the_one_before_save_and_end(tmp_path):
    environment = programs(tmp_path, python3="exit 0", adaptrm=SAVES)
    one = connected(tmp_path, "one", environment)
    two = connected(tmp_path, "two", environment)
    assert one.wait(timeout=30) == 75
    assert b"saved\n" in one.stdout.read()
    (tmp_path / "ended").touch()
    assert two.wait(timeout=30) == 0
    assert (tmp_path / "starts").read_text() == "start of one\nstart of two\n"


@pytest.mark.parametrize(
    ("rounds", "code", "starts"),
    [
        ("exit 0", 0, 1),
        ("echo host-3: exit code 2; exit 134", 2, 1),
        ("exit $((n == 1 ? 134 : n == 2 ? 255 : 0))", 0, 3),
        ("exit 75", 75, 4),
    ],
    ids=["runs", "bad input of one host", "ended with a peer, and a lost connection", "again and again"],
)
def test_the_hosts_start_again_together(tmp_path, rounds, code, starts):
    environment = programs(tmp_path, gcloud=f"echo x >> starts; n=$(grep -c x starts); {rounds}")
    given = environment | SOURCE | {"RESTARTS": "3", "PAUSE": "0"}
    script = ["bash", str(LAUNCH / "tpu-vm.sh"), "adaptrm"]
    done = subprocess.run(script, cwd=tmp_path, env=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert (tmp_path / "starts").read_text().split() == ["x"] * starts


# Ends all tasks when one has failed, as --kill-on-bad-exit does, and has the code of those that it has ended.
SRUN = """
shift 2
for ((n = 0; n < 2; n++)); do SLURM_PROCID=$n "$@" & done
wait -n; code=$?
kill $(jobs -p)
wait
exit $((code ? 143 : 0))
"""


@pytest.mark.parametrize(
    ("task", "restarts", "code", "requeued"),
    [
        ("((SLURM_PROCID)) && exit 75; exec sleep 100", "0", 75, True),
        ("((SLURM_PROCID)) && exit 75; exec sleep 100", "20", 75, False),
        ("((SLURM_PROCID)) && exit 2; trap 'exit 75' TERM; for i in {1..600}; do sleep 0.1; done", "0", 2, False),
        ("((SLURM_PROCID)) && exit 134; exec sleep 100", "0", 143, False),
        ("exit 0", "0", 0, False),
    ],
)
def test_slurm_requeues_on_75_alone(tmp_path, task, restarts, code, requeued):
    environment = programs(tmp_path, srun=SRUN, scontrol='echo "$@" > requeued', adaptrm=task)
    environment |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts}
    (tmp_path / ".adaptrm-7.75").touch()  # left by an earlier start of the job
    script = ["bash", str(LAUNCH / "slurm.sh"), "adaptrm"]
    done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert not list(tmp_path.glob(".adaptrm-*"))


@pytest.mark.parametrize("group", ["", "-"], ids=["first process", "all processes"])
def test_a_task_of_slurm_that_is_told_to_stop_saves_first(tmp_path, group):
    """Slurm tells the shell around the command, and on some clusters both."""
    saves = "trap 'sleep 0.5; touch saved; exit 75' TERM; touch started; for i in {1..600}; do sleep 0.1; done"
    tells = f'shift 2; set -m; "$@" & until [ -e started ]; do sleep 0.1; done; kill -- {group}$!; wait $!'
    environment = programs(tmp_path, srun=tells, scontrol="touch requeued", adaptrm=saves) | {"SLURM_JOB_ID": "7"}
    script = ["bash", str(LAUNCH / "slurm.sh"), "adaptrm"]
    assert subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, timeout=60).returncode == 75
    assert (tmp_path / "saved").exists() and (tmp_path / "requeued").exists()


GCLOUD = """
case "$*" in
  *describe*)
    state=$(head -n1 states); sed -i 1d states
    case $state in
      absent) echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2; exit 1 ;;
      unreachable) echo "ERROR: (gcloud) UNAUTHENTICATED" >&2; exit 1 ;;
      *) echo "WARNING: it is old" >&2; echo $state ;;
    esac ;;
  *ssh*) echo ssh >> calls; code=$(head -n1 codes); sed -i 1d codes; exit $code ;;
  *) echo "$4" >> calls ;;
esac
"""


@pytest.mark.parametrize(
    ("states", "codes", "calls", "code"),
    [
        ("absent PROVISIONING ACTIVE", "0", "create ssh delete", 0),
        ("ACTIVE", "2", "ssh delete", 2),
        ("absent ACTIVE SUSPENDED SUSPENDED absent ACTIVE", "255 0", "create ssh delete create ssh delete", 0),
        # A connection that drops, and one that does not come, are no reason to give back a slice or to ask for another.
        ("ACTIVE ACTIVE unreachable ACTIVE unreachable ACTIVE", "255 255 0", "ssh ssh ssh delete", 0),
        ("ACTIVE " * 6, "75 134 75", "ssh ssh ssh delete", 75),
        ("absent FAILED absent FAILED absent", "", "create delete create delete", 1),
    ],
    ids=["runs", "bad input", "taken away", "connections", "again and again", "no quota"],
)
def test_a_queued_resource_is_asked_for_until_the_command_has_ended(tmp_path, states, codes, calls, code):
    environment = programs(tmp_path, gcloud=GCLOUD)
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states.split()))
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes.split()))
    environment |= SOURCE | {"PATIENCE": "0", "REQUESTS": "2", "RESTARTS": "2"}
    script = ["bash", str(LAUNCH / "queued-resource.sh"), "adaptrm"]
    done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "calls").read_text().split() == calls.split()
    assert (tmp_path / "states").read_text() == ""


def test_options_of_slurm_stand_before_its_first_command():
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert sum(line.startswith("#SBATCH") for line in lines[:first]) == 9
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


@pytest.mark.parametrize("name", ["gke-tpu", "gke-gpu"])
def test_a_jobset_has_the_fields_of_its_schema(name):
    """jobset.x-k8s.io/v1alpha2 and batch/v1, as far as they are used."""
    jobset = yaml.safe_load((EXPECTED / f"{name}.txt").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert jobset["spec"].keys() == {"failurePolicy", "replicatedJobs"}
    policy = jobset["spec"]["failurePolicy"]
    assert policy == {
        "maxRestarts": 20,
        "rules": [
            {"name": "badInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
        ],
    }
    [jobs] = jobset["spec"]["replicatedJobs"]
    assert jobs.keys() == {"name", "replicas", "template"} and isinstance(jobs["replicas"], int)
    job = jobs["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
    taken_away, bad_input = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert taken_away == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert bad_input == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]},
    }
    assert pod["restartPolicy"] == "Never"  # which a pod failure policy needs
    assert tuple(container["args"]) == COMMAND
    assert all(isinstance(value, str) for value in jobset["metadata"]["annotations"].values())
    assert all(isinstance(value, str) for value in pod["nodeSelector"].values())
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    hosts = f"{jobset['metadata']['name']}-{jobs['name']}-0-0.{jobset['metadata']['name']}"
    gpu = {"JAX_COORDINATOR_ADDRESS": f"{hosts}:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": None}
    gpu |= {"JAX_PLATFORMS": "cuda", "LD_LIBRARY_PATH": "/usr/local/nvidia/lib64"}
    assert environment == (gpu if name == "gke-gpu" else {"JAX_PLATFORMS": "tpu"})
    assert environment.get("JAX_NUM_PROCESSES", "2") == str(job["completions"])


def test_the_file_for_skypilot_has_the_fields_of_its_schema():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task.keys() == {"num_nodes", "resources", "envs", "volumes", "name", "workdir", "setup", "run"}
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 3}
    assert task["envs"] == {"COMMAND": None}  # it has to be given
    script = task["run"].replace("exec ~/adaptrm-env/bin/adaptrm", "printf '%s|'") + "\nenv | grep ^JAX | sort"
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    environment = BARE | nodes | {"COMMAND": "train reward 'my config'"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    named = "JAX_COORDINATOR_ADDRESS=10.0.0.1:8476\nJAX_NUM_PROCESSES=2\nJAX_PLATFORMS=cuda\nJAX_PROCESS_ID=1\n"
    assert done.stdout == f"train|reward|my config|{named}"


def test_no_launcher_overrides_the_model_of_a_config():
    for file in LAUNCH.iterdir():
        assert not re.search(r"--model|model\.pretrained|MODEL=", file.read_text()), file


LOCAL = str(LAUNCH / "local.sh")


def local(command: str, **environment: str) -> subprocess.CompletedProcess:
    return launch("local.sh", "bash", "-c", command, **environment)


def test_local_processes_are_numbered_and_the_first_talks():
    done = local('echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES"; echo $JAX_PROCESS_ID >&2', PROCESSES="3")
    assert (done.returncode, done.stdout) == (0, "0 of 3\n")
    assert sorted(done.stderr.split()) == ["0", "1", "2"]


@pytest.mark.parametrize("code", [1, 2, 137])
def test_the_local_launcher_gives_the_exit_code_of_what_failed_and_ends_the_others(tmp_path, code):
    start = time.monotonic()
    fails = f"until [ -e {tmp_path}/0 ]; do sleep 0.1; done; exit {code}"
    done = local(f"touch {tmp_path}/$JAX_PROCESS_ID; if ((JAX_PROCESS_ID)); then {fails}; fi; exec sleep 1000")
    assert done.returncode == code
    assert time.monotonic() - start < 30
    assert len(list(tmp_path.iterdir())) == 2


def test_the_local_launcher_starts_again_on_75_alone(tmp_path):
    command = f"""
    cd {tmp_path}; echo start >> $JAX_PROCESS_ID
    (($(grep -c start $JAX_PROCESS_ID) == 2)) && exit 0
    until [ -s 0 -a -s 1 ]; do sleep 0.1; done
    exit 75"""
    done = local(command)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / number).read_text() for number in "01"] == ["start\nstart\n"] * 2
    assert local("exit 75", RESTARTS="2").stderr.count("starting again") == 2


@pytest.mark.parametrize(
    ("then", "code", "grace"), [("sleep 1; exit 75", 75, "60"), (":", 128 + signal.SIGKILL, "1")], ids=["saves", "deaf"]
)
def test_the_local_launcher_hands_on_that_it_is_to_stop_and_waits_for_a_save(tmp_path, then, code, grace):
    command = f"trap '{then}' TERM; touch {tmp_path}/$JAX_PROCESS_ID; while true; do sleep 0.1; done"
    process = subprocess.Popen(["bash", LOCAL, "bash", "-c", command], env=BARE | {"GRACE": grace})
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == code  # and no start again: it was told to stop
