"""Formats without a decoder are refused by name, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.ground.codes import refused
from pipeline.ground.codes.code import Quantization
from pipeline.ground.errors import Refused
from tests.ground.codes.holding import held

I32, I16, U8, I8 = (
    torch.zeros(4, 4, dtype=kind) for kind in (torch.int32, torch.int16, torch.uint8, torch.int8)
)
F16, ONE = torch.ones(4, 4).half(), torch.ones(1)
SAMPLES: dict[str, dict[str, Tensor]] = {
    "EETQ": {"weight": I8, "weight_scales": F16, "bias": F16},
    "quanto": {"weight._data": U8, "weight._scale": F16, "weight._shift": F16, "input_scale": ONE},
    "bitnet": {"weight": U8, "weight_scale": ONE},
    "marlin": {"B": I32, "s": F16, "workspace": I32},
    "marlin 2:4": {"B_24": I32, "B_meta": I16, "s": F16},
    "marlin-24": {"weight_packed": I32, "scale_packed": F16, "meta": I16},
    "QQQ": {"B": I32, "s_channel": ONE, "s_group": F16},
    "AQLM": {"codes": I16, "codebooks": F16, "scales": F16},
    "HIGGS": {"weight": I16, "scales": F16, "tables": F16, "tables2": F16},
    "SpQR": {"dense_weights": I32, "row_offsets": I32, "col_vals": I32, "in_perm": I16},
    "VPTQ": {"indices": I32, "centroids.weight": F16, "weight_scale": F16, "weight_bias": F16},
    "EXL2": {"q_weight": I32, "q_scale": I32, "q_scale_max": F16, "q_groups": I16, "q_invperm": I32},
    "EXL3": {"trellis": I16, "suh": F16, "svh": F16},
    "fp_quant": {
        "qweight": U8,
        "scales": U8,
        "forward_hadamard_matrix": F16,
        "backward_hadamard_matrix": F16,
    },
    "SINQ": {"W_q": U8, "meta": U8},
    "MLX": {"weight": torch.zeros(4, 4, dtype=torch.uint32), "scales": F16, "biases": F16},
    "metal": {"weight": torch.zeros(4, 4, dtype=torch.uint32), "scales": F16, "qbiases": F16},
    "compressed-tensors' sparse bitmask": {
        "weight.compressed": F16,
        "weight.bitmask": U8,
        "weight.shape": I32,
    },
}


def layers(sample: dict[str, Tensor], count: int = 1) -> dict[str, Tensor]:
    """Some layers of a format."""
    return {
        f"model.{layer}.{name}": tensor.clone() for layer in range(count) for name, tensor in sample.items()
    }


@pytest.mark.parametrize("name", SAMPLES)
def test_a_format_without_a_decoder_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    entries = held(tmp_path, layers(SAMPLES[name], 3))
    with pytest.raises(
        Refused, match=rf"'model.0.\S+' belongs to {name} \(as do 2 more\), which is .+; (give|write)"
    ) as error:
        list(refused.find(entries, Quantization({})))
    assert len(error.value.sentences) == 1


def test_several_formats_are_refused_together(tmp_path: Path) -> None:
    entries = held(tmp_path, layers(SAMPLES["EETQ"]) | {"b.trellis": I16, "b.svh": F16})
    with pytest.raises(Refused) as error:
        list(refused.find(entries, Quantization({})))
    assert len(error.value.sentences) == 2


OTHERS: dict[str, dict[str, Tensor]] = {
    "plain": {"weight": F16, "bias": F16, "scales": F16, "meta": F16, "indices": I32, "codes": I32},
    "bnb": {"weight": I8, "SCB": ONE},
    "fp8": {"weight": torch.zeros(4, 4).to(torch.float8_e4m3fn), "weight_scale": ONE},
    "nvfp4": {"weight": U8, "weight_scale": torch.ones(4, 1).to(torch.float8_e4m3fn), "weight_scale_2": ONE},
    "quark mxfp4": {"weight": U8, "weight_scale": torch.ones(4, 1, dtype=torch.uint8)},
    "gptq": {"qweight": I32, "qzeros": I32, "scales": F16, "g_idx": I32},
    "hqq": {"W_q": U8, "scale": F16, "zero": F16, "packing": U8},
    "packed": {"weight_packed": I32, "weight_scale": F16, "weight_shape": I32},
    "a layer named B": {"B.weight": F16, "s": F16, "x_data": F16, "_scale": F16},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_has_a_decoder_or_is_plain_is_left_alone(tmp_path: Path, name: str) -> None:
    entries = held(tmp_path, layers(OTHERS[name], 2) | {"B": I32, "weight_scales": F16})
    assert list(refused.find(entries, Quantization({"quant_method": "eetq"}))) == []
