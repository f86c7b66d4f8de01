"""What transformers 5.23 makes of quantized checkpoints as it loads and saves them: ours reads or refuses it.

Both models are tiny and real: written, quantized by hand, loaded by transformers (which decodes them, for
want of a GPU) and saved again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline.ground.codes import fp8, mx
from pipeline.ground.codes.code import Finder, Quantization
from pipeline.ground.errors import Refused
from pipeline.ground.shards import Entry, read_shard
from tests.ground.codes.holding import random_bytes, whole

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU transformers keeps the codes")

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": []}


def weights(folder: Path) -> dict[str, Entry]:
    return {entry.name: entry for entry in read_shard(folder / "model.safetensors").entries}


def decoded(finder: Finder, folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """All that the finder makes out, decoded."""
    return {one.name: whole(one.code) for one in finder(weights(folder), Quantization(config))}


def quantized(model: Any, folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """The model's checkpoint with these tensors instead of those whose names they begin with."""
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    plain = {n: t for n, t in load_file(path).items() if not any(q in (n, n + "_blocks") for q in tensors)}
    save_file(plain | tensors, path, {"format": "pt"})
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | {"quantization_config": config}))


def blockwise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 in blocks of 128 x 128."""
    rows, columns = weight.shape
    blocks = weight.float().view(rows // 128, 128, columns // 128, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    return (blocks / scales[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn), scales


@pytest.fixture(scope="module")
def saved_fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Tensor]]:
    """An FP8 checkpoint, what transformers makes of it, and the weights that it had in memory."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("fp8", "again"))
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, dtype="bfloat16")).bfloat16()
    tensors: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if name.endswith("proj.weight"):
            tensors[name], tensors[name + "_scale_inv"] = blockwise(weight)
    quantized(model, one, tensors, FP8)
    loaded = LlamaForCausalLM.from_pretrained(one, dtype=torch.bfloat16)
    loaded.save_pretrained(two)
    return one, two, loaded.state_dict()


def test_an_fp8_checkpoint_decodes_as_transformers_loads_it(saved_fp8: Any) -> None:
    folder, _, loaded = saved_fp8
    values = decoded(fp8.find, folder, FP8)
    assert len(values) == 7
    assert all(torch.equal(value.bfloat16(), loaded[name]) for name, value in values.items())


def test_an_fp8_checkpoint_that_lost_its_config_is_decoded_all_the_same(saved_fp8: Any) -> None:
    """It was quantized anew, and quantization_config dropped: whoever believes the config reads garbage."""
    _, folder, loaded = saved_fp8
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    values = decoded(fp8.find, folder, config)
    codes = {entry.name for entry in weights(folder).values() if entry.dtype == "F8_E4M3"}
    assert set(values) == codes
    for name, value in values.items():
        assert (value - loaded[name]).norm() < loaded[name].float().norm() / 16  # E4M3: half of 2^-3


def test_experts_of_gpt_oss_decode_as_transformers_loads_them_and_are_refused_as_it_saves_them(
    tmp_path: Path,
) -> None:
    """It writes them in bfloat16 under the names of codes, without scales, and loads them no more."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"]}
    model = GptOssForCausalLM(GptOssConfig(**sizes, **heads, **experts, dtype="bfloat16")).bfloat16()
    tensors: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts_of, inputs, outputs = weight.shape
            tensors[name + "_blocks"] = random_bytes(experts_of, outputs, inputs // 32, 16)
            tensors[name + "_scales"] = random_bytes(experts_of, outputs, inputs // 32) % 8 + 118
    quantized(model, tmp_path / "one", tensors, MXFP4)
    loaded = GptOssForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.bfloat16)
    values = decoded(mx.find, tmp_path / "one", MXFP4)
    assert len(values) == 2
    assert all(torch.equal(value.bfloat16(), loaded.state_dict()[name]) for name, value in values.items())
    loaded.save_pretrained(tmp_path / "two")
    again = weights(tmp_path / "two")
    if all(entry.dtype == "U8" for name, entry in again.items() if name.endswith("_blocks")):
        pytest.skip("this transformers writes them rightly")
    with pytest.raises(
        Refused, match=r"'model.layers.0.mlp.experts.down_proj_blocks' is BF16 under the name"
    ):
        list(mx.find(again, Quantization({})))
