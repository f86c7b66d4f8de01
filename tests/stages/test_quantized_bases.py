"""Merging on quantized bases, folder to folder: what comes out is what the codes mean plus the delta.

The deltas are sums of small whole numbers over a power of two, so exact in float32: whatever the order of the
sums, `W + delta` is rounded to float32 once and stored once, and every bit can be foretold.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.ground.errors import Refused
from pipeline.ground.report import Action, Report, Status
from pipeline.merging.pieces import Merged
from tests.models import LINEAR, tensors, write_llama, write_lora
from tests.quantizing import (
    BNB,
    Base,
    Format,
    compressed,
    formats,
    fp8_block,
    fp8_channel,
    is_linear,
    pack_quantized,
    write_base,
    write_bitsandbytes,
)
from tests.running import merge, pipeline

SHAPE = {"hidden_size": 192, "intermediate_size": 320}  # neither is a multiple of 128
TARGETS = [module for module in LINEAR if module != "k_proj"]  # which is decoded and not merged
FORMATS = formats()
TRACES = ("quant", "compress", "bits", "_scale", "scale_inv", "absmax", "qweight", "packed", "scb")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_and_adapter(tmp_path_factory.mktemp("quantized"))


def dense_and_adapter(folder: Path) -> Path:
    """Writes `dense`, a Llama in bfloat16, and `adapter`, whose deltas are exact."""
    write_llama(folder / "dense", shard="1GB", **SHAPE)
    write_lora(folder / "adapter", folder / "dense", target_modules=TARGETS)
    make_exact(folder / "adapter")
    return folder


def make_exact(adapter: Path) -> None:
    """Rounds A and B to multiples of 1/64, of which sums of products are exact in float32."""
    path = adapter / "adapter_model.safetensors"
    lora = {name: (tensor * 64).round() / 64 for name, tensor in load_file(path).items()}
    assert max(float(tensor.abs().max()) for tensor in lora.values()) < 1
    save_file(lora, path, {"format": "pt"})


def delta(adapter: Path, module: str, scale: float = 1.5) -> Tensor | None:
    """The delta of a module, exact in float32; None if it has none."""
    lora = load_file(adapter / "adapter_model.safetensors")
    A, B = (lora.get(f"base_model.model.{module}.lora_{x}.weight") for x in "AB")
    if A is None or B is None:
        return None
    exact = scale * (B.double() @ A.double())
    assert torch.equal(exact.float().double(), exact)
    return exact.float()


def foretold(base: Base, adapter: Path) -> dict[str, Tensor]:
    """Every tensor of the output: what the codes mean plus the delta, rounded to float32 and to bfloat16."""
    result = {}
    for name, weight in base.weights.items():
        added = delta(adapter, name.removesuffix(".weight"))
        result[name] = (weight.float() if added is None else weight.float() + added).bfloat16()
    return result


def config_of(folder: Path, **more: Any) -> dict[str, Any]:
    return {**json.loads((folder / "config.json").read_text()), **more}


def coded(shared: Path, name: str, folder: Path, *shards: Callable[[str], bool]) -> Base:
    """The model with all its projections in this format."""
    form = FORMATS[name]
    config = config_of(shared / "dense", quantization_config=form.config)
    choose = lambda weight: form if is_linear(weight) else None  # noqa: E731
    return write_base(folder / "base", tensors(shared / "dense"), config, choose, *shards)


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same tensors under the same names, bit for bit."""
    assert found.keys() == expected.keys()
    different = [n for n in found if found[n].dtype != expected[n].dtype or not found[n].equal(expected[n])]
    assert different == []


def assert_passed(report: Report) -> None:
    """Every gate, that of logits among them."""
    assert {gate.name: gate.seen for gate in report.gates if gate.status is not Status.passed} == {}
    assert "logits" in {gate.name for gate in report.gates}


def assert_no_trace(output: Path) -> None:
    """Nothing there says that anything was ever quantized."""
    from transformers import AutoConfig, AutoModelForCausalLM

    text = (output / "config.json").read_text().lower()
    assert [trace for trace in TRACES if trace in text] == []
    assert [name for name in tensors(output) if any(trace in name.lower() for trace in TRACES)] == []
    assert [path.name for path in output.iterdir() if "quant" in path.name] == []
    if AutoConfig.from_pretrained(output).model_type == "llama":
        model, told = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"]
        assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", FORMATS)
