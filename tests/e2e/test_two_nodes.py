"""A run over two Ray nodes: on one machine as two raylets, and in two network namespaces with addresses of their own.

What goes wrong on the way in (address, token, versions, resources) is one line, within its limit. The runs themselves are marked slow:
each starts a crew of processes twice.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster

from rlrestore.actors.cluster import bundle_nodes, reserve, start_ray
from rlrestore.actors.crew import RayCrew
from rlrestore.actors.doctor import check_ray
from rlrestore.actors.joining import differences, join
from rlrestore.build import build_run, check_parts, load_train_config
from rlrestore.config.files import ConfigError
from rlrestore.config.sections import PlacementConfig, RayConfig
from rlrestore.engine.build import free_port
from rlrestore.errors import ClusterError
from rlrestore.loop import train
from rlrestore.placement import Node, assign, pools
from rlrestore.reporting.log import read_metrics
from rlrestore.rundir import open_run
from tests.tiny import write_tiny

pytestmark = (
    pytest.mark.slow
)  # two Ray nodes: not yet seen green within the whole suite, where other tests have had a Ray before

ROOT = Path(__file__).resolve().parents[2]
NODE = {"object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """3 CPUs on the head, 2 on the other node, one token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "ab" * 32)
        patch.setenv("RAY_raylet_start_wait_time_s", "120")
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()  # of a Ray that an earlier test of this process started
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False, **NODE})
        try:
            cluster.add_node(num_cpus=2, **NODE)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            AuthenticationTokenLoader.instance().reset_cache()


@pytest.fixture
def joined(cluster: Cluster) -> Iterator[Cluster]:
    start_ray(RayConfig(cluster.address), 1)
    yield cluster
    ray.shutdown()


def refused(address: str) -> str:
    started = time.monotonic()
    with pytest.raises(ClusterError) as caught:
        join(address, lambda: ray.init(address=address, log_to_driver=False, logging_level="CRITICAL"))
    assert time.monotonic() - started < 15
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the way in --------------------------------------------------------------------------------------------------------


def test_a_wrong_address_is_said_at_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    port = free_port()
    message = refused(f"127.0.0.1:{port}")
    assert message.startswith(f"nothing answers at 127.0.0.1:{port} (Connection refused): start Ray's head there")
    assert "nothing answers at no.such.host.invalid:6379" in refused("no.such.host.invalid:6379")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        monkeypatch.setattr("rlrestore.actors.joining.CONNECT_S", 1.0)
        assert refused(f"127.0.0.1:{port}") == f"what answers at 127.0.0.1:{port} is no Ray head (DEADLINE_EXCEEDED)"
    monkeypatch.setattr("rlrestore.actors.joining.read_ray_address", lambda: None)
    assert refused("auto").startswith("ray.address=auto finds no Ray on this machine: start it with ray start")


def test_a_missing_or_wrong_token_is_said_at_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "cd" * 32)
    assert refused(cluster.address) == (
        f"the cluster at {cluster.address} refuses the token from RAY_AUTH_TOKEN: use the one that its nodes were started with"
    )
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert f"the cluster at {cluster.address} asks for a token and there is none here" in refused(cluster.address)
    (tmp_path / "token").write_text("cd" * 32)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert f"refuses the token from {tmp_path}/token" in refused(cluster.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "asks for a token and there is none here" in refused(cluster.address)


def test_another_python_on_the_cluster_is_named(cluster: Cluster) -> None:
    """The head's own versions stand in its store, where a driver of another version finds them."""
    store = GcsClient(address=cluster.address)
    kept = store.internal_kv_get(b"CLUSTER_METADATA", b"cluster")
    try:
        other = {**json.loads(kept), "python_version": "3.9.1"}
        store.internal_kv_put(b"CLUSTER_METADATA", json.dumps(other).encode(), True, b"cluster")
        message = refused(cluster.address)
    finally:
        store.internal_kv_put(b"CLUSTER_METADATA", kept, True, b"cluster")
    here = ".".join(map(str, sys.version_info[:3]))
    assert message == (
        f"the cluster at {cluster.address} has Ray {ray.__version__}, Python 3.9.1 and this machine Ray {ray.__version__}, Python "
        f"{here}: install the same versions on every node"
    )


def test_another_torch_on_a_node_is_named(cluster: Cluster, tmp_path: Path) -> None:
    """A node whose packages say another version: what pip would have left there."""
    info = tmp_path / "torch-2.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.0.0\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    odd = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": path}, **NODE)
    try:
        with pytest.raises(ClusterError, match=r"node \S+ \(\S+\) has torch 2\.0\.0 where this machine has 2\.1\d\.\d"):
            start_ray(RayConfig(cluster.address), 1)
        assert not ray.is_initialized()
    finally:
        cluster.remove_node(odd)


