"""What peft_type LORA can be, end to end, beside PEFT's own merge and its merge in float64.

Into float32 the values are PEFT's bits. Into 16 bits they are too, but where PEFT casts the delta to the
base's dtype before it adds it: embeddings, bare parameters, BD-LoRA and MiCA; there PEFT is the one that is
off by more than a rounding. Column norms (DoRA on what lies transposed) and convolutions are float32 sums
that torch takes in another order.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftType, get_peft_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pipeline.ground.deltas.kinds import KINDS, NOT_MERGEABLE
from pipeline.ground.errors import Refused
from pipeline.ground.report import Report, Status
from pipeline.stages.extract.peft import Packing
from tests.beside_peft import (
    WEIGHTS,
    Beside,
    Case,
    load_base,
    merges,
    quiet,
    quietly_merged,
    with_noise,
    write,
    write_base,
)
from tests.lora_cases import CASES, RESIZED, TIED_RIGHTLY, bare, llama, lora
from tests.models import tensors
from tests.peft_defects import Attention, Files
from tests.tolerance import within_half_ulp

DTYPES = (torch.float32, torch.bfloat16)
TOKENS = 32


def is_proved(report: Report, logits: bool) -> bool:
    """Whether every gate has passed, that of the logits too where they were to be compared."""
    seen = {gate.name: gate.status for gate in report.gates}
    return set(seen.values()) == {Status.passed} and ("logits" in seen) == logits


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_every_variant_is_verified_and_merged_as_peft_merges_it(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    case = CASES[name]
    has_logits = dtype == torch.float32 and isinstance(case.make(), PreTrainedModel)
    found = merges(case, tmp_path, dtype, TOKENS if has_logits else 0)
    assert is_proved(found.report, has_logits), found.report.gates
    assert found.ours.keys() == found.theirs.keys()
    assert found.changed
    assert found.apart <= case.beside.bound(dtype)
    if dtype == torch.bfloat16:
        assert found.off(found.ours) == []
    if case.beside is Beside.delta_rounded and dtype == torch.bfloat16:
        assert found.off(found.theirs)  # PEFT's second rounding is the whole difference
    if name in RESIZED or name in TIED_RIGHTLY:
        ours, theirs = (
            json.loads((tmp_path / folder / "config.json").read_text())
            for folder in ("out", found.peft_folder)
        )
        assert ours["vocab_size"] == theirs["vocab_size"] == len(found.ours["model.embed_tokens.weight"])
        assert (
            ours["tie_word_embeddings"]
            == theirs["tie_word_embeddings"]
            == ("lm_head.weight" not in found.ours)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["linear", "dora", "embeddings", "lora_bias", "conv1d"])
def test_adapters_of_any_float_dtype_are_merged_with_their_files_values(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """PEFT's default load casts what the file holds to float32, or to float64 on such a base."""

    def rewrite(folder: Path) -> None:
        path = folder / "adapter" / WEIGHTS
        save_file({n: v.to(dtype) for n, v in tensors(path.parent).items()}, path, {"format": "pt"})

    case = CASES[name]
    case = Case(case.make, case.config, case.beside, rewrite=rewrite)
    found = merges(case, tmp_path, torch.float32)
    assert is_proved(found.report, logits=False)
    assert {value.dtype for value in found.adapter.values()} == {dtype}
    assert found.apart == 0
    assert found.off(found.ours) == []


def test_a_float64_base_is_merged_in_float64(tmp_path: Path) -> None:
    found = merges(CASES["linear"], tmp_path, torch.float64)
    assert is_proved(found.report, logits=False)
    assert found.different == []


