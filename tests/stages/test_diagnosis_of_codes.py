"""recipe=verify on merges held as codes: every broken one is named by its cause, no sound one refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from pipeline.ground.rounding import Rounding
from tests.models import tensors, write_llama, write_lora
from tests.running import merge
from tests.stages.test_diagnosis import ALPHA, RANK, State, causes, exact_deltas, nf4, verify

FORMATS = ("nf4", "nf4-dq", "fp4", "int8", "fp8-block", "fp8-channel", "int4-g128")
Made = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A base, an adapter, and one that adds nothing: through it broken weights become codes."""
    folder = tmp_path_factory.mktemp("made")
    base = write_llama(folder / "base", shard="1GB", hidden_size=128, intermediate_size=256)
    adapter = write_lora(folder / "adapter", base, r=RANK, lora_alpha=ALPHA, size=0.02)
    return base, adapter, write_lora(folder / "nothing", base, size=0.0)


def held(made: Made, state: State, folder: Path, quantize: str, **settings: Any) -> Path:
    """These float32 weights, the base's where there is none, in a format and without our manifest."""
    base, _, nothing = made
    broken = shutil.copytree(base, folder / "broken")
    save_file(tensors(base) | state, broken / "model.safetensors", {"format": "pt"})
    merge(broken, nothing, folder / "out", dtype="bfloat16", quantize=quantize, **settings)
    return unsigned(folder / "out")


def unsigned(folder: Path) -> Path:
    """As another tool would have left it."""
    for name in ("merge.json", "report.json", "report.html"):
        (folder / name).unlink()
    return folder


def scaled(factor: float, only: str = "") -> Callable[[State, State], State]:
    return lambda base, deltas: {
        n: base[n].float() + (factor if only in n else 1) * D for n, D in deltas.items()
    }


def another_base(base: State, deltas: State) -> State:
    torch.manual_seed(5)
    return {n: base[n].float() * (1 + 0.2 * torch.randn(D.shape)) + D for n, D in deltas.items()}


def another_adapter(base: State, deltas: State) -> State:
    torch.manual_seed(5)
    others = {n: torch.randn(D.shape[0], RANK) @ torch.randn(RANK, D.shape[1]) for n, D in deltas.items()}
    return {n: base[n].float() + others[n] * (D.norm() / others[n].norm()) for n, D in deltas.items()}


def four_bit_base(base: State, deltas: State) -> State:
    return {n: nf4(base[n].float()) + D for n, D in deltas.items()}


def loaded_four_bit_base(base: State, deltas: State) -> State:
    return {n: (nf4(base[n]) + D.bfloat16()).float() for n, D in deltas.items()}


def in_16_bits(base: State, deltas: State) -> State:
    return {n: (base[n] + D.bfloat16()).float() for n, D in deltas.items()}


def rounded_between(base: State, deltas: State) -> State:
    return {n: (base[n].float() + D).bfloat16().float() for n, D in deltas.items()}


def not_merged_in_16_bits(base: State, deltas: State) -> State:
    return rounded_between(base, {n: D * ("v_proj" not in n) for n, D in deltas.items()})


def swapped_layers(base: State, deltas: State) -> State:
    ours = {n: n.replace("layers.0", "layers.x").replace("layers.1", "layers.0") for n in deltas}
    return {n: base[n].float() + deltas[o.replace("layers.x", "layers.1")] for n, o in ours.items()}


def transposed(base: State, deltas: State) -> State:
    return {n: base[n].float() + (D.T if D.shape[0] == D.shape[1] else D) for n, D in deltas.items()}


def permuted(base: State, deltas: State) -> State:
    targets = {n: base[n].float() + D for n, D in deltas.items()}
    return {n: T.flip(0) if "q_proj" in n else T for n, T in targets.items()}


