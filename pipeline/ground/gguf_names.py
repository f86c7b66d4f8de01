"""What llama.cpp renamed, permuted and shifted when it wrote a GGUF file, and how to undo it.

Names: `gguf.get_tensor_name_map`. Values: `modify_tensors` in llama.cpp's `conversion/llama.py` and
`conversion/gemma.py`; transformers' `modeling_gguf_pytorch_utils.py` undoes the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.ground.errors import Refused

if TYPE_CHECKING:
    from torch import Tensor


class Transform(Protocol):
    """What to do with decoded rows `(n * grain, columns)`; a vector comes as one row `(1, columns)`."""

    @property
    def grain(self) -> int:
        """The number of rows that must stay together."""

    def __call__(self, tile: Tensor) -> Tensor:
        """The rows as the Hugging Face checkpoint has them: same shape, same dtype."""


@dataclass(frozen=True, slots=True)
class HeadPermutation:
    """Puts the rows of each attention head back in order.

    llama.cpp rotates neighbours (0, 1), (2, 3), ..; Hugging Face rotates the i-th row of a head's first
    half with the i-th of its second half. A bias is one row, permuted along its columns.
    """

    head_dim: int
    bias: bool = False

    @property
    def grain(self) -> int:
        return 1 if self.bias else self.head_dim

    def __call__(self, tile: Tensor) -> Tensor:
        columns = 1 if self.bias else tile.shape[1]
        pairs = tile.reshape(tile.numel() // (self.head_dim * columns), self.head_dim // 2, 2, columns)
        return pairs.transpose(1, 2).reshape(tile.shape)


@dataclass(frozen=True, slots=True)
class AddConstant:
    """Adds a constant: Gemma multiplies by 1 + weight, and its files hold the sum."""

    constant: float

    @property
    def grain(self) -> int:
        return 1

    def __call__(self, tile: Tensor) -> Tensor:
        return tile + self.constant


_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LINEAR = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FUSED_LINEAR = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_NORMS_AROUND = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# architecture: its modules within a block
_MODULES: dict[str, dict[str, str]] = {
    "llama": _LINEAR | _NORMS,  # Llama, Mistral, SmolLM and SmolLM2
    "qwen2": _LINEAR | _NORMS,
    "qwen3": _LINEAR | _NORMS | _HEAD_NORMS,
    "gemma": _LINEAR | _NORMS,
    "gemma2": _LINEAR | _NORMS_AROUND,
    "gemma3": _LINEAR | _NORMS_AROUND | _HEAD_NORMS,
    "phi3": _FUSED_LINEAR | _NORMS,
}
_WITH_SHIFTED_NORMS = {"gemma", "gemma2", "gemma3"}
_WITH_PERMUTED_HEADS = {"llama"}

_IN_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]*)\.(\w+)\.(weight|bias)")
_DERIVED = re.compile(
    r"rope_(freqs|factors_long|factors_short)\.weight|blk\.[0-9]+\.attn_rot_embd(\.weight)?"
)

known_architectures: tuple[str, ...] = tuple(_MODULES)


def hugging_face_name(architecture: str, gguf_name: str) -> str | None:
    """The name in the Hugging Face checkpoint; None for rotary tables, which its config holds instead.

    Refused for an unknown architecture and for any other tensor that has no counterpart.
    """
    if architecture not in _MODULES:
        choices = ", ".join(known_architectures)
        raise Refused(
            f"GGUF architecture '{architecture}' is not supported; choose a file with one of {choices}"
        )
    if _DERIVED.fullmatch(gguf_name):
        return None
    if gguf_name in _OUTSIDE:
        return _OUTSIDE[gguf_name]
    if found := _IN_BLOCK.fullmatch(gguf_name):
        block, module, kind = found.groups()
        if module in _MODULES[architecture] and not (kind == "bias" and module.endswith("norm")):
            return f"model.layers.{block}.{_MODULES[architecture][module]}.{kind}"
    raise Refused(f"tensor '{gguf_name}' of GGUF architecture '{architecture}' has no Hugging Face name")


def transform(architecture: str, gguf_name: str, metadata: Mapping[str, object]) -> Transform | None:
    """How to undo what llama.cpp did to the values of a tensor; None where it left them alone.

    Refused if the metadata do not give the head size of a permuted tensor.
    """
    if architecture in _WITH_SHIFTED_NORMS and gguf_name.endswith("norm.weight"):
        return AddConstant(-1.0)
    if architecture in _WITH_PERMUTED_HEADS and (".attn_q." in gguf_name or ".attn_k." in gguf_name):
        return HeadPermutation(_head_dim(architecture, metadata), bias=gguf_name.endswith(".bias"))
    return None


def _head_dim(architecture: str, metadata: Mapping[str, object]) -> int:
    """As llama.cpp reads it: the key length, or else the embedding shared out among the heads."""
    key_length = metadata.get(f"{architecture}.attention.key_length")
    width = metadata.get(f"{architecture}.embedding_length")
    heads = metadata.get(f"{architecture}.attention.head_count")
    if isinstance(heads, Sequence) and heads:
        heads = heads[0]
    if key_length is None and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        key_length = width // heads
    if not isinstance(key_length, int) or key_length < 2 or key_length % 2:
        raise Refused(
            f"GGUF metadata give no even head size: {architecture}.attention.key_length is {key_length!r}, "
            f"{architecture}.embedding_length is {width!r}, {architecture}.attention.head_count is {heads!r}"
        )
    return key_length
