"""C3A: delta = blocks of circulant matrices / in (Chen et al. 2024, arXiv:2407.19342).

Block (e, f) of size b holds kernel[e, f, (q - p) mod b] at row p, column q. Taken as it is, where PEFT
finds it by FFT, rounds it to the base's dtype and divides then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.ground.deltas.delta import Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.fields import wrong_values
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class C3a(Delta):
    """`kernel` (out / b, in / b, b)."""

    kernel: Entry

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.kernel,)

    def describe(self, factor: float) -> str:
        return f"C3A block {self.kernel.shape[2]}" + (f" times {factor:g}" if factor != 1 else "")

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        import torch

        kernel = read_entry(self.kernel, device, dtype)
        blocks, b = kernel.shape[1:]
        kernel = kernel / (blocks * b) * factor
        column = torch.arange(b, device=device)

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            row = torch.arange(start, stop, device=device)
            shifted = (column - row[:, None]) % b
            return kernel[row // b].gather(2, shifted[:, None].expand(-1, blocks, -1)).flatten(1)

        yield rows


def read(trained: Trained) -> list[Delta]:
    """The delta of one module."""
    kernel, config = trained["c3a_kernel"], trained.config
    check_floats(trained, kernel)
    sizes = check_shapes(trained, {"c3a_kernel": ("m", "n", "b")})
    told = [config["block_size"], *(config.get("block_size_pattern") or {}).values()]
    if sizes["b"] not in told:
        raise trained.refuse(f"has blocks of {sizes['b']}, but the config says {' or '.join(map(str, told))}")
    return [C3a(trained.module, "weight", (sizes["m"] * sizes["b"], sizes["n"] * sizes["b"]), kernel)]


def _wrong(config: Mapping[str, Any]) -> list[str]:
    return wrong_values(config, counts=["block_size"], patterns={"block_size_pattern": True})


KIND = Kind(
    peft_type="C3A",
    tensors=("c3a_kernel",),
    fields=frozenset({"block_size", "block_size_pattern", "init_weights"}),
    read=read,
    wrong=_wrong,
)