def test_differences_name_both_sides() -> None:
    assert differences({"torch": "2", "ray": "1"}, {"torch": "2", "ray": "1"}) == ""
    assert differences({"torch": "2"}, {"torch": ""}) == "torch not at all where this machine has 2"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://head:10001", "has to be started on a node of the cluster"),
        ("head", "must be null .this machine., auto or host:port"),
    ],
)
def test_an_address_of_another_kind_is_the_users_error(tmp_path: Path, address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_train_config(write_tiny(tmp_path, "grpo"), [f"ray.address={address}"])


# -- placement ---------------------------------------------------------------------------------------------------------


def test_what_the_cluster_lacks_is_said_within_the_limit(joined: Cluster) -> None:
    config = PlacementConfig("colocated", ranks=4, reward_workers=2, gpus=True, start_timeout_s=2.0)
    started = time.monotonic()
    with pytest.raises(ClusterError) as caught:
        reserve(config)
    assert time.monotonic() - started < 6
    message = str(caught.value)
    assert "did not give 6 CPU, 4 GPU within 2 s: 4 GPU too few for 4 of 4 trainer ranks" in message
    assert "It has 5 CPU on 2 node(s)" in message
    with pytest.raises(ClusterError, match="1 of 1 trainer ranks fit on no node: each needs 4 CPU in one place"):
        reserve(PlacementConfig("colocated", ranks=1, rank_cpus=4, start_timeout_s=2.0))
    assert ray.available_resources()["CPU"] == 5.0, "what was reserved on the way is given back"


def test_ray_places_as_was_foretold(joined: Cluster) -> None:
    """Ranks of 1 CPU: the head (3) takes them all; of the rest one rollout actor goes to each node."""
    config = PlacementConfig("separate", ranks=2, rollout_actors=2, reward_workers=1, start_timeout_s=20)
    nodes = [Node(node["NodeID"], node["Resources"]) for node in ray.nodes()]
    foretold = assign(pools(config), nodes)
    reservation = reserve(config)
    try:
        for name, group in reservation.groups.items():
            assert sorted(bundle_nodes(group).values()) == sorted(foretold[name]), name
        assert reservation.peers("trainer ranks") == [2, 2]
        assert sorted(reservation.peers("rollout actors")) == [1, 2], "ranks and samplers share a node's cores"
    finally:
        reservation.release()


# -- whole runs --------------------------------------------------------------------------------------------------------


def run_on(config_path: Path, overrides: list[str]) -> tuple[Path, list[str]]:
    """(run folder, node of each rank in rank order)."""
    config = load_train_config(config_path, overrides)
    env = check_parts(config)
    folder = open_run(config.run, config)
    run = build_run(config, folder, env)
    try:
        assert isinstance(run.crew, RayCrew)
        homes = bundle_nodes(run.crew.reservation.groups["trainer ranks"])
        train(run)
        return folder.path, [homes[bundle] for bundle in run.crew.reservation.trainers]
    finally:
        run.crew.close()
        folder.close()


def exported(run: Path) -> dict[str, bytes]:
    newest = max((run / "checkpoints").glob("step_*"))
    return {path.name: path.read_bytes() for path in newest.rglob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["colocated", "separate"])
def test_two_nodes_give_bit_for_bit_what_one_gives(joined: Cluster, tmp_path: Path, placement: str) -> None:
    """The quickstart's config, two iterations of it, ZeRO-2 over two ranks. rank_cpus=2: one rank a node."""
    options = [
        f"run.dir={tmp_path}", "run.steps=2", "evaluate.tasks=2", "evaluate.samples=1", "evaluate.every=0", "env.size=64",
        f"placement.kind={placement}", "placement.ranks=2", "placement.rank_cpus=2", "placement.threads=1",
        "placement.rollout_actors=1", "placement.rollout_cpus=0.5", "placement.reward_cpus=0.5",
    ]  # fmt: skip
    quickstart = ROOT / "configs" / "quickstart.yaml"
    two, homes = run_on(quickstart, [*options, "run.name=two", f"ray.address={joined.address}"])
    assert len(set(homes)) == 2, "a rank on each node"
    ray.shutdown()
    one, homes = run_on(quickstart, [*options, "run.name=one"])
    assert len(set(homes)) == 1
    assert exported(two) == exported(one) != {}
    results = [json.loads((run / "result.json").read_text())["metrics"] for run in (one, two)]
    assert results[0] == results[1]


def can_make_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "rlrestore-try"], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "del", "rlrestore-try"], capture_output=True, check=False)
    return made


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2, joined by a cable; loopback is each one's own."""
    if not can_make_namespaces():
        pytest.skip("needs root and iproute2 (apt install iproute2) to make network namespaces")
    names = ["rlrestore-a", "rlrestore-b"]
    steps = [["link", "add", "rlr-a", "type", "veth", "peer", "name", "rlr-b"]]
    for number, (name, link) in enumerate(zip(names, ("rlr-a", "rlr-b"), strict=True), start=1):
        steps += [
            ["netns", "add", name], ["link", "set", link, "netns", name],
            ["-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link], ["-n", name, "link", "set", link, "up"],
            ["-n", name, "link", "set", "lo", "up"],
        ]  # fmt: skip
    try:
        for step in steps:
            subprocess.run(["ip", *step], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.slow
def test_two_network_namespaces_give_what_one_machine_gives(namespaces: list[str], tmp_path: Path) -> None:
    """Nothing can reach the other node through 127.0.0.1 here, and both have one host name, which resolves to it."""
    (tmp_path / "token").write_text("ef" * 32)
    options = [
        f"run.dir={tmp_path}", "run.steps=2", "evaluate.tasks=2", "evaluate.samples=1", "evaluate.every=0", "env.size=64",
        "placement.ranks=2", "placement.rank_cpus=2", "placement.threads=1", "placement.reward_cpus=0.5",
    ]  # fmt: skip
    python = Path(sys.executable).parent
    environment = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": "/tmp/rlr-ns", "RAY_raylet_start_wait_time_s": "120", "PATH": f"{python}:{os.environ['PATH']}",
    }  # fmt: skip
    for name in (
        "RAY_AUTH_TOKEN",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
    ):  # this process may have set them for a Ray of its own
        environment.pop(name, None)
    train = [sys.executable, "-m", "rlrestore", "train", str(ROOT / "configs" / "quickstart.yaml"), *options]
    node = ["ray", "start", "--block", "--disable-usage-stats", f"--object-store-memory={80 * 2**20}"]
    head = [*node, "--head", "--node-ip-address=10.77.0.1", "--port=6400", "--include-dashboard=false", "--num-cpus=3"]
    worker = [*node, "--address=10.77.0.1:6400", "--num-cpus=2"]
    nodes: list[subprocess.Popen[bytes]] = []

    def inside(name: str, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", name, *command]

    try:
        for name, command in zip(namespaces, (head, worker), strict=True):
            nodes.append(subprocess.Popen(inside(name, command), env=environment))
            time.sleep(15 if not nodes[1:] else 0)  # the head first; the driver waits for the other
        command = [*train, "run.name=two", "ray.address=10.77.0.1:6400"]
        two = subprocess.run(inside(namespaces[0], command), env=environment, timeout=500, check=False)
        assert two.returncode == 0
    finally:
        for process in nodes:
            process.terminate()
        for process in nodes:
            process.wait(timeout=60)
    del environment["RAY_AUTH_TOKEN_PATH"]
    subprocess.run([*train, "run.name=one"], env=environment, timeout=500, check=True)
    assert exported(tmp_path / "two") == exported(tmp_path / "one") != {}


@pytest.mark.slow
def test_the_doctor_measures_between_nodes(cluster: Cluster) -> None:
    found = {finding.name: finding for finding in check_ray(cluster.address, 120.0)}
    assert found["ray"].found.startswith("2 node(s), 5 CPU, 0 GPU in ")
    assert found["between nodes"].found.startswith("gloo over 2 nodes (")
    assert found["between nodes"].status in ("ok", "warn") and "MB/s all-reduced" in found["between nodes"].found
    assert not ray.is_initialized()


@pytest.mark.slow
def test_the_slurm_script_trains_stops_and_resumes(tmp_path: Path) -> None:
    """Two raylets of this machine, started by the stand-in srun; the batch system's warning comes after the first iteration."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name in ("srun", "scontrol", "hostname"):
        shutil.copy(ROOT / "tests" / "stand_ins" / name, stand_ins)
    options = ["run.steps=4", "checkpoint.every=4", "evaluate.tasks=1", "placement.kind=colocated", "placement.ranks=2"]
    options += ["placement.rank_cpus=2", "placement.threads=1", "placement.reward_cpus=0.5", "run.name=slurm"]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = {
        **kept, "PATH": f"{stand_ins}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "STAND_IN_LOG": str(tmp_path), "SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]", "RLRESTORE_CONFIG": str(write_tiny(tmp_path, "grpo")), "RLRESTORE_CPUS": "3",
        "RLRESTORE_RUNS": str(tmp_path / "runs"), "RLRESTORE_ARGS": " ".join(options), "RLRESTORE_PORT": str(free_port()),
        "RAY_raylet_start_wait_time_s": "120",
    }  # fmt: skip
    script = ["bash", str(ROOT / "scripts" / "launch" / "slurm.sh")]
    metrics = tmp_path / "runs" / "slurm" / "metrics.jsonl"
    process = subprocess.Popen(script, env=environment)
    deadline = time.monotonic() + 400
    while not (metrics.exists() and '"train/loss"' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) == 85
    assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"
    again = subprocess.run(script, env={**environment, "SLURM_RESTART_COUNT": "1"}, timeout=500, check=False)
    assert again.returncode == 0
    steps = [int(record["step"]) for record in read_metrics(metrics) if "train/loss" in record]
    assert steps == [1, 2, 3, 4], "each iteration once, the later ones after the resume"
