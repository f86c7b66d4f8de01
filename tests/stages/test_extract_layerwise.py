"""An extraction is proved one layer at a time: the figures are those of models in memory, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.ground import logits
from pipeline.ground.ranks import Energy
from pipeline.ground.report import Gate, Report, Status
from pipeline.ground.unread import Unread
from pipeline.stages.save.merged import SaveDtype
from pipeline.verification.comparing import Layerwise
from tests import quantizing
from tests.architectures import CASES
from tests.beside_peft import quiet
from tests.models import tensors, write_llama, write_lora
from tests.stages.extracting import ALL, extract, noisy
from tests.stages.test_extract_architectures import bert, pair
from tests.stages.test_extract_formats import TOKENS, model_of, written
from tests.stages.test_extract_svd import MODELS as PLAIN

NAMED = ("BERT classifier", "DeepSeek-V3", "gpt-oss", "Llama 4", "Gemma 3", "Qwen2.5-VL", "Qwen3-Next", "OPT")
MODELS: dict[str, Callable[[], Any]] = {
    **PLAIN,  # Llama, with tied embeddings, with biases; Qwen 2, GPT-2, Mixtral
    **{name: CASES[name].make for name in NAMED},
    "BERT without a head": bert("Model"),
}
OWN = {"layer_by_layer", "weights_held", "peak_memory"}
SAVES = ["adapter", "both"]


pytestmark = pytest.mark.usefixtures("one_thread")


def run(base: Path, tuned: Path | None, output: Path, how: Layerwise, **more: Any) -> Report:
    told = {"tokens": TOKENS, "layerwise": how, **more.pop("verify_settings", {})}
    with quiet():
        return extract(base, tuned, output, verify="standard", verify_settings=told, **more)


def gate(report: Report) -> Gate:
    return next(gate for gate in report.gates if gate.name == "nearness")


def shown(report: Report) -> dict[str, Any]:
    assert report.extraction is not None
    assert report.extraction["logits"] is not None, gate(report)
    return dict(report.extraction["logits"])


def figures(report: Report) -> dict[str, Any]:
    """Those of both forms."""
    return {key: value for key, value in shown(report).items() if key not in OWN}


def same_figures(base: Path, tuned: Path | None, folder: Path, **more: Any) -> dict[str, Any]:
    """Asserts that they are; gives them."""
    whole = run(base, tuned, folder / "whole", Layerwise.never, **more)
    by_layers = run(base, tuned, folder / "by layers", Layerwise.always, **more)
    assert "layer_by_layer" not in shown(whole)
    assert shown(by_layers)["layer_by_layer"]
    assert figures(by_layers) == figures(whole)
    assert figures(whole)["kl_finetune_base"] > figures(whole)["kl_finetune_extracted"] > 0
    assert (gate(whole).status, gate(by_layers).status) == (Status.passed, Status.passed)
    return figures(whole)


@pytest.mark.parametrize("name", MODELS)
def test_figures_are_those_of_models_in_memory(name: str, tmp_path: Path) -> None:
    pair(tmp_path, MODELS[name])
    same_figures(tmp_path / "base", tmp_path / "tuned", tmp_path, rank=Energy(0.9))


@pytest.mark.parametrize("name", ["tied llama", "gpt2", "mixtral", "BERT classifier", "gpt-oss"])
def test_so_are_those_of_what_stands_merged_in_the_output(name: str, tmp_path: Path) -> None:
    pair(tmp_path, MODELS[name])
    same_figures(tmp_path / "base", tmp_path / "tuned", tmp_path, rank=Energy(0.9), save="both")


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize(
    ("base", "tuned"),
    [("FP8 block", "plain"), ("GGUF Q8_0", "plain"), ("plain", "GGUF Q8_0"), ("GPTQ", "FP8 block")],
)
def test_quantized_bases_and_fine_tunes_are_decoded_as_they_are_read(
    base: str, tuned: str, save: str, tmp_path: Path
) -> None:
    model = model_of()
    base_at, _ = written(tmp_path / "base", model, base)
    noisy(model, size=0.01)
    tuned_at, _ = written(tmp_path / "tuned", model, tuned)
    same_figures(base_at, tuned_at, tmp_path, save=save)


def test_a_bitsandbytes_base_is_decoded_as_it_is_read(tmp_path: Path) -> None:
    model = model_of()
    with quiet():
        model.bfloat16().save_pretrained(tmp_path / "dense")
        quantizing.write_bitsandbytes(tmp_path / "base", tmp_path / "dense", quantizing.BNB["nf4"])
        noisy(model, size=0.01)
        model.save_pretrained(tmp_path / "tuned")
    same_figures(tmp_path / "base", tmp_path / "tuned", tmp_path)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_have_room_in_all_models(tied: bool, save: str, tmp_path: Path) -> None:
    model = model_of(tied=tied)
    base_at, _ = written(tmp_path / "base", model, "plain")
    model.resize_token_embeddings(TOKENS + 8, mean_resizing=False)
    noisy(model, size=0.01)
    tuned_at, _ = written(tmp_path / "tuned", model, "plain")
    same_figures(base_at, tuned_at, tmp_path, save=save)


def test_adapters_that_become_one_are_merged_as_they_are_read(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    adapters = {write_lora(tmp_path / "a", base): 0.5, write_lora(tmp_path / "b", base, size=0.1): 0.5}
    same_figures(base, None, tmp_path, adapter=adapters, rank=6)


def test_a_merged_extraction_is_proved_by_what_stands_in_the_output(tmp_path: Path) -> None:
    """At full rank the adapter is the fine-tune; what merging it into bfloat16 has lost is seen."""
    pair(tmp_path, PLAIN["llama"])
    folders = (tmp_path / "base", tmp_path / "tuned")
    always = {"how": Layerwise.always, "rank": ALL}
    adapter = figures(run(*folders, tmp_path / "a", **always))
    merged = figures(run(*folders, tmp_path / "b", save="both", **always))
    coarse = {"save": "merged", "save_settings": {"dtype": SaveDtype.bfloat16}}
    rounded = figures(run(*folders, tmp_path / "c", **coarse, **always))
    assert rounded["ratio"] > 100 * max(adapter["ratio"], merged["ratio"])


def test_what_does_not_fit_whole_is_proved_by_layers(tmp_path: Path) -> None:
    """The largest is base + adapter, whose saved embeddings and head are held beside the base's."""
    pair(tmp_path, PLAIN["llama"])
    folders = (tmp_path / "base", tmp_path / "tuned")
    rows = {"saved_modules": ("embed_tokens", "lm_head")}
    extract(*folders, tmp_path / "out", **rows)
    held = [*tensors(tmp_path / "base").values(), *tensors(tmp_path / "out").values()]
    needed = logits.memory_needed(sum(prod(t.shape) for t in held), 96, TOKENS)
    for limit, form in ((needed, False), (needed - 1, True)):
        output, told = tmp_path / str(form), {"memory_limit": limit}
        report = run(*folders, output, Layerwise.auto, verify_settings=told, **rows)
        assert gate(report).status is Status.passed
        assert ("layer_by_layer" in shown(report)) is form


