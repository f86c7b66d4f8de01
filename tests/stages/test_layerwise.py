"""Models run one layer at a time: the figures are those of models in memory, bit for bit, in less memory."""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.dequantizing import dense as dense_weights
from pipeline.ground import layerwise, logits
from pipeline.ground.errors import PipelineError
from pipeline.ground.merge_logits import Merge
from pipeline.ground.report import Report, Status
from pipeline.ground.unread import Stream, Unread
from pipeline.loading import load_safetensors
from pipeline.verification.comparing import Layerwise
from pipeline.verification.deferring import Deferred
from tests.architectures import CASES
from tests.beside_peft import Case, quiet, quietly_merged, write
from tests.kind_cases import CASES as KINDS
from tests.lora_cases import CASES as LORA
from tests.models import tensors, write_llama, write_lora
from tests.stages.test_gguf import GGUF

TOKENS = 160  # two sequences, of which the second is cut off: one pass each, and one of both
ARCHITECTURES = [
    *("Llama, tied", "Phi-3", "Gemma 2", "GPT-2", "BERT classifier", "Llama classifier", "Mixtral"),
    *("DeepSeek-V3", "gpt-oss", "Llama 4", "Gemma 3", "Qwen2.5-VL", "Qwen3-Next", "Jamba", "MiniMax"),
    *("Falcon", "OPT", "GPT-NeoX", "Mixtral, experts by file names"),
]
ADAPTERS: dict[str, Case] = {
    name: (LORA | KINDS)[name]
    for name in (
        *("dora", "embeddings dora", "experts", "bias all", "modules_to_save", "larger, tied, both saved"),
        *("smaller vocabulary", "tied, saved as one", "tokens of both", "VeRA", "OFT", "AdaLoRA"),
    )
}
OWN = {"layer_by_layer", "weights_held", "peak_memory"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base of six layers, an adapter and what they merge to."""
    folder = tmp_path_factory.mktemp("made")
    base = write_llama(folder / "base", num_hidden_layers=6)
    adapter = write_lora(folder / "adapter", base)
    quietly_merged(base, adapter, folder / "merged")
    return base, adapter, folder / "merged"


def run(base: Path, adapter: Path, output: Path, how: Layerwise = Layerwise.always, **more: Any) -> Report:
    """Merges, or looks at what stands at `output`."""
    told = {"tokens": TOKENS, "layerwise": how, **more.pop("verify_settings", {})}
    save = {"save": "existing"} if output.exists() else {}
    return quietly_merged(base, adapter, output, verify="standard", verify_settings=told, **save, **more)


def status(report: Report) -> Status:
    return next(gate.status for gate in report.gates if gate.name == "logits")


def figures(report: Report) -> dict[str, Any]:
    """Those of both forms."""
    assert report.logits is not None
    return {key: value for key, value in report.logits.items() if key not in OWN}


def same_figures(base: Path, adapter: Path, output: Path, **more: Any) -> None:
    whole = run(base, adapter, output, Layerwise.never, **more)
    by_layers = run(base, adapter, output, **more)
    assert whole.logits is not None and "layer_by_layer" not in whole.logits
    assert by_layers.logits is not None and by_layers.logits["layer_by_layer"]
    assert figures(by_layers) == figures(whole)
    assert figures(whole)["kl_adapter_base"] > 0
    assert (status(whole), status(by_layers)) == (Status.passed, Status.passed)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_figures_are_those_of_models_in_memory(name: str, tmp_path: Path) -> None:
    with quiet():
        write(CASES[name], tmp_path, torch.float32)
    same_figures(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("name", ADAPTERS)
def test_figures_are_the_same_for_every_kind_of_adapter(name: str, tmp_path: Path) -> None:
    with quiet():
        write(ADAPTERS[name], tmp_path, torch.float32)
    same_figures(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", expect=dict(ADAPTERS[name].told))


@pytest.mark.parametrize("name", ["nf4-dq", "fp8-block"])
def test_quantized_bases_are_decoded_as_they_are_read(
    dense: tuple[Path, Path], written: dict[str, Path], tmp_path: Path, name: str
) -> None:
    same_figures(written[name], dense[1], tmp_path / "out")


@pytest.mark.parametrize("name", ["nf4-dq", "fp8-block"])
def test_quantized_outputs_are_decoded_as_they_are_read(
    dense: tuple[Path, Path], written: dict[str, Path], name: str
) -> None:
    same_figures(*dense, written[name], verify_settings={"max_ratio": 1e9})  # which is not asked here


@pytest.mark.skipif(not GGUF.is_file(), reason="`make test` fetches this model; it is not there")
def test_a_gguf_base_is_decoded_as_it_is_read(tmp_path: Path) -> None:
    adapter = Path(__file__).parents[2] / "quickstart/adapter"
    report = run(GGUF, adapter, tmp_path / "out", verify_settings={"tokens": 64})
    assert status(report) is Status.passed
    assert report.logits is not None
    assert report.logits["weights_held"] == (49152 + 1) * 576 * 4  # the last norm, embeddings as lm_head


def test_a_weight_is_read_once_for_all_passes_and_only_a_layer_is_held(
    made: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    fill = Unread.fill

    def counted(unread: Unread, out: torch.Tensor) -> None:
        reads.append(id(unread))
        fill(unread, out)

    monkeypatch.setattr(Unread, "fill", counted)
    report = run(*made)
    assert len(reads) == len(set(reads)) == 2 * (6 * 9 + 2)  # base and merged; embeddings by rows
    layer = sum(prod(t.shape) * 4 for n, t in tensors(made[0]).items() if n.startswith("model.layers.0."))
    assert report.logits is not None
    assert report.logits["weights_held"] == layer


def test_what_does_not_fit_whole_is_compared_by_layers(made: tuple[Path, Path, Path]) -> None:
    parameters = sum(prod(t.shape) for folder in made[:2] for t in tensors(folder).values())
    needed = logits.memory_needed(parameters, 160, TOKENS)
    for limit, form in ((needed, False), (needed - 1, True)):
        report = run(*made, Layerwise.auto, verify_settings={"memory_limit": limit})
        assert status(report) is Status.passed
        assert report.logits is not None and ("layer_by_layer" in report.logits) is form


def test_less_room_than_a_layer_takes_reads_more_often_and_says_the_same(
    made: tuple[Path, Path, Path],
) -> None:
    plenty = run(*made)
    assert plenty.logits is not None
    lora = sum(prod(t.shape) * 4 for t in tensors(made[1]).values())
    room = 160 * 64 * 4  # lm_head, the largest weight
    rotary = 2 * 8 * 4  # frequencies, which are no weights of files
    limit = logits.memory_needed(0, 160, plenty.logits["tokens"]) + lora + rotary + room
    report = run(*made, verify_settings={"memory_limit": limit})
    assert report.logits is not None
    assert report.logits["weights_held"] <= room + lora  # which the merged model does without
    assert report.logits["weights_held"] < plenty.logits["weights_held"]
    assert figures(report) == figures(plenty)


@pytest.mark.parametrize("how", [Layerwise.auto, Layerwise.never])
def test_what_does_not_fit_at_all_is_skipped_with_a_finding(
    made: tuple[Path, Path, Path], how: Layerwise
) -> None:
    report = run(*made, how, verify_settings={"memory_limit": 1000})
    assert status(report) is Status.skipped
    said = [f.text for f in report.findings if f.text.startswith("logits were not compared: ")]
    by_layers = "of memory layer by layer" in said[0]
    assert by_layers is (how is Layerwise.auto)
    assert ("verify.layerwise=auto" in said[0]) is (how is Layerwise.never)


def test_many_sequences_go_in_groups(made: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"tokens": 500}
    whole = run(*made, Layerwise.never, verify_settings=told)
    monkeypatch.setattr(layerwise, "_TOGETHER", 3)
    assert figures(run(*made, verify_settings=told)) == figures(whole)


def test_an_adapter_at_another_scale_is_seen(made: tuple[Path, Path, Path]) -> None:
    base, merged = (dense_weights(load_safetensors("base_model", str(made[n]))) for n in (0, 2))
    ratios = []
    for factor in (1.0, 2.0):
        stream = Stream()
        load = Deferred(stream).base
        models = Merge(made[2], [(made[1], factor)], load(base, base), load(merged, merged))
        layers = layerwise.Layers(stream, 1 << 30, "cpu")
        ratios.append(logits.compare(models, "", TOKENS, (), layers).figures["ratio"])
    assert ratios[0] < 0.01 < 0.1 < ratios[1]


def test_a_merged_model_that_does_not_run_fails(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(made[2], tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_type": "nonsense"}}))
    with pytest.raises(PipelineError, match="logits: the merged model does not run"):
        run(*made[:2], folder)


def test_what_peft_does_not_load_is_skipped(
    made: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("not today")

    monkeypatch.setattr(PeftModel, "from_pretrained", fails)
    report = run(*made)
    assert status(report) is Status.skipped
    assert any("base and adapter do not load: ValueError: not today" in f.text for f in report.findings)


@pytest.mark.parametrize("name", ["T5", "Whisper", "ViT"])
def test_what_does_not_run_on_text_alone_is_skipped_as_in_memory(name: str, tmp_path: Path) -> None:
    with quiet():
        write(CASES[name], tmp_path, torch.float32)
    report = run(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert status(report) is Status.skipped


def test_a_weight_that_the_files_lack_is_made_by_transformers(tmp_path: Path) -> None:
    """A base without the classifier that the adapter brings."""
    with quiet():
        write(CASES["Llama classifier"], tmp_path, torch.float32)
    for path in (tmp_path / "base").glob("*.safetensors"):
        state = load_file(path)
        state.pop("score.weight")
        save_file(state, path, {"format": "pt"})
    report = run(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert status(report) is Status.passed


def test_a_prompt_is_not_answered_and_that_is_said(made: tuple[Path, Path, Path]) -> None:
    report = run(*made, verify_settings={"prompts": ("Ahoy",)})
    assert report.answers is None
    assert any("answered no prompt" in f.text for f in report.findings)
