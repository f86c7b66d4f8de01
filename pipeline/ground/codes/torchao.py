"""torchao's int8, float8 and intx tensors: plain codes, and scales of blocks of any shape.

What a weight X.weight is, its shard's metadata say under that name: JSON of `_type`, and `_data` with
block_size and dtype. Its tensors are X._weight_qdata, I8 or F8 in the weight's shape, X._weight_scale, a
number per block, and for integers X._weight_zero_point or none.

    Int8Tensor, IntxUnpackedToInt8Tensor    W = (qdata - zero_point) * scale
    Float8Tensor                            W = qdata * scale

rounded to the dtype of the metadata; real-valued zero points are subtracted in that dtype already, as torchao
does. Sources: torchao 0.18.0 `safetensors_support.py`, `_dequantize_affine`, `_dequantize_affine_float8`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from pipeline.ground.codes.code import Code, Found, Quantization, Rows, read_whole
from pipeline.ground.codes.integers import scaled
from pipeline.ground.codes.parts import named
from pipeline.ground.codes.reading import each, reading, refusal, told
from pipeline.ground.codes.small_floats import byte_values, looked_up
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

_INTEGERS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
_CODES = {**dict.fromkeys(_INTEGERS, ("I8",)), "Float8Tensor": ("F8_E4M3", "F8_E5M2")}
_OF_INPUTS = ("act_quant_scale", "act_quant_zero_point", "act_pre_scale")
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_FLOATS = frozenset(_DTYPES.values())


@dataclass(frozen=True)
class TorchAO(Code):
    """Codes in the shape of the weight, and a scale for each block."""

    kind: str
    dtype: str  # what torchao decodes to
    block: tuple[int, ...]
    codes: Entry
    scale: Entry
    zero: Entry | None
    inputs: tuple[Entry, ...]  # scales of the inputs, which say nothing of the weight

    @property
    def describe(self) -> str:
        return f"torchao {self.kind.removesuffix('Tensor')}, blocks of {'x'.join(map(str, self.block))}"

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.codes, self.scale, *((self.zero,) if self.zero else ()), *self.inputs

    @property
    def state_bytes(self) -> int:
        return 4 * prod(self.scale.shape) * (2 if self.zero else 1)

    @contextmanager
    def open(self, device: str) -> Iterator[Rows]:
        import torch

        columns, across = self.shape[-1], self.shape[-1] // self.block[-1]
        scales = read_whole(self.scale, device).float().view(-1, across)
        zeros = read_whole(self.zero, device).float().view(-1, across) if self.zero else None
        rounds = self.zero is not None and self.zero.dtype != "I8"
        values_of = None if self.kind in _INTEGERS else byte_values(self.codes.dtype, device)
        with reading(device, self.codes) as (read,):

            def rows(start: int, stop: int) -> Tensor:
                raw = read(start * columns, stop * columns).view(stop - start, columns)
                values = raw.view(torch.int8).float() if values_of is None else looked_up(values_of, raw)
                line = self._lines(torch.arange(start, stop, device=device))
                scale, zero = (None if s is None else s.index_select(0, line) for s in (scales, zeros))
                assert scale is not None
                if rounds and zero is not None:
                    values = values.sub_(zero.repeat_interleave(self.block[-1], 1))
                    values, zero = values.to(torch_dtype(self.dtype)).float(), None
                return scaled(values, scale, zero, self.block[-1])

            yield rows

    def _lines(self, row: Tensor) -> Tensor:
        """The line of scales of each row, rows running over all dimensions but the last."""
        line, span, lines = row * 0, 1, 1
        for size, block in reversed([*zip(self.shape[:-1], self.block[:-1], strict=True)]):
            line += row // span % size // block * lines
            span, lines = span * size, lines * (size // block)
        return line


def find(tensors: Mapping[str, Entry], quantization: Quantization) -> Iterator[Found]:
    """Every `X._weight_qdata`; what it is stands in the metadata under X.weight."""
    mains = [entry for name, entry in tensors.items() if name.endswith("_qdata") and "._" in f".{name}"]

    def found(main: Entry) -> Found:
        module, _, last = f".{main.name.removesuffix('_qdata')}".rpartition("._")
        name = f"{module}.{last}".lstrip(".")
        return Found(name, _code(main, name, tensors, quantization.metadata), main)

    yield from each(mains, found)


def _code(main: Entry, name: str, tensors: Mapping[str, Entry], metadata: Mapping[str, str]) -> TorchAO:
    kind, data = _described(metadata.get(name, ""))
    if not kind:
        raise refusal(main, f"has no description in the metadata of the shards, under '{name}'")
    if kind not in _CODES:
        raise refusal(
            main, f"is torchao's {kind}; only {', '.join(_CODES)} can be decoded; give it in 16 bits"
        )
    prefix = main.name.removesuffix("qdata")
    parts = {part: e for part in ("scale", "zero_point", *_OF_INPUTS) if (e := tensors.get(prefix + part))}
    if smooth := parts.get("act_pre_scale"):
        raise refusal(smooth, "scales the inputs (SmoothQuant, AWQ), which a weight cannot say")
    block, dtype = data.get("block_size"), data.get("dtype")
    dtype = _DTYPES.get(str(dtype.get("_data"))) if isinstance(dtype, dict) else None
    if dtype and "scale" in parts and main.dtype in _CODES[kind] and len(main.shape) > 1:
        scale, zero = parts["scale"], parts.get("zero_point")
        sizes = _blocks(main.shape, scale.shape)
        plain = scale.dtype in _FLOATS and (kind in _INTEGERS or not zero)
        alike = zero is None or (zero.dtype in {"I8", *_FLOATS} and zero.shape == scale.shape)
        if plain and alike and sizes and block in (None, [], list(sizes)):
            inputs = tuple(parts[part] for part in _OF_INPUTS if part in parts)
            return TorchAO(main.shape, kind, dtype, sizes, main, scale, zero, inputs)
    raise refusal(main, f"does not fit together as {kind} of blocks {block}: {told(main)}, {named(parts)}")


def _described(text: str) -> tuple[str, Mapping[str, Any]]:
    """(type, its numbers) of a weight's entry in the metadata; ("", {}) if that is none."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        return "", {}
    kind, data = (table.get("_type"), table.get("_data")) if isinstance(table, dict) else (None, None)
    return str(kind or ""), data if isinstance(data, dict) else {}


def _blocks(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    """The block of each scale, () if scales of this shape do not cut the weight evenly."""
    scales = (1,) * len(shape) if prod(scales) == 1 else scales
    if len(scales) != len(shape) or any(
        0 in (n, size) or size % n for size, n in zip(shape, scales, strict=True)
    ):
        return ()
    return tuple(size // n for size, n in zip(shape, scales, strict=True))
