"""save.quantize=keep: the base's own format, its untouched codes byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.ground import shards
from pipeline.ground.errors import PipelineError, Refused
from pipeline.ground.rounding import Rounding
from pipeline.ground.written import Written
from tests.models import tensors, write_llama, write_lora
from tests.quantizing import Base, formats, is_linear, write_base
from tests.running import merge

KEPT = ["FP8 block", "FP8 channel", "FP8 tensor", "MXFP8", "MXFP4", "int4 packed", "int8 channel"]
KEPT += ["int4 packed, zero points"]
REFUSED = ["NVFP4", "GPTQ", "GPTQ act-order", "AWQ gemm", "HQQ", "torchao int8"]
FILES_ONLY = {"tokens": 0, "min_retained": 0}
TARGETS = ["q_proj", "down_proj"]
NUM_TARGETS = 4


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama in bfloat16, and an adapter for it whose deltas are larger than a step of four bits."""
    folder = tmp_path_factory.mktemp("dense")
    base = write_llama(folder / "base", shard="1GB", hidden_size=192, intermediate_size=320)
    return base, write_lora(folder / "adapter", base, size=0.12, target_modules=TARGETS)


def coded(dense: Path, name: str, folder: Path) -> Base:
    form = formats()[name]
    config = {**json.loads((dense / "config.json").read_text()), "quantization_config": form.config}
    choose = lambda weight: form if is_linear(weight) else None  # noqa: E731
    first = lambda name: ".layers.0." in name and "scale" not in name  # noqa: E731  scales lie elsewhere
    return write_base(folder / "base", tensors(dense), config, choose, first)


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def touched(name: str) -> bool:
    return any(f"{module}." in name for module in TARGETS)


