"""An extraction that ends early is resumed by the same request: nothing is redone, and no bit is another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.extraction import decomposing
from pipeline.ground.dtypes import FloatDtype
from pipeline.ground.errors import PipelineError, Refused
from pipeline.ground.lowrank import Method
from pipeline.ground.ranks import Budget, Energy
from pipeline.ground.workplace import partial, standing
from tests.command import answer, listing
from tests.models import write_llama, write_lora
from tests.running import merge
from tests.stages.test_extract_svd import extract, llama, mixtral, tuned_pair

MODULES, BEFORE = 14, 5  # of the model, and how many of them are finished when a run ends


class EndedError(Exception):
    """The fault that ends a run."""


class Counted:
    """`_decompose` with its calls counted, until one of them raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.last, self.error = 0, -1, BaseException()
        self._plain = decomposing._decompose
        monkeypatch.setattr(decomposing, "_decompose", self)

    def __call__(self, *arguments: Any) -> Any:
        if self.calls == self.last:
            raise self.error
        self.calls += 1
        return self._plain(*arguments)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return tuned_pair(tmp_path, llama, lambda name: "layers" in name)


@pytest.fixture
def ended(pair: tuple[Path, Path], counted: Counted, tmp_path: Path) -> Callable[..., None]:
    """A run into tmp_path/out that ends by `error` once BEFORE modules are decomposed."""

    def run(error: BaseException | None = None, **settings: Any) -> None:
        counted.calls, counted.last, counted.error = 0, BEFORE, error or EndedError()
        with pytest.raises(type(counted.error)):
            extract(*pair, tmp_path / "out", memory_limit=1, **settings)  # one matrix at a time
        counted.calls, counted.last = 0, -1

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def written(folder: Path) -> tuple[bytes, bytes, Any]:
    """What must not depend on how often a run was begun."""
    facts = json.loads((folder / "merge.json").read_text())["extraction"]
    files = ((folder / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json"))
    return (*files, facts)


def matrices(folder: Path) -> list[Path]:
    """Files of finished modules, the first one made first."""
    files = [path for path in standing(folder).iterdir() if b'"left"' in path.read_bytes()]
    return sorted(files, key=lambda path: path.stat().st_mtime_ns)


ERRORS = [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError(), PipelineError("x")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_run_goes_on_where_one_ended(
    ended: Callable[..., None],
    pair: tuple[Path, Path],
    counted: Counted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    ended(error)
    assert names(tmp_path) == ["base", "out.partial", "tuned"]
    assert names(tmp_path / "out.partial") == [".standing", ".unfinished"]
    said = capsys.readouterr().err
    assert f"what is done so far stands in '{tmp_path}/out.partial': the same request goes on from" in said
    monkeypatch.setattr("pipeline.extraction.sides.compare", lambda *a: pytest.fail("compared again"))
    assert extract(*pair, tmp_path / "out").passed
    assert counted.calls == MODULES - BEFORE
    assert f"resuming: {BEFORE} of {MODULES} modules stand already" in capsys.readouterr().err
    assert names(tmp_path) == ["base", "out", "tuned"]
    assert not list((tmp_path / "out").glob(".*"))
    monkeypatch.undo()
    extract(*pair, tmp_path / "whole")
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_stacked_experts_and_adapters_are_resumed_too(
    tmp_path: Path, counted: Counted, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = tuned_pair(tmp_path, mixtral, lambda name: "experts" in name)
    adapter = write_lora(tmp_path / "lora", write_llama(tmp_path / "plain"))
    requests: dict[str, Any] = {
        "experts": {"base": base, "tuned": tuned},
        "adapter": {"base": tmp_path / "plain", "tuned": None, "adapter": adapter},
    }
    for name, request in requests.items():
        extract(output=tmp_path / f"{name}-whole", **request)
        counted.calls, counted.last, counted.error = 0, 4, EndedError()
        with pytest.raises(EndedError):
            extract(output=tmp_path / name, memory_limit=1, **request)
        counted.last = -1
        capsys.readouterr()
        extract(output=tmp_path / name, **request)
        assert "modules stand already" in capsys.readouterr().err
        assert written(tmp_path / name) == written(tmp_path / f"{name}-whole")


OTHERWISE: dict[str, dict[str, Any]] = {
    "rank": {"rank": 5},
    "rule": {"rank": Energy(0.5)},
    "seed": {"seed": 1},
    "method": {"method": Method.exact},
    "ranks of some": {"rank_pattern": {"mlp": 3, "self_attn": 3}},
}
LIKEWISE: dict[str, dict[str, Any]] = {
    "scale": {"alpha": 8.0, "rslora": True},
    "dtype": {"factors": FloatDtype.bfloat16},
    "workers": {"memory_limit": 1},
    "how a rank is written": {"rank": 64, "max_rank": 4},
    "a budget up to the same rank": {"rank": Budget(10**6, False), "max_rank": 4},
}


@pytest.mark.parametrize("name", [*OTHERWISE, *LIKEWISE])
def test_a_setting_that_numbers_depend_on_starts_over_and_no_other(
    ended: Callable[..., None],
    pair: tuple[Path, Path],
    counted: Counted,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    settings = {**OTHERWISE, **LIKEWISE}[name]
    ended()
    capsys.readouterr()
    extract(*pair, tmp_path / "out", **settings)
    said = capsys.readouterr().err
    assert counted.calls == (MODULES if name in OTHERWISE else MODULES - BEFORE)
    assert ("resuming" in said) is (name in LIKEWISE)
    assert ("what an earlier run left for other inputs or settings is removed" in said) is (name in OTHERWISE)
    extract(*pair, tmp_path / "whole", **settings)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_modules_that_are_asked_for_as_well_are_all_that_is_made(
    ended: Callable[..., None], pair: tuple[Path, Path], counted: Counted, tmp_path: Path
) -> None:
    ended(targeted_modules=("self_attn",))  # 8 modules
    extract(*pair, tmp_path / "out", targeted_modules=("self_attn", "up_proj"))
    assert counted.calls == 8 - BEFORE + 2


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_another_input_starts_over(
    ended: Callable[..., None], pair: tuple[Path, Path], counted: Counted, tmp_path: Path, which: str
) -> None:
    """Of the same size and time of change."""
    ended()
    torch.manual_seed(7)
    changed = tmp_path / which
    times = {path.name: path.stat() for path in changed.iterdir()}
    model = llama()
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    model.save_pretrained(changed, **({"max_shard_size": "20KB"} if which == "tuned" else {}))
    for path in changed.iterdir():
        before = times[path.name]
        assert path.stat().st_size == before.st_size
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    extract(*pair, tmp_path / "out", targeted_modules=("self_attn", "mlp"))
    assert counted.calls == MODULES
    extract(*pair, tmp_path / "whole", targeted_modules=("self_attn", "mlp"))
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def cut(content: bytes) -> bytes:
    return content[:-100]


def empty(content: bytes) -> bytes:
    return b""


def short(content: bytes) -> bytes:
    return content[-40:]


def flipped(content: bytes) -> bytes:
    return bytes([*content[:200], content[200] ^ 1, *content[201:]])


def zeros(content: bytes) -> bytes:
    """What some file systems leave after a power cut."""
    return bytes(len(content))


@pytest.mark.parametrize("damage", [cut, empty, short, flipped, zeros])
def test_a_torn_file_is_not_believed(
    ended: Callable[..., None],
    pair: tuple[Path, Path],
    counted: Counted,
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
) -> None:
    ended()
    for path in standing(tmp_path / "out").iterdir():  # the comparison too
        if path not in matrices(tmp_path / "out")[:2]:
            path.write_bytes(damage(path.read_bytes()))
    (standing(tmp_path / "out") / "unfinished").write_bytes(b"half a matrix")
    extract(*pair, tmp_path / "out")
    assert counted.calls == MODULES - 2
    extract(*pair, tmp_path / "whole")
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_what_fails_after_the_decomposition_repeats_none_of_it(
    pair: tuple[Path, Path], counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr("pipeline.stages.save.merged.write_shards", full)
        extract(*pair, tmp_path / "out", save="both")
    assert names(tmp_path / "out.partial") == [".standing", ".unfinished"]
    counted.calls = 0
    extract(*pair, tmp_path / "out", save="both")
    assert counted.calls == 0
    assert not list((tmp_path / "out").glob(".*"))


def test_a_request_without_extraction_takes_the_place_over(
    ended: Callable[..., None], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    ended()
    adapter = write_lora(tmp_path / "lora", pair[0])
    merge(pair[0], adapter, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))
    assert names(tmp_path) == ["base", "lora", "out", "tuned"]


def test_what_is_refused_leaves_nothing_and_touches_nothing(
    ended: Callable[..., None], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    ended()
    before = listing(tmp_path)
    with pytest.raises(Refused, match="rank: 999 is more than"):
        extract(*pair, tmp_path / "out", rank=999)
    assert listing(tmp_path) == before
    with pytest.raises(Refused, match="rank: a budget of 3 leaves nothing"):
        extract(*pair, tmp_path / "out", rank=Budget(3, False))
    assert listing(tmp_path) == before


def test_a_fault_before_anything_stands_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pipeline.ground.spool.Spool.finish", fault)
    with pytest.raises(OSError, match="Input"):
        extract(*pair, tmp_path / "deep/out")
    assert names(tmp_path) == ["base", "tuned"]


@pytest.fixture
def halfway(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command as a user types it, stopped (SIGSTOP) when the third of eight modules is on the disk."""
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 64}
    write_llama(tmp_path / "base", torch.float32, shard="1GB", **sizes)
    adapter = write_lora(tmp_path / "lora", tmp_path / "base", target_modules=["up_proj"])
    merge(tmp_path / "base", adapter, tmp_path / "tuned")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *COMMAND],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        made, deadline = standing(tmp_path / "out"), time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if made.is_dir() and len(list(made.glob("[0-9a-f]" * 40))) >= 4:  # three, and the comparison
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
        assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.communicate()


COMMAND = ("recipe=extract", "base_model=base", "finetune=tuned", "output=out", "rank=8", "verify=structure")
COMMAND += ("extract.method=exact",)  # a full SVD of 512 x 512 takes a while


def test_a_killed_run_is_resumed(halfway: subprocess.Popen[str], tmp_path: Path) -> None:
    refused = answer(*COMMAND, cwd=tmp_path)
    assert refused.errors[-1] == "output: another run is writing 'out'; wait for it"
    halfway.kill()
    halfway.wait(timeout=60)
    assert {".standing", ".unfinished"} <= set(names(partial(tmp_path / "out")))
    assert not list(partial(tmp_path / "out").glob("*.safetensors"))
    stands = len(matrices(tmp_path / "out"))
    assert 3 <= stands < 8
    said = answer(*COMMAND, cwd=tmp_path)
    assert said.status == 0, said
    assert f"resuming: {stands} of 8 modules stand already" in said.err
    whole = answer(*(a.replace("output=out", "output=whole") for a in COMMAND), cwd=tmp_path)
    assert "resuming" not in whole.err
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_ctrl_c_says_how_to_go_on(halfway: subprocess.Popen[str], tmp_path: Path) -> None:
    halfway.send_signal(signal.SIGINT)
    halfway.send_signal(signal.SIGCONT)
    _, err = halfway.communicate(timeout=60)
    assert halfway.returncode == 130
    assert err.endswith("error: interrupted\n")
    assert "note: what is done so far stands in 'out.partial': the same request goes on from there" in err
    assert "Traceback" not in err
    assert names(tmp_path / "out.partial") == [".standing", ".unfinished"]
