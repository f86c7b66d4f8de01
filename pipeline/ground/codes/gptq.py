"""GPTQ: columns of 2 to 8 bit codes, a scale and a zero point per group of inputs, perhaps in any order.

`qweight` I32 `(in * bits / 32, out)`: along the inputs a stream of bits (integers.py), the same for every
output; `qzeros` I32 `(groups, out * bits / 32)`: the same along the outputs; `scales` `(groups, out)`;
`g_idx` I32 `(in)`: the group of each input, or none: groups of neighbours.

    W[n, k] = scales[g, n] * (q[k, n] - z[g, n]),  g = g_idx[k]

Version 1 (`checkpoint_format` missing or gptq) stores z - 1, version 2 (gptq_v2, gptq_p) z. gptq_p holds
codes of 3, 5, 6 and 7 bits in planes: of every 32 first the low 2 or 4 bits, then the higher ones.
Sources: AutoGPTQ 0.7.1 `qlinear_cuda.py`, gptqmodel 7.7.0 `qlinear/__init__.py` and `planar_packing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.ground.codes.code import Code, Found, Quantization, Rows, read_whole
from pipeline.ground.codes.gptq_settings import bits_and_inputs, check_zeros, declared, group_size, ours
from pipeline.ground.codes.integers import scaled, unpacked
from pipeline.ground.codes.parts import Parts, by_module, sibling
from pipeline.ground.codes.reading import each, refusal
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}  # widths from the low one; others have one plane
# A one in every field: v1's zeros were made by subtracting it from whole words, so borrows are undone too.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class GPTQ(Code):
    """The codes of a linear layer; its packed words are held whole, for a row of W is a column of them."""

    bits: int
    version: int  # 1: the zero points are stored less one
    planar: bool
    group: int | None  # inputs per group; None: g_idx says
    qweight: Entry
    qzeros: Entry
    scales: Entry
    g_idx: Entry | None

    @property
    def describe(self) -> str:
        groups = "act-order" if self.group is None else f"groups of {self.group}"
        return f"GPTQ {self.bits} bit{' planar' if self.planar else ''}, {groups}"

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.qweight, self.qzeros, self.scales, *((self.g_idx,) if self.g_idx else ()))

    @property
    def state_bytes(self) -> int:
        groups, outputs = self.scales.shape
        columns = self.shape[1] * 8 if self.group is None else 0
        return self.qweight.extent.length + groups * outputs * 8 + columns

    @contextmanager
    def open(self, device: str) -> Iterator[Rows]:
        import torch

        words = read_whole(self.qweight, device)
        scales = read_whole(self.scales, device).float()
        zeros = zero_points(read_whole(self.qzeros, device), self.bits, self.version, self.planar)
        zeros = zeros[:, : scales.shape[1]]
        same = int(zeros[0, 0]) if bool((zeros == zeros[0, 0]).all()) else None  # symmetric, as a rule
        order = read_whole(self.g_idx, device).long() if self.group is None and self.g_idx else None

        def rows(start: int, stop: int) -> Tensor:
            scale = scales[:, start:stop].t()
            zero = zeros[:, start:stop].t() if same is None else None
            # the rows' words side by side first: turning them then stays in the cache
            packed = words[:, start:stop].contiguous().t().clone(memory_format=torch.contiguous_format)
            values = codes(packed, self.bits, self.planar, same or 0)[:, : self.shape[1]]
            if order is None:
                assert self.group is not None
                return scaled(values, scale, zero, self.group)
            if zero is not None:
                values = values.sub_(zero.index_select(1, order))
            return values.mul_(scale.index_select(1, order))

        yield rows


def codes(words: Tensor, bits: int, planar: bool, less: int = 0) -> Tensor:
    """The codes of rows of int32 words, `less` subtracted, float32."""
    import torch

    if not planar or bits not in PLANES:
        return unpacked(words.view(torch.uint8), bits, less)
    turns = words.view(len(words), words.shape[1] // bits, bits)  # 32 codes
    values, at, place = None, 0, 0
    for width in PLANES[bits]:
        plane = turns[:, :, at : at + width].clone(memory_format=torch.contiguous_format)
        part = unpacked(plane.flatten(1).view(torch.uint8), width, 0 if at else less)
        values = part if values is None else values.add_(part, alpha=float(2**place))
        at, place = at + width, place + width
    assert values is not None
    return values


def zero_points(words: Tensor, bits: int, version: int, planar: bool) -> Tensor:
    """The zero points `(groups, outputs)` float32 of `qzeros`."""
    if version == 1 and bits in _ONES:
        words = words + _ONES[bits]
    zeros = codes(words, bits, planar)
    return zeros.add_(1) if version == 1 and bits not in _ONES else zeros


def find(tensors: Mapping[str, Entry], quantization: Quantization) -> Iterator[Found]:
    """Modules with `qweight`, `qzeros` and `scales` in GPTQ's shapes, with `g_idx` or without."""
    settings = {**quantization.beside, **quantization.config}
    modules = {p["qweight"].name: p for p in by_module(tensors).values() if "qweight" in p}

    def found(main: Entry) -> Found | None:
        parts = modules[main.name]
        if not ours(parts, settings):
            return None
        return Found(sibling(main, "weight"), _code(main, parts, settings), main)

    yield from each((parts["qweight"] for parts in modules.values()), found)


def _code(main: Entry, parts: Parts, settings: Mapping[str, Any]) -> GPTQ:
    if missing := [part for part in ("qzeros", "scales") if part not in parts]:
        raise refusal(main, f"stands without its {' and '.join(missing)}")
    if strange := sorted(set(parts) - {"qweight", "qzeros", "scales", "g_idx", "bias"}):
        raise refusal(main, f"stands beside '{strange[0]}', which no GPTQ layer has and may change it")
    layer = main.name.split(".")[-2:][0]
    if "embed" in layer or layer == "wte":
        raise refusal(main, "is a GPTQ embedding, which is laid out otherwise; give the model in 16 bits")
    version, planar = declared(settings)
    qzeros, scales, g_idx = parts["qzeros"], parts["scales"], parts.get("g_idx")
    bits, inputs = bits_and_inputs(parts, planar, settings)
    group = group_size(main, inputs, scales.shape[0], g_idx, settings)
    check_zeros(qzeros, bits, version, settings)
    return GPTQ((scales.shape[1], inputs), bits, version, planar, group, main, qzeros, scales, g_idx)