def half_the_rows(base: State, deltas: State) -> State:
    return {
        n: base[n].float() + torch.cat([D[: len(D) // 2], 0 * D[len(D) // 2 :]]) for n, D in deltas.items()
    }


BROKEN: dict[str, tuple[Callable[[State, State], State], str]] = {
    "not merged at all": (scaled(0), "the adapter was not merged: every weight is the base's"),
    "some modules not merged": (scaled(0, "v_proj"), "not merged into 2 of 14 merged weights"),
    "some, and rounded": (not_merged_in_16_bits, "not merged into 2 of 14 merged weights"),
    "merged twice": (scaled(2), "all 14 merged weights: holds 2 times the delta: merged twice"),
    "subtracted": (scaled(-1), "subtracted instead of added"),
    "alpha forgotten": (scaled(RANK / ALPHA), "the scale was left out (alpha forgotten)"),
    "not divided by the rank": (scaled(RANK), "alpha was not divided by the rank"),
    "as if rank-stabilised": (scaled(RANK**0.5), "as for rslora"),
    "too small by the root of the rank": (scaled(RANK**-0.5), "too small by sqrt(rank)"),
    "half of it": (scaled(0.5), "times the delta: a scale or weight that the recipe does not name"),
    "added to the 4-bit base": (four_bit_base, "added to the base's 4-bit (NF4) form"),
    "added to it as loaded": (loaded_four_bit_base, "added to the base's 4-bit (NF4) form"),
    "added to another base": (another_base, "differs from this base by 0.2"),
    "another adapter": (another_adapter, "another adapter was merged"),
    "rounded between": (rounded_between, "it was rounded to BF16 before it was quantized"),
    "merged in 16 bits": (in_16_bits, "delta and sum were rounded to BF16 before it was quantized"),
    "deltas of other layers": (swapped_layers, "got what belongs to model.layers.1"),
    "added transposed": (transposed, "4 of 14 merged weights, as model.layers.0.self_attn.o_proj.weight:"),
    "half of the rows": (half_the_rows, "the adapter was merged into a part only: 50 % of the values"),
    "rows in another order": (permuted, "its rows stand in another order"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("quantize", FORMATS)
def test_a_broken_merge_of_codes_is_named(made: Made, tmp_path: Path, quantize: str, name: str) -> None:
    base, adapter, _ = made
    breaking, said = BROKEN[name]
    folder = held(made, breaking(tensors(base), exact_deltas(adapter)), tmp_path, quantize)
    told = causes(base, adapter, folder, tmp_path / "report.json")
    assert said in told
    assert "no known cause" not in told


@pytest.mark.parametrize("quantize", FORMATS)
def test_a_sound_merge_of_codes_is_not_refused(made: Made, tmp_path: Path, quantize: str) -> None:
    base, adapter, _ = made
    folder = held(made, scaled(1)(tensors(base), exact_deltas(adapter)), tmp_path, quantize)
    verify(base, adapter, folder)


HOLDING = r"times as far off, holding (1\.0\d|0\.9\d) \(\+- 0\.\d\d\) times the delta: quantized by another"


@pytest.mark.parametrize("quantize", ["nf4", "fp8-block", "int4-g128"])
def test_codes_by_another_rule_are_told_with_how_much_of_the_delta_they_hold(
    made: Made, tmp_path: Path, quantize: str
) -> None:
    base, adapter, _ = made
    state, settings = scaled(1)(tensors(base), exact_deltas(adapter)), {}
    if quantize == "fp8-block":
        settings = {"rounding": Rounding.stochastic}
    else:
        torch.manual_seed(6)
        state = {name: W * (1 + 0.03 * torch.randn(W.shape)) for name, W in state.items()}
    folder = held(made, state, tmp_path, quantize, **settings)
    assert re.search(HOLDING, causes(base, adapter, folder, tmp_path / "report.json"))


@pytest.mark.parametrize("quantize", ["nf4", "fp8-block", "int8"])
def test_codes_of_adapters_by_other_weights_are_told_with_them(
    made: Made, tmp_path: Path, quantize: str
) -> None:
    base, adapter, _ = made
    other = write_lora(tmp_path / "other", base, r=2 * RANK, lora_alpha=ALPHA, size=0.02)
    merge(base, {adapter: 1.0, other: 1.0}, tmp_path / "out", quantize=quantize)
    asked = {adapter: 0.5, other: 0.25}
    told = causes(base, asked, unsigned(tmp_path / "out"), tmp_path / "report.json")
    wanted = r"all 14 merged weights: the adapters were added by other weights .*holds (2|1\.9\d|2\.0\d)"
    assert re.search(wanted + r" times that of adapter 1, (4|3\.9\d|4\.0\d) times that of adapter 2", told)


@pytest.mark.parametrize("quantize", ["nf4", "fp8-channel", "int8"])
def test_a_simulated_base_is_named_in_layers_that_the_adapter_leaves_alone(
    made: Made, tmp_path: Path, quantize: str
) -> None:
    base = made[0]
    adapter = write_lora(tmp_path / "adapter", base, r=RANK, target_modules=["q_proj"])
    merge(base, adapter, tmp_path / "out", dequantize="simulate", quantize=quantize)
    told = causes(base, adapter, unsigned(tmp_path / "out"), tmp_path / "report.json")
    assert "all 2 merged weights: the adapter was added to the base's 4-bit (NF4) form" in told
    if quantize != "nf4":  # whose own codes are the same
        assert "12 of 19 untouched weights, as model.layers.0" in told
        assert "holds the base's 4-bit (NF4) form, not this base's values" in told


def test_codes_of_another_base_are_told_though_no_delta_is_in_them(made: Made, tmp_path: Path) -> None:
    base = made[0]
    adapter = write_lora(tmp_path / "adapter", base, r=RANK, target_modules=["q_proj"])
    other = shutil.copytree(base, tmp_path / "other")
    state = {n: (t * 1.1).contiguous() if "v_proj" in n else t for n, t in tensors(base).items()}
    save_file(state, other / "model.safetensors", {"format": "pt"})
    merge(other, adapter, tmp_path / "out", quantize="int8")
    told = causes(base, adapter, unsigned(tmp_path / "out"), tmp_path / "report.json")
    assert "2 of 19 weights that the adapter does not touch differ from the base's" in told
    assert "v_proj.weight by 0.1 of its size" in told


@pytest.mark.parametrize("quantize", ["nf4", "int8", "fp8-block", "int4-g128"])
def test_a_merge_into_a_base_of_codes_is_named(made: Made, tmp_path: Path, quantize: str) -> None:
    dense, adapter, nothing = made
    base = tmp_path / "base"
    merge(dense, nothing, base, quantize=quantize)
    unsigned(base)
    twice = tmp_path / "twice"
    merge(base, adapter, twice, quantize="keep", weight=2.0)
    told = causes(base, adapter, unsigned(twice), tmp_path / "report.json")
    assert "all 14 merged weights: holds 2 times the delta: merged twice" in told
    assert "was not merged" in causes(base, adapter, base, tmp_path / "unmerged.json")


def quantized_by_bitsandbytes(made: Made, folder: Path, **config: Any) -> PreTrainedModel:
    """The base as transformers loads it with these settings, and written to the folder."""
    settings = BitsAndBytesConfig(bnb_4bit_quant_type="nf4", **config)
    model = AutoModelForCausalLM.from_pretrained(
        made[0], quantization_config=settings, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("config", "form"),
    [
        ({"load_in_4bit": True}, "4-bit (NF4)"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "4-bit (NF4)"),
        ({"load_in_8bit": True}, "bnb int8"),
    ],
)
def test_a_merge_that_peft_made_into_a_base_of_codes_is_named_by_what_peft_does(
    made: Made, tmp_path: Path, config: dict[str, bool], form: str
) -> None:
    dense, adapter, _ = made
    model = quantized_by_bitsandbytes(made, tmp_path / "base", **config)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(tmp_path / "out")
    told = causes(dense, adapter, tmp_path / "out", tmp_path / "dense.json")
    assert f"all 14 merged weights: the adapter was added to the base's {form} form, not to this base" in told
    if form == "bnb int8":  # which PEFT decodes in float32
        verify(tmp_path / "base", adapter, tmp_path / "out")
    else:
        told = causes(tmp_path / "base", adapter, tmp_path / "out", tmp_path / "coded.json")
        assert "the base was rounded to BF16 before the delta was added, as PEFT does it" in told


def test_a_16_bit_merge_of_a_base_that_was_decoded_to_16_bits_first_is_named(
    made: Made, tmp_path: Path
) -> None:
    dense, adapter, _ = made
    quantized_by_bitsandbytes(made, tmp_path / "base", load_in_4bit=True, bnb_4bit_use_double_quant=True)
    deltas, state = exact_deltas(adapter), tensors(dense)
    state |= {n: (nf4(state[n]).float() + D).bfloat16() for n, D in deltas.items()}  # as unsloth writes it
    merged = shutil.copytree(dense, tmp_path / "out")
    save_file(state, merged / "model.safetensors", {"format": "pt"})
    told = causes(tmp_path / "base", adapter, merged, tmp_path / "report.json")
    assert "the base was rounded to BF16 before the delta was added" in told