def test_experts_packed_as_unsloth_packs_them_are_merged_when_told(tmp_path: Path) -> None:
    """lora_B is (out, experts * rank) there; PEFT's is (out, rank * experts), and no shape tells."""
    write_quietly(CASES["experts"], tmp_path, torch.float32)
    quietly_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "plain")
    held = tensors(tmp_path / "adapter")
    for name, B in held.items():
        if ".experts." in name and "lora_B" in name:
            held[name] = B.view(len(B), 4, 4).transpose(1, 2).reshape(B.shape).contiguous()
    save_file(held, tmp_path / "adapter" / WEIGHTS, {"format": "pt"})
    quietly_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "mixed")
    told = {"expert_packing": Packing.expert}
    report = quietly_merged(
        tmp_path / "base",
        tmp_path / "adapter",
        tmp_path / "packed",
        verify="standard",
        verify_settings={"tokens": 0},
        expect=told,
    )
    plain, packed, mixed = (tensors(tmp_path / name) for name in ("plain", "packed", "mixed"))
    assert all(torch.equal(plain[name], packed[name]) for name in plain)
    assert not all(torch.equal(plain[name], mixed[name]) for name in plain)
    assert report.passed


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_an_init_left_of_the_base_takes_the_adapter_as_it_is(init: str, tmp_path: Path) -> None:
    """With extract.residual_base the merge is W_residual + s B A, the very function that was trained."""
    case = Case(llama(), lora(init_lora_weights=init))
    torch.manual_seed(0)
    write_base(case.make(), tmp_path / "base")
    with quiet():
        tuned = get_peft_model(load_base(case, tmp_path / "base", torch.float32), case.config())
        with_noise(tuned).save_pretrained(tmp_path / "adapter")
        trained = tuned.merge_and_unload().state_dict()
        left = get_peft_model(load_base(case, tmp_path / "base", torch.float32), case.config()).unload()
        left.save_pretrained(tmp_path / "left")
    with pytest.raises(Refused, match=r"extract\.residual_base=true"):
        quietly_merged(tmp_path / "left", tmp_path / "adapter", tmp_path / "out")
    quietly_merged(tmp_path / "left", tmp_path / "adapter", tmp_path / "out", expect={"residual_base": True})
    ours = tensors(tmp_path / "out")
    assert all(torch.equal(ours[name], trained[name]) for name in ours)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_adapter_before_training_stands_for_pefts_own_conversion(init: str, tmp_path: Path) -> None:
    """path_initial_model_for_weight_conversion stacks [A; A0] and [B, -B0]: rank 2r on the original base."""
    case = Case(llama(), lora(init_lora_weights=init))
    torch.manual_seed(0)
    write_base(case.make(), tmp_path / "base")
    with quiet():
        tuned = get_peft_model(load_base(case, tmp_path / "base", torch.float32), case.config())
        tuned.peft_config["default"].init_lora_weights = True  # as PEFT asks before it saves the first
        tuned.save_pretrained(tmp_path / "first")
        with_noise(tuned).save_pretrained(tmp_path / "adapter")
        tuned.save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "first")
        )
        for name in ("first", "adapter"):
            path = tmp_path / name / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": init}))
    files = Files(tmp_path)
    told = {"initial": str(tmp_path / "first")}
    quietly_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "told", verify="standard", expect=told)
    quietly_merged(tmp_path / "base", tmp_path / "converted", tmp_path / "plain", verify="standard")
    told_values, converted = tensors(tmp_path / "told"), tensors(tmp_path / "plain")
    for name in told_values:
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            continue
        exact = files(name) + 1.5 * (files.lora(module) - files.lora(module, "first"))
        size = files(name).abs() + exact.abs().amax()
        assert within_half_ulp(told_values[name], exact, "F32", size)
        assert within_half_ulp(converted[name], exact, "F32", size)


def test_the_out_proj_of_an_attention_has_the_alpha_that_patterns_give_the_attention(tmp_path: Path) -> None:
    case = Case(Attention, bare("attn", alpha_pattern={"attn": 20}), told={"out_proj_times": 2})
    found = merges(case, tmp_path, torch.float32)
    assert is_proved(found.report, logits=False)
    files, name = Files(tmp_path), "attn.out_proj.weight"
    D = 2 * 20 / 4 * files.lora("attn.base_layer.out_proj")
    for state in (found.ours, found.theirs):
        assert within_half_ulp(state[name], files(name) + D, "F32", files(name).abs() + D.norm())


def test_several_adapters_are_summed_and_rounded_once(tmp_path: Path) -> None:
    """PEFT rounds after each of them."""
    case = CASES["linear"]
    write_quietly(case, tmp_path, torch.bfloat16)
    with quiet():
        tuned = get_peft_model(load_base(case, tmp_path / "base", torch.bfloat16), lora(r=2)())
        with_noise(tuned, seed=2).save_pretrained(tmp_path / "second")
    both = {tmp_path / "adapter": 0.5, tmp_path / "second": -2.0}
    report = quietly_merged(
        tmp_path / "base", both, tmp_path / "out", verify="standard", verify_settings={"tokens": 0}
    )
    assert is_proved(report, logits=False)
    files, ours = Files(tmp_path), tensors(tmp_path / "out")
    for name, stored in ours.items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj"):
            one, other = 0.5 * 1.5 * files.lora(module), -2 * 3 * files.lora(module, "second")
            exact, size = files(name) + one + other, files(name).abs() + one.norm() + other.norm()
            assert within_half_ulp(stored, exact, "BF16", size)