def test_what_comes_out_is_what_the_codes_mean_plus_the_delta_rounded_once(
    shared: Path, tmp_path: Path, name: str
) -> None:
    base = coded(shared, name, tmp_path)
    (base.folder / "quantize_config.json").write_text("{}")
    report = merge(base.folder, shared / "adapter", tmp_path / "out", verify="standard")
    assert_passed(report)
    assert_same(tensors(tmp_path / "out"), foretold(base, shared / "adapter"))
    assert_no_trace(tmp_path / "out")
    assert report.plan.count() == {Action.merged: 12, Action.decoded: 2, Action.copied: 7}


@cache
def by_bitsandbytes(dense: Path, name: str) -> Base:
    """The model that transformers quantizes and saves, and its weights as bitsandbytes decodes them."""
    pytest.importorskip("bitsandbytes")
    return write_bitsandbytes(dense.parent / f"bnb {name}", dense, BNB[name])


@pytest.mark.parametrize("name", BNB)
def test_on_what_bitsandbytes_wrote_too(shared: Path, tmp_path: Path, name: str) -> None:
    base = by_bitsandbytes(shared / "dense", name)
    assert len(base.coded) == 14
    report = merge(base.folder, shared / "adapter", tmp_path / "out", verify="standard")
    assert_passed(report)
    assert_same(tensors(tmp_path / "out"), foretold(base, shared / "adapter"))
    assert_no_trace(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", ["FP8 block", "AWQ gemm", "HQQ"])
def test_other_dtypes_are_rounded_once_from_the_same_sum(
    shared: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    base = coded(shared, name, tmp_path)
    merge(base.folder, shared / "adapter", tmp_path / "out", dtype=dtype)
    for name, stored in tensors(tmp_path / "out").items():
        added = delta(shared / "adapter", name.removesuffix(".weight"))
        weight = base.weights[name].float()
        exact = weight if added is None else weight + added
        assert torch.equal(stored, exact.to(getattr(torch, dtype))), name


def test_scales_may_lie_in_another_shard_than_their_codes(shared: Path, tmp_path: Path) -> None:
    base = coded(
        shared,
        "FP8 block",
        tmp_path,
        lambda name: name.endswith("_scale_inv"),
        lambda name: "layers.0" in name,
    )
    report = merge(base.folder, shared / "adapter", tmp_path / "out", verify="standard")
    assert_passed(report)
    assert_same(tensors(tmp_path / "out"), foretold(base, shared / "adapter"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == base.weights.keys()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2  # none for scales alone


def test_a_checkpoint_may_mix_formats_with_plain_floats(shared: Path, tmp_path: Path) -> None:
    """FP8 attention; NVFP4, MXFP4 and integers of 8, 4 and 3 bits; one projection left in bfloat16."""
    rules: dict[str, Format] = {
        "layers.0.self_attn": Format(fp8_channel, {}),
        "layers.1.self_attn": Format(fp8_block, {}),
        "layers.0.mlp.gate": FORMATS["NVFP4"],
        "layers.0.mlp.up": FORMATS["int8 channel"],
        "layers.1.mlp.gate": FORMATS["int4 packed"],
        "layers.1.mlp.up": Format(pack_quantized(3, 64), {}),
        "layers.0.mlp.down": FORMATS["MXFP4"],  # layers.1.mlp.down_proj is as it was
    }
    groups: dict[str, Any] = {}
    for number, (bits, pattern) in enumerate([(8, ".*0.mlp.up"), (4, ".*1.mlp.gate"), (3, ".*1.mlp.up")]):
        arguments = {"num_bits": bits, "type": "int", "symmetric": True}
        arguments |= {"strategy": "channel"} if bits == 8 else {"strategy": "group", "group_size": 64}
        groups[f"group_{number}"] = {"targets": [f"re:{pattern}_proj"], "weights": arguments}
    config = {**compressed("mixed-precision"), "config_groups": groups}
    choose = lambda n: next((rules[part] for part in rules if part in n and is_linear(n)), None)  # noqa: E731
    written = config_of(shared / "dense", quantization_config=config)
    base = write_base(tmp_path / "base", tensors(shared / "dense"), written, choose)
    report = merge(base.folder, shared / "adapter", tmp_path / "out", verify="standard")
    assert_passed(report)
    assert_same(tensors(tmp_path / "out"), foretold(base, shared / "adapter"))
    assert_no_trace(tmp_path / "out")
    sources = {weight.source for weight in report.plan.weights}
    kinds = ["BF16", "a scale per row", "NVFP4", "MXFP4", "int-quantized", "quantized 4", "quantized 3"]
    for kind in kinds:
        assert any(kind in source for source in sources)


@pytest.mark.parametrize("name", FORMATS)
def test_a_plain_weight_where_the_config_promises_codes_is_just_that(
    shared: Path, tmp_path: Path, name: str
) -> None:
    left = ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight")
    config = config_of(shared / "dense", quantization_config=FORMATS[name].config)
    choose = lambda n: FORMATS[name] if is_linear(n) and n not in left else None  # noqa: E731
    base = write_base(tmp_path / "base", tensors(shared / "dense"), config, choose)
    merge(base.folder, shared / "adapter", tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), foretold(base, shared / "adapter"))


def test_a_config_that_says_it_within_text_config_says_it_no_more(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, Gemma3Config, Gemma3ForConditionalGeneration

    text = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 48}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**SHAPE, **text, "vocab_size": 160, "max_position_embeddings": 64},
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).bfloat16().save_pretrained(tmp_path / "dense")
    dense, written = tensors(tmp_path / "dense"), config_of(tmp_path / "dense")
    written["text_config"]["quantization_config"] = FORMATS["FP8 block"].config
    choose = lambda n: FORMATS["FP8 block"] if is_linear(n) and "language" in n else None  # noqa: E731
    base = write_base(tmp_path / "base", dense, written, choose)
    assert len(base.coded) == 14
    weights = {
        n: (w.shape[0], w.shape[1]) for n, w in base.weights.items() if "language" in n and is_linear(n)
    }
    write_adapter(tmp_path / "adapter", {n.removesuffix(".weight"): shape for n, shape in weights.items()})
    report = merge(base.folder, tmp_path / "adapter", tmp_path / "out", verify="structure")
    assert report.passed
    assert report.plan.count()[Action.merged] == 14
    assert_same(tensors(tmp_path / "out"), foretold(base, tmp_path / "adapter"))
    assert_no_trace(tmp_path / "out")
    assert "text_config" in config_of(tmp_path / "out")
    _, told = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]