@pytest.mark.parametrize("name", KEPT)
def test_the_bases_format_is_written_again(dense: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    base = coded(dense[0], name, tmp_path)
    out = tmp_path / "out"
    report = merge(base.folder, dense[1], out, quantize="keep", verify="standard", verify_settings=FILES_ONLY)
    assert report.passed
    before, after = tensors(base.folder), tensors(out)
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {
        n: (t.dtype, t.shape) for n, t in before.items()
    }
    assert [n for n in before if not touched(n) and raw(before[n]) != raw(after[n])] == []
    codes = [n for n in before if touched(n) and "scale" not in n and "shape" not in n and "zero" not in n]
    assert len(codes) == NUM_TARGETS and all(raw(before[n]) != raw(after[n]) for n in codes)
    assert (out / "config.json").read_bytes() == (base.folder / "config.json").read_bytes()
    merge(base.folder, dense[1], tmp_path / "wide", dtype="float32")
    wide, folder = tensors(tmp_path / "wide"), Written(out)
    for weight in base.coded:
        held = folder.rows(weight, 0, wide[weight].shape[0])
        unmerged = base.weights[weight].float()
        if not touched(weight):
            assert torch.equal(held, unmerged)
            continue
        T = wide[weight]
        assert float((held - T).norm()) < 0.6 * float((unmerged - T).norm())  # most of the delta is there
    again = merge(base.folder, dense[1], out, save="existing", verify="standard", verify_settings=FILES_ONLY)
    assert again.passed


def test_shards_whose_layout_stays_keep_their_header(dense: tuple[Path, Path], tmp_path: Path) -> None:
    form = formats()["FP8 block"]
    config = {
        **json.loads((dense[0] / "config.json").read_text()),
        "quantization_config": form.config,
    }
    base = write_base(
        tmp_path / "base", tensors(dense[0]), config, lambda name: form if is_linear(name) else None
    )
    merge(base.folder, dense[1], tmp_path / "out", quantize="keep")
    name = "model.safetensors"
    before, after = shards.read_shard(base.folder / name), shards.read_shard(tmp_path / "out" / name)
    assert before.header == after.header


@pytest.mark.parametrize("name", REFUSED)
def test_formats_that_need_a_search_or_an_encoder_are_refused_by_name(
    dense: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    base = coded(dense[0], name, tmp_path)
    with pytest.raises(Refused) as refused:
        merge(base.folder, dense[1], tmp_path / "out", quantize="keep")
    for sentence in refused.value.sentences:
        assert sentence.startswith("save.quantize: keep: 'model.layers.")
        assert name.split()[0].lower() in sentence.lower()
    assert not (tmp_path / "out").exists()


def test_gguf_is_refused(dense: tuple[Path, Path], tmp_path: Path) -> None:
    import gguf
    import numpy as np

    from pipeline.ground.gguf_names import hugging_face_name  # noqa: F401  the names that it understands

    path = tmp_path / "base.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"embedding_length": 192, "block_count": 2, "feed_forward_length": 320}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 4)
    writer.add_uint32("llama.attention.head_count_kv", 2)
    writer.add_uint32("llama.context_length", 64)
    writer.add_uint32("llama.vocab_size", 160)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    turned = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    turned |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    turned |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, tensor in tensors(dense[0]).items():
        parts = name.split(".")
        if "layers" in parts:
            called = f"blk.{parts[2]}.{turned[parts[-2]]}.weight"
        else:
            called = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[parts[-2]]
            called += ".weight"
        values = tensor.float().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(called, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(Refused, match=r"save.quantize: keep: '.*' is held as a GGUF file \(.*Q8_0.*\)"):
        merge(path, dense[1], tmp_path / "out", quantize="keep")


def test_scales_of_activations_stay_beside_the_codes(dense: tuple[Path, Path], tmp_path: Path) -> None:
    base = coded(dense[0], "FP8 tensor", tmp_path)
    for path in base.folder.glob("*.safetensors"):
        state = load_file(path)
        more = {n.replace(".weight", ".input_scale"): torch.tensor(0.5) for n in state if n in base.coded}
        save_file({**state, **more}, path, {"format": "pt"})
        index = json.loads((base.folder / shards.INDEX).read_text())
        index["weight_map"] |= dict.fromkeys(more, path.name)
        (base.folder / shards.INDEX).write_text(json.dumps(index))
    settings = {"verify": "standard", "verify_settings": FILES_ONLY}
    merge(base.folder, dense[1], tmp_path / "out", quantize="keep", **settings)
    assert tensors(tmp_path / "out").keys() == tensors(base.folder).keys()
    assert merge(base.folder, dense[1], tmp_path / "out", save="existing", **settings).passed
    merge(base.folder, dense[1], tmp_path / "plain", **settings)
    assert not [name for name in tensors(tmp_path / "plain") if "scale" in name]


def saved_by_bitsandbytes(dense: Path, folder: Path, **settings: Any) -> Path:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_is_requantized_as_bitsandbytes_does(
    dense: tuple[Path, Path], tmp_path: Path, nested: bool
) -> None:
    """What PEFT's merge into four bits is: quantize_4bit of what was decoded plus the delta, in float32."""
    functional = pytest.importorskip("bitsandbytes.functional")
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": nested}
    base = saved_by_bitsandbytes(dense[0], tmp_path / "base", load_in_4bit=True, **four)
    out = tmp_path / "out"
    report = merge(base, dense[1], out, quantize="keep", verify="standard", verify_settings=FILES_ONLY)
    assert report.passed
    merge(base, dense[1], tmp_path / "wide", dtype="float32")
    before, wide, after = tensors(base), tensors(tmp_path / "wide"), tensors(out)
    assert after.keys() == before.keys()
    for name in [n for n in wide if is_linear(n)]:
        wanted = {n: t for n, t in before.items() if n.startswith(name)}
        if touched(name):
            codes, state = functional.quantize_4bit(wide[name], quant_type="nf4", compress_statistics=nested)
            state.dtype = torch.bfloat16
            wanted = {name: codes, **{f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}}
        assert wanted.keys() == {n for n in after if n.startswith(name)}
        assert [n for n in wanted if raw(wanted[n]) != raw(after[n])] == []
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out)
    assert bool(model(torch.arange(20)[None]).logits.isfinite().all())


def test_int8_is_requantized_as_bitsandbytes_does(dense: tuple[Path, Path], tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    base = saved_by_bitsandbytes(dense[0], tmp_path / "base", load_in_8bit=True)
    merge(base, dense[1], tmp_path / "out", quantize="keep", verify="standard", verify_settings=FILES_ONLY)
    merge(base, dense[1], tmp_path / "wide", dtype="float32")
    before, wide, after = tensors(base), tensors(tmp_path / "wide"), tensors(tmp_path / "out")
    for name in [n for n in wide if is_linear(n)]:
        codes, scale = before[name], before[name.replace("weight", "SCB")]
        if touched(name):
            codes, scale, _ = functional.int8_vectorwise_quant(wide[name].half())
        assert torch.equal(after[name], codes)
        assert torch.equal(after[name.replace("weight", "SCB")], scale)


def test_a_delta_that_the_codes_swallow_fails_the_run(dense: tuple[Path, Path], tmp_path: Path) -> None:
    """NF4's steps are a tenth of the weights; on its own grid a smaller delta is gone, and that is told."""
    base = saved_by_bitsandbytes(dense[0], tmp_path / "base", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    small = write_lora(tmp_path / "small", dense[0], size=0.02, target_modules=TARGETS)
    settings = {"quantize": "keep", "verify": "standard"}
    with pytest.raises(PipelineError, match=r"retained: 0\.\d+ of the delta; 16 bits keep it"):
        merge(base, small, tmp_path / "out", **settings, verify_settings={"tokens": 0})
    report = merge(base, small, tmp_path / "out", **settings, verify_settings=FILES_ONLY)
    assert any("of the deltas 0." in f.text for f in report.findings)
    merge(base, small, tmp_path / "sixteen", verify="standard", verify_settings={"tokens": 0})


def test_small_deltas_on_fp8_survive_by_chance(dense: tuple[Path, Path], tmp_path: Path) -> None:
    """Where nearest keeps a part of it, auto takes chance, which keeps all of it in the mean."""
    base = coded(dense[0], "FP8 block", tmp_path)
    small = write_lora(tmp_path / "small", dense[0], size=0.008, target_modules=TARGETS)
    kept = {}
    for rounding in Rounding:
        out = tmp_path / rounding.value
        settings = {"verify": "standard", "verify_settings": FILES_ONLY}
        report = merge(base.folder, small, out, quantize="keep", rounding=rounding, **settings)
        kept[rounding] = [w["retained"] for w in report.weights.values()]
        taken = {w["rounding"] for w in report.weights.values()}
        assert taken == {"nearest" if rounding is Rounding.nearest else "stochastic"}
    mean = {rounding: sum(shares) / len(shares) for rounding, shares in kept.items()}
    assert mean[Rounding.nearest] < 0.5
    assert abs(mean[Rounding.stochastic] - 1) < 0.25
    assert kept[Rounding.auto] == kept[Rounding.stochastic]
    before, after = tensors(base.folder), tensors(tmp_path / "stochastic")
    still = [n for n in before if touched(n) and "scale" in n and torch.equal(before[n], after[n])]
    assert len(still) >= 2  # scales stay unless a value outgrows them


def test_formats_may_be_mixed_and_plain_weights_stay_plain(dense: tuple[Path, Path], tmp_path: Path) -> None:
    """FP8 in one layer, packed integers in the other, and a projection that is not quantized at all."""
    blocks, packed = formats()["FP8 block"], formats()["int4 packed"]
    config = json.loads((dense[0] / "config.json").read_text())
    config["quantization_config"] = packed.config | {"weight_block_size": [128, 128]}

    def choose(name: str) -> Any:
        if not is_linear(name) or "0.self_attn.q_proj" in name:
            return None
        return blocks if "layers.0" in name else packed

    base = write_base(tmp_path / "base", tensors(dense[0]), config, choose)
    out = tmp_path / "out"
    report = merge(base.folder, dense[1], out, quantize="keep", verify="standard", verify_settings=FILES_ONLY)
    assert report.passed
    after = tensors(out)
    assert after["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert after["model.layers.0.mlp.down_proj.weight"].dtype == torch.float8_e4m3fn
    assert after["model.layers.1.mlp.down_proj.weight_packed"].dtype == torch.int32


def test_a_quantized_base_may_be_written_in_another_format(dense: tuple[Path, Path], tmp_path: Path) -> None:
    """Decoded, merged and quantized anew; the config speaks of the new format alone."""
    base = coded(dense[0], "int4 packed", tmp_path)
    out = tmp_path / "out"
    settings = {"verify": "standard", "verify_settings": FILES_ONLY}
    report = merge(base.folder, dense[1], out, quantize="fp8-block", **settings)
    assert report.passed
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "fp8" and "config_groups" not in said
    assert not [name for name in tensors(out) if "packed" in name or "weight_shape" in name]
    assert merge(base.folder, dense[1], out, save="existing", **settings).passed
