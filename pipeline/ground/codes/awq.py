"""AWQ: 4 bit codes in groups of inputs with zero points, packed for one of two kernels.

gemm: `qweight` I32 `(in, out / 8)`, `qzeros` I32 `(groups, out / 8)`, `scales` `(groups, out)`; the i-th
nibble of a word, the lowest first, is output 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i].
gemv: `qweight` I32 `(out, in / 8)`, a stream of nibbles, `qzeros` I32 `(out, p)` likewise, `scales`
`(out, 8 p)`; both are filled up at the end of a row.

    W[n, k] = (q[n, k] - z[n, g]) * scales[n, g],  g = k // group

AWQ has folded scales of its inputs into the layers before: these weights fit no other model, not even the
one in 16 bits that they were made from.
Sources: AutoAWQ 0.2.9 `packing_utils.py` and `linear/gemv.py`; AutoRound's auto_round:auto_awq is gemm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from pipeline.ground.codes.code import Code, Found, Quantization, Rows, read_whole
from pipeline.ground.codes.integers import scaled, unpacked
from pipeline.ground.codes.parts import Parts, by_module, mentioned, named, sibling
from pipeline.ground.codes.reading import each, num_bytes, reading, refusal
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

# The bits of 2^(23 - 4 i) in float32: a nibble that lies 4 i bits up is then the last of its integer part.
_POWERS = (0x4B000000, 0x49000000, 0x47000000, 0x45000000)
_KERNELS = {"gemv_fast", "gemvfast", "llm-awq", "marlin"}
_DTYPES = {("I32", "I32", scales) for scales in ("F16", "BF16", "F32")}


@dataclass(frozen=True)
class _AWQ(Code):
    group: int  # inputs that share a scale
    qweight: Entry
    qzeros: Entry
    scales: Entry

    @property
    def describe(self) -> str:
        return f"AWQ {type(self).__name__.lower()} 4 bit, groups of {self.group}"

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.qweight, self.qzeros, self.scales


@dataclass(frozen=True)
class Gemm(_AWQ):
    """Packed along the outputs: eight rows of W are a column of words, so the words are held whole."""

    @property
    def grain(self) -> int:
        return 8

    @property
    def state_bytes(self) -> int:
        # the words twice, while they are turned; scales and zero points in float32
        return 2 * self.qweight.extent.length + 8 * prod(self.scales.shape)

    @contextmanager
    def open(self, device: str) -> Iterator[Rows]:
        # turned as a whole: of a tile's few columns every row of words would be a cache line for some bytes
        words = turned(read_whole(self.qweight, device))
        scale = turned(read_whole(self.scales, device)).float()
        zero = interleaved(turned(read_whole(self.qzeros, device)))

        def rows(start: int, stop: int) -> Tensor:
            assert start % 8 == 0, f"row {start} lies within a word"
            values = interleaved(words[start // 8 : -(-stop // 8)])[: stop - start]
            return scaled(values, scale[start:stop], zero[start:stop], self.group)

        yield rows


def turned(matrix: Tensor) -> Tensor:
    """Its transpose, with rows that lie side by side."""
    import torch

    return matrix.t().clone(memory_format=torch.contiguous_format)


def interleaved(words: Tensor) -> Tensor:
    """Nibbles of int32 words `(outputs / 8, inputs)` in gemm's order, each plus a power of two: float32.

    Outputs 0, 2, 4, 6 are the nibbles of a word's low half, 1, 3, 5, 7 those of its high one. Nibble i of a
    half is masked out where it lies, as digits of a float32 that is 2^(23 - 4 i) more. The same power stands
    in zero points, so that codes less zero points come out exact, without shifting or converting any code.
    """
    import torch

    halves = torch.stack([words, words >> 16], 1).bitwise_or_(0x4F000000)  # all bits of the powers
    return (halves[:, None] & _masks(str(words.device))).view(torch.float32).flatten(0, 2)


@lru_cache(maxsize=8)
def _masks(device: str) -> Tensor:
    """What of a half is nibble i and its power, `(4, 1, 1)` int32."""
    import torch

    masks = [15 << 4 * place | power for place, power in enumerate(_POWERS)]
    return torch.tensor(masks, dtype=torch.int32, device=device)[:, None, None]


@dataclass(frozen=True)
class Gemv(_AWQ):
    """Packed along the inputs: rows of W are rows of words."""

    @contextmanager
    def open(self, device: str) -> Iterator[Rows]:
        kind, groups = torch_dtype(self.scales.dtype), self.shape[1] // self.group
        widths = [entry.shape[1] * num_bytes(entry) for entry in self.entries]
        with reading(device, *self.entries) as readers:

            def rows(start: int, stop: int) -> Tensor:
                codes, zeros, scales = (
                    read(start * width, stop * width).view(stop - start, width)
                    for read, width in zip(readers, widths, strict=True)
                )
                scale, zero = scales.view(kind)[:, :groups].float(), unpacked(zeros, 4)[:, :groups]
                return scaled(unpacked(codes, 4), scale, zero, self.group)

            yield rows


def find(tensors: Mapping[str, Entry], quantization: Quantization) -> Iterator[Found]:
    """Modules with `qweight`, `qzeros` and `scales`, but no `g_idx`, in AWQ's shapes."""
    settings = {**quantization.beside, **quantization.config}
    modules = {
        p["qweight"].name: p for p in by_module(tensors).values() if "qweight" in p and "g_idx" not in p
    }

    def found(main: Entry) -> Found | None:
        code = _code(main, modules[main.name], settings)
        return Found(sibling(main, "weight"), code, main) if code else None

    yield from each((parts["qweight"] for parts in modules.values()), found)


