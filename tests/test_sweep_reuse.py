"""What runs of a sweep share: computed once, read by the others, the same to the last bit, and gone after."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline.dequantizing import dense
from pipeline.ground import digests, merge_logits, reuse
from pipeline.ground.files import File
from pipeline.ground.identity import digest
from pipeline.loading import load_checkpoint
from pipeline.verification.base_as_model import of_base
from tests.command import answer
from tests.making import adapter_tensors, write_adapter
from tests.models import write_llama, write_lora
from tests.running import merge

WORDS = "the cat sat on a mat and saw the bird that sang of rain in may " * 12
REQUEST = ("base_model=base", "adapter=adapter", "verify.tokens=96", "verify.text=text.txt")
ASKED = (*REQUEST, "verify.prompts='the cat'")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def speaking(here: Path) -> Path:
    """Base and adapter, with a tokenizer and a text, so that there is a loss and an answer."""
    (here / "text.txt").write_text(WORDS)
    known = {"[UNK]": 0, **{word: n for n, word in enumerate(sorted(set(WORDS.split())), 1)}}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[UNK]"
    )
    made.save_pretrained(here / "base")
    return here


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often models were loaded, adapters put onto one, and files of base and adapter hashed."""
    found: Counter[str] = Counter()
    monkeypatch.setattr(digests, "_KNOWN", {})

    def counted(where: Any, name: str) -> None:
        real = getattr(where, name)

        def call(first: Any, *arguments: Any, **named: Any) -> Any:
            if not isinstance(first, File) or first.path.parent.name in ("base", "adapter"):
                found[name] += 1
            return real(first, *arguments, **named)

        monkeypatch.setattr(where, name, call)

    counted(transformers.LlamaForCausalLM, "from_pretrained")
    counted(merge_logits, "adapted")
    counted(digests, "_sha256")
    return found


def told(folder: Path) -> dict[str, Any]:
    """All that verification saw of the logits: figures, and what was answered."""
    report = json.loads((folder / "report.json").read_text())
    assert report["logits"].pop("peak_memory") > 0
    assert report["logits"]["kl_adapter_base"] > 0
    return {key: report[key] for key in ("logits", "answers")}


def test_the_reference_runs_once_for_all_outputs_and_figures_are_the_same_bits(
    speaking: Path, loads: Counter[str]
) -> None:
    dtypes = ("bfloat16", "float16", "float32")
    said = answer("-m", *ASKED, "output=sweep", f"save.dtype={','.join(dtypes)}", cwd=speaking)
    assert said.status == 0, said
    assert loads == {"adapted": 1, "from_pretrained": 1 + 3, "_sha256": 3}  # base once, and each output
    loads.clear()
    for dtype in dtypes:
        assert answer(*ASKED, f"output={dtype}", f"save.dtype={dtype}", cwd=speaking).status == 0
        alone, shared = told(speaking / dtype), told(speaking / "sweep" / f"save.dtype={dtype}")
        assert alone == shared
        assert alone["answers"][0]["prompt"] == "the cat"
        assert alone["logits"]["perplexity_adapter"] > 1
    assert loads == {"adapted": 3, "from_pretrained": 3 * 2}


def test_runs_by_layers_share_the_reference_with_each_other_and_with_runs_in_memory(
    speaking: Path, loads: Counter[str]
) -> None:
    axes = ("save.dtype=float16,float32", "verify.layerwise=never,always")
    said = answer("-m", *REQUEST, "output=sweep", *axes, cwd=speaking)
    assert said.status == 0, said
    assert loads == {"adapted": 1, "from_pretrained": 1 + 4, "_sha256": 3}  # base once, and each output
    loads.clear()
    by_layers = "verify.layerwise=always"
    said = answer("-m", *REQUEST, "output=layers", axes[0], by_layers, cwd=speaking)
    assert said.status == 0, said
    assert loads == {"adapted": 1, "from_pretrained": 1 + 2}
    assert answer(*REQUEST, "output=alone", "save.dtype=float16", by_layers, cwd=speaking).status == 0
    runs = ("sweep/save.dtype=float16,verify.layerwise=always", "layers/save.dtype=float16", "alone")
    seen = [told(speaking / run)["logits"] for run in runs]
    assert seen[0] == seen[1] == seen[2]
    whole = told(speaking / "sweep" / "save.dtype=float16,verify.layerwise=never")["logits"]
    assert {key: seen[0][key] for key in whole} == whole
    assert seen[0].keys() - whole.keys() == {"layer_by_layer", "weights_held"}


@pytest.mark.parametrize(
    "axis",
    [
        "dequantize=auto,simulate",
        "adapter=adapter,other",
        "verify.text=text.txt,more.txt",
    ],
)
def test_another_reference_is_computed_anew(speaking: Path, loads: Counter[str], axis: str) -> None:
    write_adapter(speaking / "other", adapter_tensors(seed=5))
    (speaking / "more.txt").write_text(WORDS[100:] + WORDS)
    key = axis.partition("=")[0]
    request = [a for a in REQUEST if not a.startswith(f"{key}=")]
    said = answer("-m", *request, "output=sweep", axis, "save.dtype=float16,float32", cwd=speaking)
    assert said.status == 0, said
    assert loads["adapted"] == 2
    seen = [told(path.parent) for path in sorted((speaking / "sweep").glob("*/report.json"))]
    assert len({s["logits"]["kl_adapter_base"] for s in seen}) == 2


