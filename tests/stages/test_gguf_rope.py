"""Llama 3's rotary scaling survives the way through a GGUF file, or the file is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline.ground.errors import Refused
from pipeline.ground.gguf import read_gguf
from pipeline.ground.gguf_rope import rope_parameters

PARAMETERS = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def factors(**changed: float) -> torch.Tensor:
    """By transformers: the plain frequencies over the scaled ones."""
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters={**PARAMETERS, **changed}
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2).float() / 128)
    return (plain / scaled).float()


def write(path: Path, table: torch.Tensor | None, scaling: str | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_rope_freq_base(500000.0)
    if scaling:
        writer.add_string("llama.rope.scaling.type", scaling)
    writer.add_tensor("token_embd.weight", torch.ones(4, 32).numpy())
    if table is not None:
        writer.add_tensor("rope_freqs.weight", table.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised(tmp_path: Path, factor: float) -> None:
    header = read_gguf(write(tmp_path / "x.gguf", factors(factor=factor)))
    assert rope_parameters(header) == {**PARAMETERS, "factor": factor}


def test_no_scaling_says_nothing(tmp_path: Path) -> None:
    assert rope_parameters(read_gguf(write(tmp_path / "x.gguf", None))) is None
    assert rope_parameters(read_gguf(write(tmp_path / "y.gguf", torch.ones(64)))) is None


def test_any_other_scaling_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="is not the scaling of Llama 3"):
        rope_parameters(read_gguf(write(tmp_path / "x.gguf", factors(low_freq_factor=2.0))))
    with pytest.raises(Refused, match=r"llama.rope.scaling.type is 'yarn'"):
        rope_parameters(read_gguf(write(tmp_path / "y.gguf", None, "yarn")))