@pytest.mark.parametrize("how", [Layerwise.auto, Layerwise.never])
def test_what_does_not_fit_at_all_is_skipped_with_a_finding(how: Layerwise, tmp_path: Path) -> None:
    pair(tmp_path, PLAIN["llama"])
    told = {"memory_limit": 1000}
    report = run(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", how, verify_settings=told)
    assert (gate(report).status, gate(report).seen) == (Status.skipped, "not enough memory")
    (said,) = (f.text for f in report.findings if "were not compared by logits" in f.text)
    assert ("of memory layer by layer" in said) is (how is Layerwise.auto)
    assert ("verify.layerwise=auto" in said) is (how is Layerwise.never)


def test_one_layer_of_one_model_is_held_and_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    fill = Unread.fill

    def counted(unread: Unread, out: torch.Tensor) -> None:
        reads.append(id(unread))
        fill(unread, out)

    with quiet():
        from transformers import LlamaForCausalLM

        base = write_llama(tmp_path / "base", num_hidden_layers=6)
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        noisy(model, lambda name: "v_proj" in name)
        model.save_pretrained(tmp_path / "tuned")
    monkeypatch.setattr(Unread, "fill", counted)
    report = run(base, tmp_path / "tuned", tmp_path / "out", Layerwise.always)
    assert len(reads) == 3 * (6 * 9 + 2)  # base under the adapter and alone, fine-tune; embeddings by rows
    layer = sum(prod(t.shape) * 4 for n, t in tensors(base).items() if n.startswith("model.layers.0."))
    assert shown(report)["weights_held"] == layer