def test_a_file_that_changed_is_another_file(here: Path) -> None:
    file = here / "adapter" / "adapter_model.safetensors"
    before = digest(File.at(file))
    write_adapter(here / "adapter", adapter_tensors(seed=5))
    assert digest(File.at(file)) != before


def test_data_that_differ_have_other_digests_and_what_cannot_be_told_has_none() -> None:
    parts: list[Any] = [1, 1.0, True, "1", None, b"1", [1], {"1": 1}, {1: "1"}, Path("1"), [[1]], [1, None]]
    assert len({digest(part) for part in parts}) == len(parts)
    assert digest(0.1, "a") == digest(0.1, "a")
    assert digest({"a": object()}) is None
    assert digest(torch.zeros(1)) is None


@pytest.mark.parametrize("name", ["nf4", "fp8-block"])
def test_a_base_of_codes_is_told_apart_by_its_files(name: str, tmp_path: Path) -> None:
    write_llama(tmp_path / "base", hidden_size=128, intermediate_size=128)
    write_lora(tmp_path / "adapter", tmp_path / "base")
    seen = []
    for seed in (0, 1):
        folder = tmp_path / f"coded{seed}"
        merge(tmp_path / "base", tmp_path / "adapter", folder, quantize=name, weight=1.0 + seed)
        base = dense(load_checkpoint("base_model", str(folder)))
        assert any(weight.source is None for weight in base.weights)
        again = dense(load_checkpoint("base_model", str(folder)))
        seen += [digest(of_base(base, base)), digest(of_base(again, again))]
    assert None not in seen
    assert seen[0] == seen[1] != seen[2] == seen[3]


READ = """
import sys, torch
from pathlib import Path
from pipeline.ground import reuse

def made():
    raise AssertionError("it is there already")

with reuse.within(Path(sys.argv[1])):
    found = reuse.result(lambda: "key", made)
    assert torch.equal(found.tensors[0], torch.arange(6.0).view(2, 3) / 7), found
    assert list(found.told) == ["said", None, 0.1], found
    assert reuse.text(lambda: "key", made) == "e3b0"
"""


def kept(value: float = 0.1) -> reuse.Result:
    return reuse.Result([torch.arange(6.0).view(2, 3) / 7], ["said", None, value])


def test_another_process_reads_what_this_one_made(tmp_path: Path) -> None:
    with reuse.within(tmp_path / "shared"):
        reuse.result(lambda: "key", kept)
        reuse.text(lambda: "key", lambda: "e3b0")
    done = subprocess.run([sys.executable, "-c", READ, tmp_path / "shared"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_file_is_hashed_by_one_process_for_all(
    here: Path, tmp_path: Path, loads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = File.at(here / "base" / "model.safetensors")
    found = []
    with reuse.within(tmp_path / "shared"):
        for _ in range(2):
            monkeypatch.setattr(digests, "_KNOWN", {})  # as in a process that has seen nothing
            with digests.Digests([file], {}) as hashed:
                found += hashed.result()
    assert loads == {"_sha256": 1}
    assert {one.sha256 for one in found} == {sha256(file.path.read_bytes()).hexdigest()}


def test_nothing_is_kept_outside_a_sweep_or_without_a_key(tmp_path: Path) -> None:
    made: list[float] = []

    def make() -> reuse.Result:
        made.append(len(made))
        return kept(made[-1])

    assert [reuse.result(lambda: "key", make).told[2] for _ in range(2)] == [0, 1]
    with reuse.within(tmp_path):
        assert [reuse.result(lambda: None, make).told[2] for _ in range(2)] == [2, 3]
        assert [reuse.result(lambda: "key", make).told[2] for _ in range(2)] == [4, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["key.safetensors"]


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> set[str]:
        return {path.stem for path in tmp_path.iterdir()}

    with reuse.within(tmp_path):
        reuse.result(lambda: "a", kept)
        size = (tmp_path / "a.safetensors").stat().st_size
        monkeypatch.setattr(reuse, "MOST", 2 * size + 23)
        reuse.result(lambda: "b", kept)
        reuse.result(lambda: "a", kept)  # of use again
        reuse.result(lambda: "c", kept)
        assert names() == {"a", "c"}
        monkeypatch.setattr(reuse, "MOST", 23)
        reuse.result(lambda: "d", kept)
        assert names() == {"a", "c"}  # it does not fit, and drives nothing out


def test_a_scratch_that_is_gone_or_full_stops_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with reuse.within(tmp_path / "file" / "below"):
        assert list(reuse.result(lambda: "key", kept).told) == ["said", None, 0.1]
    (tmp_path / "key.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0 torn")
    with reuse.within(tmp_path):
        assert list(reuse.result(lambda: "key", kept).told) == ["said", None, 0.1]


def test_a_sweep_leaves_no_scratch(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(here / "scratch"))
    said = answer("-m", *REQUEST[:3], "output=sweep", "save.dtype=float16,float32", cwd=here)
    assert said.status == 0, said
    assert not list((here / "scratch").iterdir())
    assert {p.name for p in (here / "sweep").iterdir()} == {
        "save.dtype=float16",
        "save.dtype=float32",
        "sweep.csv",
        "sweep.html",
    }