def write_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
    """A LoRA of rank 4 and alpha 6 for modules `(out, in)`, whose deltas are exact."""
    random, lora = torch.Generator().manual_seed(1), {}
    for module, (outputs, inputs) in shapes.items():
        for part, shape in (("A", (4, inputs)), ("B", (outputs, 4))):
            numbers = torch.randint(-9, 10, shape, generator=random) / 64
            lora[f"base_model.model.{module}.lora_{part}.weight"] = numbers
    folder.mkdir()
    save_file(lora, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": sorted(shapes)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


# Over codes as over the very numbers they mean: adapters that are no plain sum.


def decoded(base: Base, folder: Path) -> Path:
    """The same model with its codes written out in float32."""
    folder.mkdir()
    save_file(
        {n: w.contiguous() for n, w in base.weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = config_of(base.folder)
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DoRA": ({}, {"use_dora": True}),
    "embeddings": ({}, {"target_modules": [*TARGETS, "embed_tokens", "lm_head"]}),
    "saved embeddings": ({}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied embeddings": ({"tie_word_embeddings": True}, {"target_modules": [*TARGETS, "embed_tokens"]}),
    "a tied head": ({"tie_word_embeddings": True}, {"target_modules": ["lm_head", "q_proj"]}),
    "trained tokens": ({}, {"trainable_token_indices": [3, 77, 159]}),
}


@pytest.mark.parametrize("name", ["nf4, nested", "AWQ gemm", "FP8 block"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_every_kind_act_on_codes_as_on_numbers(
    shared: Path, tmp_path: Path, name: str, kind: str
) -> None:
    model, adapter = ADAPTERS[kind]
    dense = shared / "dense"
    if model:
        dense = shared / "tied"
        if not dense.exists():
            write_llama(dense, shard="1GB", **SHAPE, **model)
    if name in BNB:
        base = by_bitsandbytes(dense, name) if not model else by_bitsandbytes_tied(dense, name)
    else:
        config = config_of(dense, quantization_config=FORMATS[name].config)
        choose = lambda n: FORMATS[name] if is_linear(n) else None  # noqa: E731
        base = write_base(tmp_path / "base", tensors(dense), config, choose)
    write_lora(tmp_path / "adapter", dense, **{"target_modules": TARGETS, **adapter})
    ours = merge(base.folder, tmp_path / "adapter", tmp_path / "out", verify="standard")
    assert ours.passed and {gate.name for gate in ours.gates} >= {"rounding", "logits"}
    numbers = decoded(base, tmp_path / "numbers")
    merge(numbers, tmp_path / "adapter", tmp_path / "beside", dtype="bfloat16")
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "beside"))
    assert_no_trace(tmp_path / "out")


def by_bitsandbytes_tied(dense: Path, name: str) -> Base:
    """In a folder of its own."""
    folder = dense.parent / "tied by bnb" / "dense"
    if not folder.exists():
        shutil.copytree(dense, folder)
    return by_bitsandbytes(folder, name)


def test_experts_of_gpt_oss_are_merged_by_target_parameters(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "vocab_size": 160}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**sizes, **heads, **experts, sliding_window=16)).bfloat16()
    model.save_pretrained(tmp_path / "dense")
    random, held, weights = torch.Generator().manual_seed(1), {}, {}
    for name, weight in tensors(tmp_path / "dense").items():
        weights[name] = weight
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            held[name] = weight
            continue
        number, inputs, outputs = weight.shape
        shape = number, outputs, inputs // 32
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
        scales = torch.randint(118, 122, shape, dtype=torch.uint8, generator=random)
        held |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        weights[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    (tmp_path / "base").mkdir()
    save_file(held, tmp_path / "base/model.safetensors", {"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    told = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    config = json.dumps(config_of(tmp_path / "dense", quantization_config=told))
    (tmp_path / "base/config.json").write_text(config)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    tuned = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters)
    )
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=random)
    tuned.save_pretrained(tmp_path / "adapter")
    make_exact(tmp_path / "adapter")
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify="standard")
    assert_passed(report)
    assert report.plan.count()[Action.merged] == 6

    lora = load_file(tmp_path / "adapter/adapter_model.safetensors")
    expected = foretold(Base(tmp_path / "base", weights, frozenset()), tmp_path / "adapter")
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        for parameter, key in (("gate_up_proj", "base_layer."), ("down_proj", "")):
            A, B = (lora[f"base_model.model.{stem}.{key}lora_{x}.weight"].double() for x in "AB")
            name = f"{stem}.{parameter}"
            number, inputs, outputs = weights[name].shape
            # PEFT: A (r * experts, d1), B (d2, r * experts), of which expert e has every number-th column
            first, last = A.view(number, 4, -1), B.view(B.shape[0], 4, number)
            added = 1.5 * torch.einsum("eri,ore->eio", first, last)
            added = added if added.shape[1:] == (inputs, outputs) else added.transpose(1, 2)
            expected[name] = (weights[name] + added.float()).bfloat16()
    assert_same(tensors(tmp_path / "out"), expected)
    assert_no_trace(tmp_path / "out")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral whose file holds an expert's matrices one by one."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("mixtral") / "dense"
    sizes = {"hidden_size": 192, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 160}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4)).bfloat16().save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("name", ["FP8 block", "int4 packed", "GPTQ"])
