"""A run whose base and adapter come from the Hub, spoken by a server on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server import HubServer
from tests.models import write_llama, write_lora


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_base_and_adapter_from_the_hub(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    adapter = write_lora(tmp_path / "adapter", base)
    home, out = tmp_path / "home", tmp_path / "out"
    request = ["base_model=acme/tiny", "adapter=acme/tiny-lora", f"output={out}", "verify=structure"]

    def pipeline(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline", *request, *arguments]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    with HubServer({"acme/tiny": folder_bytes(base), "acme/tiny-lora": folder_bytes(adapter)}) as server:
        environment = server.environment(home)
        planned = pipeline(environment, "dry_run=true")
        assert planned.returncode == 2
        assert "'acme/tiny' is not in the local cache: a run would first download" in planned.stderr
        done = pipeline(environment)
        assert done.returncode == 0, done.stderr
        commit = server.commit("acme/tiny")
    manifest = json.loads((out / "merge.json").read_text())
    assert manifest["base"] == {"name": "acme/tiny", "repo": "acme/tiny", "commit": commit}
    inherited = {d["name"] for d in manifest["inputs"] if d["inherited"]}
    assert {p.name for p in base.glob("*.safetensors")} <= inherited
    assert "base_model: acme/tiny\n" in (out / "README.md").read_text()

    offline = pipeline({**environment, "HF_HUB_OFFLINE": "1"}, f"output={tmp_path / 'again'}")
    assert offline.returncode == 0, offline.stderr
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("key", ["base_model", "adapter"])
def test_no_network_is_one_sentence(tmp_path: Path, key: str) -> None:
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin"}
    base = write_llama(tmp_path / "base")
    request = {
        "base_model": str(base),
        "adapter": str(write_lora(tmp_path / "adapter", base)),
        "output": "out",
    }
    request[key] = "acme/none"
    command = [sys.executable, "-m", "pipeline", *(f"{k}={v}" for k, v in request.items())]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {key}: cannot reach the Hub and 'acme/none' is not in the local cache; "
        "connect, or give a local folder\n"
    )
    assert not (tmp_path / "out").exists()
