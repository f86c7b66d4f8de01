"""Held against a Hub of our own (`hub_server`), each case in a process of its own: the client reads its
settings when it is imported. `ask` asserts besides that nothing is ever printed."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.ground.errors import Refused
from pipeline.ground.hub import ADAPTER, CHECKPOINT, Files, Source, digests, locate
from tests.hub_server import HubServer

SHARDS = {
    "model-00001-of-00002.safetensors": b"first shard" * 1000,
    "model-00002-of-00002.safetensors": b"second shard" * 2000,
}
SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{}",
    "additional_chat_templates/tool_use.jinja": b"{{ messages }}",
    "README.md": b"# a model",
    "LICENSE": b"Apache-2.0",
}
UNWANTED = {
    "pytorch_model-00001-of-00001.bin": b"cos\nsystem\n(S'true'\ntR." * 500,
    "training_args.bin": b"pickle",
    "optimizer.pt": b"pickle",
    "original/consolidated.00.pth": b"pickle",
    "original/params.json": b"{}",
    "consolidated.safetensors": b"the same weights once more" * 500,
    "checkpoint-500/model.safetensors": b"older weights" * 500,
    "tf_model.h5": b"h5",
    "flax_model.msgpack": b"flax",
    "onnx/model.onnx": b"onnx",
    "openvino_model.xml": b"<xml/>",
    "model-q4_k_m.gguf": b"GGUF",
    "figure.png": b"png",
}
LORA = {
    "adapter_config.json": b'{"r": 8}',
    "adapter_model.safetensors": b"lora" * 99,
    "README.md": b"# a lora",
}

DRIVER = """
for call in json.loads(sys.argv[1]):
    files, download = getattr(hub, call.pop("files")), call.pop("download")
    try:
        source = hub.locate(**call, files=files, download=download)
        answer = dataclasses.asdict(source) | {"digests": hub.digests(source)}
    except Refused as refused:
        answer = {"refused": refused.sentences}
    print(json.dumps(answer, default=str))