def test_dora_and_lora_on_one_weight_are_refused_because_their_order_would_matter(tmp_path: Path) -> None:
    case = CASES["linear"]
    write_quietly(case, tmp_path, torch.float32)
    with quiet():
        tuned = get_peft_model(load_base(case, tmp_path / "base", torch.float32), lora(use_dora=True)())
        with_noise(tuned).save_pretrained(tmp_path / "dora")
    both = {tmp_path / "adapter": 1.0, tmp_path / "dora": 1.0}
    with pytest.raises(Refused, match=r"\.weight would get LoRA .* and DoRA .*, whose order .* \(14 of"):
        quietly_merged(tmp_path / "base", both, tmp_path / "out")


def test_a_whole_module_in_a_size_of_its_own_takes_no_factor_and_no_second_adapter(tmp_path: Path) -> None:
    case = RESIZED["larger vocabulary"]
    write_quietly(case, tmp_path, torch.float32)
    with pytest.raises(Refused, match=r"in a size of its own; it cannot be taken 0\.5 times"):
        quietly_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", weight=0.5)
    plain = CASES["tokens alone"]
    with quiet():
        tuned = get_peft_model(load_base(plain, tmp_path / "base", torch.float32), plain.config())
        with_noise(tuned).save_pretrained(tmp_path / "second")
    for order in (("adapter", "second"), ("second", "adapter")):
        both = {tmp_path / name: 1.0 for name in order}
        with pytest.raises(Refused, match=r"one holds .* whole and another changes it"):
            quietly_merged(tmp_path / "base", both, tmp_path / "out")


def test_two_adapters_that_hold_one_module_whole_are_refused(tmp_path: Path) -> None:
    case = Case(llama(), lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    write_quietly(case, tmp_path, torch.float32)
    with quiet():
        tuned = get_peft_model(load_base(case, tmp_path / "base", torch.float32), case.config())
        with_noise(tuned, seed=2).save_pretrained(tmp_path / "second")
    both = {tmp_path / "adapter": 1.0, tmp_path / "second": 1.0}
    with pytest.raises(Refused, match=r"lm_head\.weight would get saved whole and saved whole, whose order"):
        quietly_merged(tmp_path / "base", both, tmp_path / "out")


def test_keys_with_the_adapters_name_are_verified_too(tmp_path: Path) -> None:
    def rewrite(folder: Path) -> None:
        named = {n.replace(".weight", ".default.weight"): v for n, v in tensors(folder / "adapter").items()}
        save_file(named, folder / "adapter" / WEIGHTS, {"format": "pt"})

    found = merges(Case(llama(), lora(), rewrite=rewrite), tmp_path, torch.float32)
    assert is_proved(found.report, logits=False)
    assert len(found.changed) == 14


def test_copies_that_peft_writes_of_a_saved_module_are_held_against_it(tmp_path: Path) -> None:
    """Of a resized vocabulary: X.modules_to_save is X again, X.original_module what it was before."""
    case = RESIZED["larger, both saved"]
    write_quietly(case, tmp_path, torch.float32)
    held = tensors(tmp_path / "adapter")
    copy = "base_model.model.lm_head.modules_to_save.weight"
    assert torch.equal(held[copy], held["base_model.model.lm_head.weight"])
    assert not torch.equal(held[copy], held["base_model.model.lm_head.original_module.weight"])
    report = quietly_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert any("4 tensors served training only, or are there twice" in f.text for f in report.plan.findings)
    held[copy][0, 0] += 1
    save_file(held, tmp_path / "adapter" / WEIGHTS, {"format": "pt"})
    with pytest.raises(Refused, match=r"both '.*lm_head.* mean lm_head\.weight, and differ"):
        quietly_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "other")


def test_every_kind_that_peft_knows_is_either_merged_or_refused_with_a_reason() -> None:
    known = {kind.value for kind in PeftType}
    assert known <= KINDS.keys() | NOT_MERGEABLE.keys()
    assert not KINDS.keys() & NOT_MERGEABLE.keys()


def write_quietly(case: Case, folder: Path, dtype: torch.dtype) -> None:
    with quiet():
        write(case, folder, dtype)
