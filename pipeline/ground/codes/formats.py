"""All formats of codes, and which weights of a checkpoint are held in which."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pipeline.ground.codes import (
    awq,
    bnb4,
    bnb8,
    compressed_tensors,
    fp8,
    gptq,
    hqq,
    mx,
    nvfp4,
    refused,
    torchao,
)
from pipeline.ground.codes.code import Finder, Found, Quantization
from pipeline.ground.errors import Refused, each_once
from pipeline.ground.shards import Entry

FINDERS: tuple[Finder, ...] = (
    bnb4.find,
    bnb8.find,
    fp8.find,
    nvfp4.find,
    mx.find,
    compressed_tensors.find,
    gptq.find,
    awq.find,
    hqq.find,
    torchao.find,
    refused.find,
)

# What only quantized checkpoints hold: left over, it would be a scale that no decoder has used.
_TRACES = re.compile(
    r"(.*\.)?(pre_quant_scale|svdquant_lora_\w+|\w+_weight_scale(_2)?|qweight|qzeros|g_idx|scales|SCB|weight_format|absmax|quant_map|nested_absmax|nested_quant_map|"
    r"quant_state\.\w+|weight_scale(_inv|_2)?|weight_packed|weight_shape|weight_zero_point|weight_global_scale|"
    r"\w+_blocks|\w+_scales|\w+_scale_inv|qscale_weight|W_q|_weight_qdata|_weight_scale|_weight_zero_point)"
)
_LISTED = 20  # names of them in one sentence
# Scales of activations, which say nothing of the weights and go with the codes.
_OF_ACTIVATIONS = re.compile(
    r"(.*\.)?(qscale_act|\w+_activation_scale|\w+_input_scale|input_scale|activation_scale|output_scale|input_global_scale|input_zero_point|output_zero_point|"
    r"input_activations\.\w+|[kqv]_scale|k_proj\.output_scale|v_proj\.output_scale|kv_cache_scaling_factor)"
)


def detect(
    tensors: Mapping[str, Entry], quantization: Quantization
) -> tuple[list[Found], Mapping[str, Entry], list[str]]:
    """(weights held as codes, plain tensors, tensors that go with the codes); Refused for what is neither.

    Names, dtypes and shapes decide; the config is asked second. In a checkpoint of mixed formats every
    finder takes its own.
    """
    rest = dict(tensors)
    found: list[Found] = []
    wrong: list[str] = []
    for finder in FINDERS:
        try:
            new = list(finder(rest, quantization))
        except Refused as refusal:
            wrong += refusal.sentences
            continue
        found += new
        used = {entry.name for f in new for entry in f.code.entries}
        rest = {name: entry for name, entry in rest.items() if name not in used}
    dropped = []
    if found or quantization.config:
        dropped = [name for name in rest if _OF_ACTIVATIONS.fullmatch(name)]
        rest = {name: entry for name, entry in rest.items() if name not in set(dropped)}
    if found and (twice := [f.name for f in found if f.name in rest]):
        wrong.append(f"{twice[0]}: stands both as codes and as plain numbers ({len(twice)} weights)")
    if not wrong and (left := [name for name in rest if _TRACES.fullmatch(name)]):
        more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
        wrong.append(
            f"{', '.join(left[:_LISTED])}{more}: of quantized weights that no decoder here understands "
            f"({len(left)} such tensors; quant_method {quantization.config.get('quant_method')!r})"
        )
    if wrong:
        raise Refused(*each_once(wrong))
    return found, rest, dropped