"""
IMPORTS = "import dataclasses, json, shutil, sys; from pipeline.ground import hub\n"
IMPORTS += "from pipeline.ground.errors import Refused\n"


class Client:
    """Calls `locate` in a fresh process, as the machine whose Hub cache is `home`."""

    def __init__(self, hub: HubServer, home: Path) -> None:
        self.hub = hub
        self.home = home

    def ask(
        self,
        *values: str,
        key: str = "base_model",
        files: str = "CHECKPOINT",
        downloads: Sequence[bool] = (True,),
        before: str = "",
        **environment: str,
    ) -> list[dict[str, Any]]:
        """One answer for each of `downloads` and, within it, each of the values."""
        calls = [
            {"key": key, "value": value, "files": files, "download": download}
            for download in downloads
            for value in values
        ]
        run = subprocess.run(
            [sys.executable, "-c", IMPORTS + before + DRIVER, json.dumps(calls)],
            env=self.hub.environment(self.home, **environment),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (run.returncode, run.stderr) == (0, "")
        return [json.loads(line) for line in run.stdout.splitlines()]

    def get(self, value: str, **how: Any) -> dict[str, Any]:
        [answer] = self.ask(value, **how)
        assert "refused" not in answer, answer
        return answer

    def refused(self, value: str, **how: Any) -> str:
        [answer] = self.ask(value, **how)
        [sentence] = answer["refused"]
        return str(sentence)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer({"org/name": SHARDS | SMALL | UNWANTED, "org/lora": LORA | UNWANTED}) as server:
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")


def contents(folder: str) -> dict[str, bytes]:
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# Fetching


def test_a_revision_is_fetched_as_it_was_and_the_unwanted_files_are_not(
    hub: HubServer, client: Client
) -> None:
    old = hub.commit("org/name")
    hub.tag("org/name", "refs/pr/1", old)
    hub.push("org/name", {"model.safetensors": b"moved on"})
    answer = client.get("org/name@refs/pr/1")
    assert contents(answer["folder"]) == SHARDS | SMALL
    assert (answer["asked"], answer["repo"], answer["commit"]) == ("org/name@refs/pr/1", "org/name", old)
    assert hub.bytes_served == sum(map(len, (SHARDS | SMALL).values()))


def test_digests_are_the_sha256_of_the_large_files(client: Client) -> None:
    large = SHARDS | {"tokenizer.json": SMALL["tokenizer.json"]}
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in large.items()}
    assert client.get("org/name")["digests"] == expected


def test_of_an_adapter_repository_only_the_adapter_is_fetched(client: Client) -> None:
    answer = client.get("org/lora", key="adapter", files="ADAPTER")
    assert contents(answer["folder"]) == LORA


def test_a_moved_branch_is_followed_and_only_what_changed_is_fetched(hub: HubServer, client: Client) -> None:
    client.get("org/name")
    served = hub.bytes_served
    new = hub.push("org/name", SHARDS | SMALL | {"config.json": b'{"changed": true}'})
    answer = client.get(
        "org/name", before="shutil.disk_usage = lambda _: shutil._ntuple_diskusage(100, 83, 17)\n"
    )
    assert answer["commit"] == new
    assert contents(answer["folder"])["config.json"] == b'{"changed": true}'
    assert hub.bytes_served - served == 17


def test_a_download_that_breaks_off_is_taken_up_again_in_silence(hub: HubServer, client: Client) -> None:
    hub.push("org/name", {"model.safetensors": SHARDS["model-00002-of-00002.safetensors"]})
    hub.cuts = 1
    answer = client.get("org/name")
    assert hub.cuts == 0
    assert list(contents(answer["folder"]).values()) == [SHARDS["model-00002-of-00002.safetensors"]]


def test_with_a_token_a_gated_repository_is_fetched(hub: HubServer, client: Client) -> None:
    hub.gated.add("org/name")
    assert contents(client.get("org/name", HF_TOKEN=hub.token)["folder"]) == SHARDS | SMALL


@pytest.mark.parametrize(
    ("files", "name", "wanted"),
    [
        (CHECKPOINT, "model.safetensors", True),
        (CHECKPOINT, "modeling_own.py", True),
        (CHECKPOINT, "pytorch_model.bin", False),
        (CHECKPOINT, "1_Pooling/config.json", True),
        (CHECKPOINT, "2_Dense/pytorch_model.bin", False),
        (ADAPTER, "tokenizer.model", True),
        (ADAPTER, "chat_template.jinja", True),
        (ADAPTER, "adapter_model.bin", False),
        (ADAPTER, "model.safetensors", False),
        (ADAPTER, "checkpoint-500/adapter_model.safetensors", False),
    ],
)
def test_what_is_wanted_of_a_repository(files: Files, name: str, wanted: bool) -> None:
    assert files.wants(name) is wanted


# The cache


def test_a_whole_commit_in_the_cache_needs_no_request(hub: HubServer, client: Client) -> None:
    pinned = f"org/name@{hub.commit('org/name')}"
    first = client.get(pinned)
    hub.requests.clear()
    assert client.get(pinned) == first
    assert hub.requests == []


def test_without_a_network_the_cache_answers(hub: HubServer, client: Client) -> None:
    first = client.get("org/name")
    assert client.get("org/name", HF_HUB_OFFLINE="1") == first
    hub.status = 503
    assert client.get("org/name") == first
    hub.close()
    assert client.get("org/name", downloads=[False]) == first
    assert client.get(f"org/name@{first['commit']}")["folder"] == first["folder"]


def test_half_a_snapshot_is_not_taken_for_a_whole_one(hub: HubServer, client: Client) -> None:
    pinned = f"org/name@{hub.commit('org/name')}"
    folder = Path(client.get(pinned)["folder"])
    blob = (folder / "tokenizer.json").resolve()
    (folder / "tokenizer.json").unlink()
    blob.unlink()
    assert "'org/name' is not in the local cache" in client.refused("org/name", HF_HUB_OFFLINE="1")
    assert contents(client.get(pinned)["folder"]) == SHARDS | SMALL


def test_what_another_tool_fetched_of_a_commit_is_completed(hub: HubServer, client: Client) -> None:
    commit = hub.commit("org/name")
    fetch = "from huggingface_hub import hf_hub_download\n" + "".join(
        f"hf_hub_download('org/name', {name!r}, revision={commit!r})\n" for name in ["config.json", *SHARDS]
    )
    answer = client.get(f"org/name@{commit}", before=fetch, HF_HUB_VERBOSITY="error")
    assert contents(answer["folder"]) == SHARDS | SMALL


def test_a_snapshot_without_weights_is_not_taken_for_a_whole_one(client: Client) -> None:
    fetch = (
        "from huggingface_hub import constants, hf_hub_download\nhf_hub_download('org/name', 'config.json')\n"
    )
    fetch += "constants.HF_HUB_OFFLINE = True\n"
    sentence = client.refused("org/name", before=fetch, HF_HUB_VERBOSITY="error")
    assert sentence.startswith("base_model: HF_HUB_OFFLINE is set and 'org/name' is not in the local cache")


# A dry run


def test_a_dry_run_says_what_it_would_download_and_downloads_nothing(hub: HubServer, client: Client) -> None:
    hub.push("org/big", {"model.safetensors": bytes(2_511_000), "config.json": b"{}"})
    assert client.refused("org/big", downloads=[False]) == (
        "dry_run: base_model 'org/big' is not in the local cache: "
        "a run would first download 2.51 MB (2 files)"
    )
    assert hub.bytes_served == 0
    assert not any(client.home.rglob("blobs/*"))


def test_a_dry_run_takes_what_is_cached(client: Client) -> None:
    fetched, planned = client.ask("org/name", downloads=[True, False])
    assert fetched == planned


# Refusals


def test_what_the_hub_does_not_have_or_give_is_refused(hub: HubServer, client: Client) -> None:
    hub.gated.add("org/name")
    hub.push(
        "org/old", {"config.json": b"{}", "pytorch_model.bin": b"pickle", "training_args.bin": b"pickle"}
    )
    hub.push("org/older", {f"pytorch_model-0000{i}-of-00004.bin": b"pickle" for i in range(1, 5)})
    hub.push("org/gguf", {"config.json": b"{}", "model-q8_0.gguf": b"GGUF"})
    hub.push("org/data", {"README.md": b"# nothing"})
    commit = "0123456789" * 4
    values = {
        "org/none": "the Hub shows no model 'org/none'; "
        "check the name; if it is private, run `hf auth login`",
        "org/lora@v9": "'org/lora' has no revision 'v9'; give a branch, a tag or a full commit hash",
        f"org/lora@{commit}": f"'org/lora' has no revision '{commit}'; "
        "give a branch, a tag or a full commit hash",
        "org/name": f"'org/name' is gated: accept the licence on {hub.url}/org/name and run `hf auth login`",
        "org/old": "'org/old' holds only pytorch_model.bin: convert it to safetensors first",
        "org/older": (
            "'org/older' holds only pytorch_model-00001-of-00004.bin, pytorch_model-00002-of-00004.bin ..."
            ": convert it to safetensors first"
        ),
        "org/gguf": "'org/gguf' holds only model-q8_0.gguf: download the file you want and give its path",
        "org/data": "'org/data' holds no *.safetensors at its top level: give another repository",
        "org/na--me": f"cannot fetch 'org/na--me' into {client.home}/hub: "
        "Cannot have -- or .. in repo_id: 'org/na--me'.",
    }
    answers = client.ask(*values, downloads=[True, False])
    sentences = [[f"base_model: {sentence}"] for sentence in values.values()]
    assert [answer["refused"] for answer in answers] == sentences * 2
    assert hub.bytes_served == 0


def test_an_adapter_repository_without_an_adapter_is_refused(hub: HubServer, client: Client) -> None:
    hub.push("org/pickled", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
    hub.push("org/full", {"config.json": b"{}", "model.safetensors": b"weights"})
    answers = client.ask("org/pickled", "org/full", key="adapter", files="ADAPTER")
    assert [answer["refused"] for answer in answers] == [
        ["adapter: 'org/pickled' holds only adapter_model.bin: convert it to safetensors first"],
        ["adapter: 'org/full' holds no adapter_model.safetensors at its top level: give another repository"],
    ]


def test_no_way_to_the_hub_is_refused(hub: HubServer, client: Client) -> None:
    hub.status = 503
    assert client.refused("org/name") == (
        "base_model: the Hub answers 503 and 'org/name' is not in the local cache; "
        "try again later, or give a local folder"
    )
    hub.status = 403
    assert client.refused("org/name") == (
        "base_model: the Hub denies access to 'org/name'; run `hf auth login` with a token that may read it"
    )
    assert client.refused("org/name", HF_HUB_OFFLINE="1") == (
        "base_model: HF_HUB_OFFLINE is set and 'org/name' is not in the local cache; "
        "unset it, or give a local folder"
    )
    hub.close()
    sentence = (
        "base_model: cannot reach the Hub and 'org/name' is not in the local cache; "
        "connect, or give a local folder"
    )
    assert client.ask("org/name", downloads=[True, False]) == [{"refused": [sentence]}] * 2


def test_a_network_that_swallows_everything_is_refused_in_time(client: Client) -> None:
    client.home.mkdir()
    (client.home / ".agent_harnesses.json").write_text('{"standardEnvVars": [], "harnesses": {}}')
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"http://127.0.0.1:{silent.getsockname()[1]}"
        sentence = client.refused("org/name", HF_ENDPOINT=where, HF_HUB_ETAG_TIMEOUT="1")
    assert sentence.startswith("base_model: cannot reach the Hub and 'org/name' is not in the local cache")


def test_something_that_is_no_hub_is_refused(hub: HubServer, client: Client) -> None:
    elsewhere = f"{hub.url}/org/name/resolve/main/README.md?"
    assert client.refused("org/name", HF_ENDPOINT=elsewhere) == (
        f"base_model: {elsewhere} does not answer like a Hub and 'org/name' is not in the local cache; "
        "check HF_ENDPOINT, or give a local folder"
    )


def test_a_cache_that_is_too_small_is_refused_before_the_download(hub: HubServer, client: Client) -> None:
    size = sum(map(len, (SHARDS | SMALL).values()))
    small = "shutil.disk_usage = lambda _: shutil._ntuple_diskusage(90_000, 90_000 - {0}, {0})\n"
    assert client.refused("org/name", before=small.format(size - 1)) == (
        f"base_model: 'org/name' needs 35.1 kB in the cache {client.home}/hub, where 35.1 kB are free; "
        "make room, or set HF_HUB_CACHE to a folder elsewhere"
    )
    assert hub.bytes_served == 0
    client.get("org/name", before=small.format(size))


def test_a_cache_that_cannot_be_written_is_refused(client: Client) -> None:
    client.home.mkdir()
    (client.home / "hub").write_text("a file")
    sentence = client.refused("org/name")
    assert sentence.startswith(f"base_model: cannot fetch 'org/name' into {client.home}/hub: ")


# Paths


def test_a_local_path_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "org/model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("base_model", "org/name") == Source(tmp_path / "org/name", "org/name")
    assert locate("base_model", "org/model.gguf") == Source(tmp_path / "org/model.gguf", "org/model.gguf")
    assert locate("base_model", "~/org/name") == Source(tmp_path / "org/name", "~/org/name")
    assert digests(locate("base_model", "org/name")) == {}


@pytest.mark.parametrize("name", ["lr=1e-4,r=8", "my model (2)", "a'b", "ünï", "org@v1", "[x]{y}", "$HOME"])
def test_a_path_may_hold_any_character(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert locate("adapter", str(tmp_path / name), ADAPTER).folder == tmp_path / name


NOWHERE = ["./foo", "../foo", "/foo/bar", "~/foo", "foo", "a/b/c", "org/m.gguf", "org/m.safetensors", "", " "]
NOWHERE += [
    "org/name@",
    "org/name@/x",
    "org/name@../../x",
    "org/name@a b",
    "org/na me",
    "https://hf.co/org/name",
]


@pytest.mark.parametrize("value", NOWHERE)
def test_a_path_that_does_not_exist_is_refused_without_asking_the_hub(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import of it would fail
    with pytest.raises(Refused) as refused:
        locate("base_model", value)
    choices = "a folder, a GGUF file or a hub id org/name[@revision]"
    assert str(refused.value) == f"base_model: '{value}' does not exist; give {choices}"
    with pytest.raises(Refused, match=r"^adapter: .* does not exist; give a folder or a hub id"):
        locate("adapter", value, ADAPTER)


def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"^base_model: cannot read '"):
        locate("base_model", str(tmp_path / ("x" * 300)))
    with pytest.raises(Refused, match=r"^base_model: '~nobody_of_that_name/x' does not exist"):
        locate("base_model", "~nobody_of_that_name/x")


def test_a_local_path_needs_no_client(tmp_path: Path) -> None:
    code = f"import sys\nfrom pipeline.ground.hub import locate\nlocate('base_model', {str(tmp_path)!r})\n"
    code += "assert not {'huggingface_hub', 'torch'} & sys.modules.keys()"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
