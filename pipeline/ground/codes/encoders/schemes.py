"""The formats a model may be quantized to: the encoder of a weight, and what config.json says of it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.ground.codes.code import Code
from pipeline.ground.codes.encoders.bnb4 import Bnb4Encoder
from pipeline.ground.codes.encoders.bnb8 import Bnb8Encoder
from pipeline.ground.codes.encoders.encoder import Encoder, Part
from pipeline.ground.codes.encoders.fp8 import Fp8Encoder, Way
from pipeline.ground.codes.encoders.integers import PackedEncoder
from pipeline.ground.codes.encoders.linear import endings
from pipeline.ground.codes.encoders.same import same_format
from pipeline.ground.codes.scale_grid import Grid
from pipeline.ground.dtypes import config_name

_BLOCK = 128
_SCALES = ("BF16", "F16", "F32")  # dtypes that scales may have


@dataclass(frozen=True)
class Scheme(ABC):
    """A format by the name that a recipe gives it."""

    name: str

    experts: ClassVar[bool]
    """Whether loaders take experts quantized that files hold one by one."""
    by_chance: ClassVar[bool] = False
    """Whether its codes can be rounded stochastically."""

    @abstractmethod
    def encoder(self, name: str, shape: tuple[int, ...], dtype: str) -> Encoder | None:
        """The codes of a weight that would else be of `dtype`; None where the format has no such shape."""

    @abstractmethod
    def config(self, dtype: str, skipped: Sequence[str], quantized: Sequence[str]) -> dict[str, Any]:
        """quantization_config; `skipped` are modules that are left as they are."""


class Bnb(Scheme):
    """bitsandbytes: nf4, nf4-dq, fp4 and int8."""

    experts: ClassVar[bool] = False

    def encoder(self, name: str, shape: tuple[int, ...], dtype: str) -> Encoder | None:
        if self.name == "int8":
            return Bnb8Encoder(name, shape)
        kind, _, nested = self.name.partition("-")
        return Bnb4Encoder(name, shape, kind, 64, bool(nested), config_name(dtype))

    def config(self, dtype: str, skipped: Sequence[str], quantized: Sequence[str]) -> dict[str, Any]:
        kind, _, nested = self.name.partition("-")
        four = kind != "int8"
        more = {
            "bnb_4bit_compute_dtype": config_name(dtype),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": bool(nested),
        }
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            **(more if four else {"llm_int8_threshold": 6.0}),
            "llm_int8_skip_modules": endings(skipped, quantized),
        }


class Fp8Block(Scheme):
    """E4M3 with a float32 scale for every block of 128 x 128, as DeepSeek and transformers have it."""

    experts: ClassVar[bool] = True
    by_chance: ClassVar[bool] = True

    def encoder(self, name: str, shape: tuple[int, ...], dtype: str) -> Encoder | None:
        rows, columns = shape
        down, across = -(-rows // _BLOCK), -(-columns // _BLOCK)
        grid = Grid(rows, down, across, _BLOCK, _BLOCK)
        scale = Part(f"{name}_scale_inv", "F32", (down, across))
        return Fp8Encoder(name, shape, grid, Way.transformers, scale)

    def config(self, dtype: str, skipped: Sequence[str], quantized: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [_BLOCK, _BLOCK],
            "modules_to_not_convert": list(skipped),
        }


class CompressedTensors(Scheme):
    """fp8-channel (float-quantized, activations quantized on the fly) and int4-g128 (pack-quantized)."""

    experts: ClassVar[bool] = True

    @property
    def _float(self) -> bool:
        return self.name == "fp8-channel"

    def encoder(self, name: str, shape: tuple[int, ...], dtype: str) -> Encoder | None:
        rows, columns = shape
        if self._float:
            grid, scale = Grid(rows, rows, 1, 1, columns), Part(f"{name}_scale", dtype, (rows, 1))
            return Fp8Encoder(name, shape, grid, Way.compressed_tensors, scale)
        return PackedEncoder(name, shape, 4, _BLOCK, dtype) if columns % _BLOCK == 0 else None

    def config(self, dtype: str, skipped: Sequence[str], quantized: Sequence[str]) -> dict[str, Any]:
        shared = {"num_bits": 8, "type": "float", "symmetric": True}
        weights = {**shared, "strategy": "channel", "dynamic": False}
        activations: dict[str, Any] | None = {**shared, "strategy": "token", "dynamic": True}
        if not self._float:
            weights |= {"num_bits": 4, "type": "int", "strategy": "group", "group_size": _BLOCK}
            activations = None
        group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized" if self._float else "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {**group, "output_activations": None}},
            "ignore": [f"re:.*{re.escape(tail)}$" for tail in endings(skipped, quantized)],
            "kv_cache_scheme": None,
        }


class Fp8Channel(CompressedTensors):
    by_chance: ClassVar[bool] = True


SCHEMES: dict[str, Scheme] = {
    **{name: Bnb(name) for name in ("nf4", "nf4-dq", "fp4", "int8")},
    "fp8-block": Fp8Block("fp8-block"),
    "fp8-channel": Fp8Channel("fp8-channel"),
    "int4-g128": CompressedTensors("int4-g128"),
}


def written_anew(name: str, code: Code) -> Encoder | None:
    """What save.quantize makes such codes with, all scales found anew; None where it makes none like them."""
    encoder = same_format(name, code)
    if isinstance(encoder, Bnb4Encoder | Bnb8Encoder):
        return encoder
    held = {(e.name, e.dtype, e.shape) for e in code.entries}
    made = (s.encoder(name, code.shape, d) for s in SCHEMES.values() for d in _SCALES if len(code.shape) == 2)
    return next((e for e in made if e and {(p.name, p.dtype, p.shape) for p in e.parts} == held), None)
