"""What is quantized of a model, what its config says then, what is left, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.ground.errors import Refused
from pipeline.ground.report import Action
from pipeline.ground.rounding import Rounding
from tests.making import llama_config
from tests.models import tensors, write_llama, write_lora
from tests.running import merge, pipeline
from tests.stages.quantized import (
    BNB,
    FILES_ONLY,
    FORMATS,
    SIZES,
    decoded,
    quantization,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_config_loses_what_it_said_before_at_every_depth() -> None:
    from pipeline.ground.model_config import edited

    config = {
        "compression_config": {"old": 1},
        "text_config": {"quantization_config": {"old": 2}, "n": 1},
        "n": 2,
    }
    new = {"quant_method": "fp8"}
    assert edited(config, {"quantization_config": new}) == {
        "text_config": {"n": 1},
        "n": 2,
        "quantization_config": new,
    }


def test_the_config_names_what_is_left(written: dict[str, Path]) -> None:
    for name in BNB:
        assert quantization(written[name])["llm_int8_skip_modules"] == ["lm_head"]
    assert quantization(written["fp8-block"])["modules_to_not_convert"] == ["lm_head"]
    assert quantization(written["int4-g128"])["ignore"] == ["re:.*lm_head$"]


def test_the_plan_knows_what_will_be_quantized_without_torch(here: Path) -> None:
    import subprocess
    import sys

    code = "import sys; from pipeline.__main__ import main; main(); print('torch' in sys.modules)"
    request = ["base_model=base", "adapter=adapter", "output=out", "save.quantize=nf4-dq", "dry_run=true"]
    said = subprocess.run([sys.executable, "-c", code, *request], cwd=here, capture_output=True, text=True)
    assert said.stdout.endswith("False\n"), said.stderr
    assert "encoded (quantized anew)" in said.stdout


def test_columns_that_do_not_fill_groups_are_left_and_told(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", hidden_size=128, intermediate_size=192)
    adapter = write_lora(tmp_path / "adapter", base)
    report = merge(base, adapter, tmp_path / "out", quantize="int4-g128", verify="structure")
    told = "down_proj.weight [128, 192] does not fit int4-g128 and stays as it is (2 weights)"
    assert any(f.text.endswith(told) for f in report.plan.findings)
    assert quantization(tmp_path / "out")["ignore"] == ["re:.*lm_head$", "re:.*mlp\\.down_proj$"]


def test_ragged_blocks_are_written_and_told(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", hidden_size=192, intermediate_size=320)
    adapter = write_lora(tmp_path / "adapter", base)
    settings = {"quantize": "fp8-block", "verify": "standard", "verify_settings": FILES_ONLY}
    report = merge(base, adapter, tmp_path / "out", **settings)
    assert any("128 does not divide the sides of" in f.text for f in report.plan.findings)
    assert report.passed


def test_experts_are_quantized_where_loaders_take_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, head_dim=32,
        num_key_value_heads=2, vocab_size=160, num_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "base")
    adapter = write_lora(tmp_path / "adapter", tmp_path / "base", target_modules=["q_proj"])
    expert = "model.layers.0.mlp.experts.1.up_proj.weight"
    for name, dtype in (("nf4", torch.bfloat16), ("fp8-block", torch.float8_e4m3fn)):
        merge(tmp_path / "base", adapter, tmp_path / name, quantize=name, verify="structure")
        assert tensors(tmp_path / name)[expert].dtype == dtype
        assert tensors(tmp_path / name)["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8-block")
    fused = model.model.layers[0].mlp.experts.gate_up_proj[1, 128:]
    assert torch.equal(fused, decoded(tmp_path / "fp8-block")[expert].bfloat16())
    assert bool(model(torch.arange(20)[None]).logits.isfinite().all())


def test_sizes_of_the_plan_bound_what_is_written(dense: tuple[Path, Path], written: dict[str, Path]) -> None:
    for name in FORMATS:
        p = pipeline(*dense, written[name].parent / "never", quantize=name)
        plan = p.plan()
        for shard, size in plan.shards.items():
            spare = size - (written[name] / shard).stat().st_size
            assert 0 <= spare <= (14 * 40 if name == "nf4-dq" else 0)
        assert plan.count()[Action.encoded] == 10


def test_what_cannot_be_is_refused_in_a_sentence(dense: tuple[Path, Path], tmp_path: Path) -> None:
    def refusal(base: Path, **settings: Any) -> str:
        with pytest.raises(Refused) as refused:
            merge(base, dense[1], tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()
        return str(refused.value)

    told = refusal(dense[0], quantize="fp8-blocks")
    assert told.startswith("save.quantize: no format 'fp8-blocks'; did you mean fp8-block; choose one of")
    assert "save.rounding: stochastic means nothing for nf4" in refusal(
        dense[0], quantize="nf4", rounding=Rounding.stochastic
    )
    assert "the base is not quantized" in refusal(dense[0], quantize="keep")


def test_conv1d_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32))
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(Refused, match=r"save.quantize: gpt2 holds .*c_attn.weight transposed"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", quantize="nf4")


def test_a_hidden_size_of_nothing_to_quantize_is_refused(tmp_path: Path) -> None:
    config = llama_config()
    assert config["hidden_size"] % 128  # no group of int4-g128 fits
    from tests.making import write_adapter, write_base

    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    with pytest.raises(Refused, match="no weight of this model can be stored as int4-g128"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", quantize="int4-g128")
