"""Tiny checkpoints and adapters, made of plain bytes: nothing here knows torch or our own reader."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 32, 48, 2, 64
HEADS, KV_HEADS = 4, 2
PREFIX = "base_model.model."


class Tensor(NamedTuple):
    """A tensor as a safetensors file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Tensors = Mapping[str, Tensor]


def floats(dtype: str, values: Any) -> Tensor:
    """Values as F64, F32, F16 or BF16 (cut, not rounded)."""
    array = np.asarray(values)
    if dtype == "BF16":
        stored = (np.asarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        stored = array.astype({"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype])
    return Tensor(dtype, array.shape, np.ascontiguousarray(stored).tobytes())


def safetensors_bytes(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """A well-formed safetensors file."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + len(tensor.data)
        table[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    return with_header(table, b"".join(tensor.data for tensor in tensors.values()))


def with_header(table: Any, data: bytes) -> bytes:
    """A safetensors file with whatever header: a table, or the text of one."""
    text = (table if isinstance(table, str) else json.dumps(table)).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def write_json(path: Path, table: Any) -> None:
    path.write_text(json.dumps(table, indent=2), "utf-8")


def linear_shapes(layers: int = LAYERS, hidden: int = HIDDEN) -> dict[str, tuple[int, int]]:
    """Every linear module of the tiny Llama and its (out_features, in_features)."""
    inner, kv = hidden * INTERMEDIATE // HIDDEN, hidden * KV_HEADS // HEADS
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}


def base_tensors(
    dtype: str = "BF16", seed: int = 0, layers: int = LAYERS, hidden: int = HIDDEN, tied: bool = False
) -> dict[str, Tensor]:
    """The tensors of a tiny Llama under its Hugging Face names."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    shapes |= {f"{name}.weight": shape for name, shape in linear_shapes(layers, hidden).items()}
    shapes |= {f"model.layers.{i}.{n}.weight": (hidden,) for i in range(layers) for n in _NORMS}
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, hidden)
    return {n: floats(dtype, random.standard_normal(s, np.float32) / 8) for n, s in shapes.items()}


_NORMS = ("input_layernorm", "post_attention_layernorm")


def llama_config(layers: int = LAYERS, hidden: int = HIDDEN, **changes: Any) -> dict[str, Any]:
    """config.json of the tiny Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * INTERMEDIATE // HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **changes,
    }


def write_base(
    folder: Path,
    tensors: Tensors | None = None,
    num_shards: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A checkpoint folder: one file, or shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = base_tensors() if tensors is None else tensors
    write_json(folder / "config.json", llama_config() if config is None else config)
    if num_shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
    else:
        write_shards(folder, tensors, num_shards)
    return folder


def shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_shards(folder: Path, tensors: Tensors, count: int) -> dict[str, str]:
    """Shards and index; the weight_map."""
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(1, count + 1):
        part = names[(number - 1) * len(names) // count : number * len(names) // count]
        shard = shard_name(number, count)
        (folder / shard).write_bytes(safetensors_bytes({n: tensors[n] for n in part}, {"format": "pt"}))
        weight_map |= dict.fromkeys(part, shard)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": weight_map}
    )


def adapter_tensors(
    modules: Iterable[str] | None = None,
    rank: int = 4,
    dtype: str = "F32",
    seed: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """lora_A and lora_B, as PEFT names them, for these modules (default: every q_proj and v_proj)."""
    random = np.random.default_rng(seed)
    shapes = linear_shapes() if shapes is None else shapes
    if modules is None:
        modules = [m for m in shapes if m.endswith(("q_proj", "v_proj"))]
    tensors: dict[str, Tensor] = {}
    for module in modules:
        out_features, in_features = shapes[module]
        A = random.standard_normal((rank, in_features), np.float32)
        B = random.standard_normal((out_features, rank), np.float32) / 8
        tensors[f"{PREFIX}{module}.lora_A.weight"] = floats(dtype, A)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = floats(dtype, B)
    return tensors


def lora_config(**changes: Any) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it, all of its plain fields in it."""
    return {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": "someone/tiny-llama",
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": 4,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        **changes,
    }


def write_adapter(
    folder: Path, tensors: Tensors | None = None, config: Mapping[str, Any] | None = None
) -> Path:
    """A PEFT adapter folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", lora_config() if config is None else config)
    tensors = adapter_tensors() if tensors is None else tensors
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
    return folder
