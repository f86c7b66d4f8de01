"""Keys of results: the same in every process, and others when anything changes that numbers depend on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.extraction.identity import key, surroundings
from pipeline.ground.files import File
from tests.beside_peft import write
from tests.kind_cases import CASES
from tests.models import tensors, write_llama
from tests.quantizing import formats, is_linear, write_base, write_bitsandbytes

KEYS = """
import json, sys
from pathlib import Path
from pipeline.dequantizing import dense
from pipeline.extraction.identity import key
from pipeline.loading import load_checkpoint
from pipeline.merging.plan import merged
from pipeline.stage import Chosen
from pipeline.stages.extract.peft import Peft
from pipeline.weight import Merging

found = {}
for folder in map(Path, sys.argv[1:]):
    base = folder / "base" if (folder / "base").is_dir() else folder
    weights = dense(load_checkpoint("base_model", str(base)))
    if base != folder:
        adapter = Peft(adapter=(Chosen(str(folder / "adapter")),))()
        weights = merged(weights, adapter, Merging(), "F32")
    found[folder.name] = [key(weight) for weight in weights.weights]
print(json.dumps(found))
"""


def keys_of(*folders: Path, seed: str) -> dict[str, list[str]]:
    """Of all weights of these checkpoints, seen by a process of its own."""
    env = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(
        [sys.executable, "-c", KEYS, *map(str, folders)], capture_output=True, text=True, env=env, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_keys_of_every_kind_and_format_are_the_same_in_another_process(tmp_path: Path) -> None:
    plain = write_llama(tmp_path / "dense", hidden_size=128, intermediate_size=256)
    held, config = tensors(plain), json.loads((plain / "config.json").read_text())
    folders = [plain]
    for number, form in enumerate(formats().values()):
        settings = config | {"quantization_config": form.config}
        folder = tmp_path / f"format-{number}"
        folders.append(
            write_base(folder, held, settings, lambda n, f=form: f if is_linear(n) else None).folder
        )
    folders.append(write_bitsandbytes(tmp_path / "nf4", plain, {"load_in_4bit": True}).folder)
    for number, case in enumerate(CASES.values()):
        folders.append(tmp_path / f"kind-{number}")
        write(case, folders[-1], torch.float32)
    first, second = (keys_of(*folders, seed=seed) for seed in ("1", "2"))
    assert first == second
    assert len(first) == len(folders)
    assert all(len(set(keys)) == len(keys) for keys in first.values())


@pytest.mark.parametrize("at", [0, 100_000, -1])
def test_content_counts_where_size_and_time_are_the_same(tmp_path: Path, at: int) -> None:
    """A fine-tune differs everywhere, and so where the samples lie."""
    path, other = tmp_path / "a", tmp_path / "b"
    content = bytearray(os.urandom(200_000))
    path.write_bytes(content)
    before = surroundings([File.at(path)], "cpu")
    content[at] ^= 1
    stat = path.stat()
    other.write_bytes(content)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.rename(path)
    assert File.at(path) == File(path, stat.st_size, stat.st_mtime_ns)
    assert surroundings([File.at(path)], "cpu") != before


def test_a_file_that_was_written_again_is_another(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"")
    before = surroundings([File.at(path)], "cpu")
    assert surroundings([File.at(path)], "cpu") == before
    os.utime(path, ns=(1, 1))
    assert surroundings([File.at(path)], "cpu") != before


def test_parts_of_a_key_do_not_run_into_each_other() -> None:
    assert key("a", "bc") != key("ab", "c")
    assert key(1.0) != key(1)