@pytest.mark.parametrize("fused", [True, False])
def test_deltas_of_experts_reach_the_codes_of_each(
    mixtral: Path, tmp_path: Path, name: str, fused: bool
) -> None:
    """`fused`: one delta of the parameter in memory; else a LoRA for every expert's matrix."""
    choose = lambda n: FORMATS[name] if ".experts." in n or is_linear(n) else None  # noqa: E731
    config = config_of(mixtral, quantization_config=FORMATS[name].config)
    base = write_base(tmp_path / "base", tensors(mixtral), config, choose)
    experts = {n: w for n, w in base.weights.items() if ".experts." in n}
    assert len(experts) == 12
    if fused:
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        write_lora(tmp_path / "adapter", mixtral, target_modules=["q_proj"], target_parameters=parameters)
        make_exact(tmp_path / "adapter")
    else:
        shapes = {n.removesuffix(".weight"): (w.shape[0], w.shape[1]) for n, w in experts.items()}
        write_adapter(tmp_path / "adapter", shapes)
    report = merge(base.folder, tmp_path / "adapter", tmp_path / "out", verify="standard")
    assert report.passed
    assert report.plan.count()[Action.merged] == (13 if fused else 12)
    merge(decoded(base, tmp_path / "numbers"), tmp_path / "adapter", tmp_path / "beside", dtype="bfloat16")
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "beside"))
    if not fused:
        assert_same(tensors(tmp_path / "out"), foretold(base, tmp_path / "adapter"))


