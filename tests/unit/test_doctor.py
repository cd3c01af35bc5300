"""The doctor's checks against machines that lack something; the remedy is part of what is tested."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from rlrestore import doctor
from rlrestore.doctor import FAIL, OK, WARN
from tests.e2e.test_stop import run_cli
from tests.tiny import write_tiny

GB = 10**9


def test_packages_that_are_missing_or_wrong_are_named() -> None:
    def version_of(name: str) -> str:
        if name in ("deepspeed", "pyiqa"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "torch" else importlib.metadata.version(name)

    main, iqa = doctor.packages(version_of)
    assert main.status == FAIL and "deepspeed is missing" in main.found and "torch 0.1 is not ==2." in main.found
    assert main.remedy.startswith("pip install -r requirements.lock")
    assert iqa.status == WARN and iqa.remedy == "pip install 'rlrestore[iqa]'"
    assert doctor.packages()[0].status == OK


def test_a_missing_compiler_is_no_failure() -> None:
    (found,) = doctor.compiler(lambda tool: None if tool == "ninja" else f"/usr/bin/{tool}")
    assert (found.status, found.found) == (WARN, "ninja not found") and "apt install g++ ninja-build" in found.remedy
    assert doctor.compiler(lambda tool: tool)[0].status == OK


@pytest.mark.parametrize(("free_gb", "status"), [(0.5, FAIL), (5, WARN), (50, OK)])
def test_disk(tmp_path: Path, free_gb: float, status: str) -> None:
    (found,) = doctor.disk(tmp_path / "runs" / "later", lambda _: (100 * GB, 0, int(free_gb * GB)))
    assert found.status == status and str(tmp_path) in found.found
    assert ("run.dir" in found.remedy) == (status != OK)
    assert not (tmp_path / "runs").exists()


def test_the_object_store_must_fit_into_shared_memory(tmp_path: Path) -> None:
    """docker's own 64 MB are too few for anything; 1 GB is enough for 256 MB and not for 1,000."""
    (small,) = doctor.shared_memory(50, tmp_path, lambda _: (0, 0, 64 * 10**6))
    assert small.status == FAIL and "--shm-size=8g" in small.remedy
    assert doctor.shared_memory(256, tmp_path, lambda _: (0, 0, GB))[0].status == OK
    assert doctor.shared_memory(1000, tmp_path, lambda _: (0, 0, GB))[0].status == FAIL
    assert doctor.shared_memory(256, tmp_path / "none")[0].status == FAIL


def test_limits_and_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.open_files(1024)[0].remedy == "ulimit -n 65536" and doctor.open_files(4096)[0].status == OK
    path = tmp_path / "token"
    path.write_text("ab")
    path.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    (found,) = doctor.token_file()
    assert found.status == WARN and found.remedy == f"chmod 600 {path}" and "mode 644" in found.found
    path.chmod(0o600)
    assert doctor.token_file()[0].status == OK


def test_missing_weights_of_a_config_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny(tmp_path, "nft")
    before = sorted(tmp_path.rglob("*"))
    assert run_cli("doctor", config, "--quick", "--json") == 0
    found = {each["name"]: each["status"] for each in json.loads(capsys.readouterr().out)}
    assert {found[name] for name in ("restorer", "env", "metric ssim_rgb", "metric psnr_rgb")} == {OK}
    assert run_cli("doctor", config, f"restorer.weights={tmp_path}/gone", "--quick") == 69
    out, err = capsys.readouterr()
    assert "X restorer" in out and "gone" in out
    assert err.strip() == "error: a run would not start here: restorer; the remedies stand above"
    assert sorted(tmp_path.rglob("*")) == before