def _code(main: Entry, parts: Parts, settings: Mapping[str, Any]) -> Code | None:
    kernel = str(settings.get("version") or settings.get("format") or "gemm").lower()
    awq = "awq" in f"{settings.get('quant_method')} {settings.get('packing_format')}".lower()
    if main.dtype == "I16" and ("scaled_zeros" in parts or parts.get("qzeros", main).dtype == "F16"):
        kernel, awq = "llm-awq" if "scaled_zeros" in parts else "gemv_fast", True
    if awq and kernel in _KERNELS:
        raise refusal(
            main, f"is AWQ packed for {kernel} kernels alone; give the same model's gemm checkpoint"
        )
    code = None
    if {"qzeros", "scales"} <= set(parts):
        qzeros, scales = parts["qzeros"], parts["scales"]
        said = mentioned(settings, "group_size", "q_group_size")
        flat = 0 not in main.shape and len(main.shape) == len(qzeros.shape) == len(scales.shape) == 2
        if flat and (main.dtype, qzeros.dtype, scales.dtype) in _DTYPES:
            code = _gemm(main, qzeros, scales, said) or (_gemv(main, qzeros, scales, said) if awq else None)
    if code and (strange := sorted(set(parts) - {"qweight", "qzeros", "scales", "bias"})):
        raise refusal(main, f"stands beside '{strange[0]}', which no AWQ layer has and may change it")
    if awq and not code:
        raise refusal(main, f"does not fit together as AWQ of 4 bits, gemm or gemv: {named(parts)}")
    return code


def _gemm(qweight: Entry, qzeros: Entry, scales: Entry, said: list[int]) -> Gemm | None:
    (inputs, columns), (groups, outputs) = qweight.shape, scales.shape
    if qzeros.shape != (groups, columns) or outputs != 8 * columns or not groups or inputs % groups:
        return None
    group = inputs // groups
    if said and group not in said and not (groups == 1 and -1 in said):
        return None
    return Gemm((outputs, inputs), group, qweight, qzeros, scales)


def _gemv(qweight: Entry, qzeros: Entry, scales: Entry, said: list[int]) -> Gemv | None:
    outputs, inputs, words = qweight.shape[0], qweight.shape[1] * 8, qzeros.shape[1]
    groups = {inputs if group == -1 else group for group in said}
    fitting = [g for g in groups if g >= 16 and inputs % g == 0 and _zero_words(inputs // g, g) == words]
    if len(fitting) != 1 or qzeros.shape[0] != outputs or scales.shape != (outputs, 8 * words):
        return None
    return Gemv((outputs, inputs), fitting[0], qweight, qzeros, scales)


def _zero_words(groups: int, group: int) -> int:
    """Words of zero points in a row of gemv; small groups need a multiple of 128 / group."""
    words, multiple = -(-groups // 8), max(128 // group, 1)
    return -(-words // multiple) * multiple