@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_none_refuses_codes_by_name(shared: Path, tmp_path: Path, name: str) -> None:
    from dataclasses import replace

    from pipeline.stage import STAGES

    base = coded(shared, name, tmp_path)
    made = pipeline(base.folder, shared / "adapter", tmp_path / "out")
    none: Any = STAGES["dequantize"]["none"]()
    first = next(weight for weight in made.load().weights if is_linear(weight.name))
    with pytest.raises(
        Refused, match=rf"dequantize: '{first.name}' is stored as .+ codes; use dequantize=auto"
    ):
        replace(made, dequantize=none).plan()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "left", "tensor"),
    [
        ("FP8 block", "model.layers.0.mlp.up_proj.weight_scale_2", torch.ones(())),
        ("int4 packed", "model.norm.weight_zero_point", torch.ones(3, dtype=torch.int8)),
        ("AWQ gemm", "lm_head.qzeros", torch.ones(3, 3, dtype=torch.int32)),
        ("torchao int8", "lm_head.weight_scale", torch.ones(160, 1)),
    ],
)
def test_what_no_decoder_has_used_is_refused_with_its_list(
    shared: Path, tmp_path: Path, name: str, left: str, tensor: Tensor
) -> None:
    base = coded(shared, name, tmp_path)
    path, more = base.folder / "model.safetensors", {left: tensor, "model.layers.1.qzeros": torch.ones(2)}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors(base.folder) | more, path, metadata)
    with pytest.raises(Refused) as refused:
        pipeline(base.folder, shared / "adapter", tmp_path / "out").plan()
    assert all(name in str(refused.value) for name in more)
    assert not (tmp_path / "out").exists()


def test_a_corruption_of_every_layer_is_told_once(shared: Path, tmp_path: Path) -> None:
    """What bitsandbytes packs for a CPU with AVX512 and saves: the scales of all layers in bfloat16."""
    base = write_bitsandbytes(tmp_path / "base", shared / "dense", BNB["nf4"])
    path = base.folder / "model.safetensors"
    held = tensors(base.folder)
    save_file(
        {n: t.bfloat16() if n.endswith(".absmax") else t for n, t in held.items()}, path, {"format": "pt"}
    )
    with pytest.raises(Refused) as refused:
        pipeline(base.folder, shared / "adapter", tmp_path / "out").plan()
    [sentence] = refused.value.sentences
    assert "absmax" in sentence
    assert sentence.endswith("(14 of this kind)")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["GPTQ", "AWQ gemm", "HQQ", "int4 packed"])
def test_the_memory_of_a_plan_counts_what_a_decoder_holds(shared: Path, tmp_path: Path, name: str) -> None:
    base = coded(shared, name, tmp_path)
    made = pipeline(base.folder, shared / "adapter", tmp_path / "out")
    merged = made.merge(made.dequantize(made.load()), made.extract())
    held = [w.base.state_bytes for w in merged.weights if isinstance(w, Merged)]
    assert min(held) > 0
    beside = decoded(base, tmp_path / "numbers")
    plain = pipeline(beside, shared / "adapter", tmp_path / "out", dtype="bfloat16").plan()
    assert made.plan().peak_memory >= plain.peak_memory + 2 * max(held)
    if name in ("GPTQ", "AWQ gemm"):  # whose words are held whole
        largest = max(t.nbytes for n, t in tensors(base.folder).items() if n.endswith("qweight"))
        assert max(held) >= largest
