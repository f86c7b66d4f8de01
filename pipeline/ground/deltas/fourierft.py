"""FourierFT: delta = scaling * real(ifft2(S)), S sparse (Gao et al. 2024, arXiv:2405.03003).

S (out, in) holds the spectrum at places that a seed draws. The inverse transform is taken over the outputs
as the sum that it is, row by row, and by FFT over the inputs: in complex128 on the CPU, so a row needs no
other. (PEFT transforms the whole matrix in complex64.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import pi, prod
from typing import TYPE_CHECKING, Any

from pipeline.ground.deltas.delta import UNKNOWN, Base, Delta, RowsOf, read_entry
from pipeline.ground.deltas.fields import wrong_values
from pipeline.ground.deltas.kind import Kind, Trained, check_floats, check_shapes
from pipeline.ground.dtypes import torch_dtype
from pipeline.ground.shards import Entry

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 64  # rows that are transformed at a time


@dataclass(frozen=True)
class FourierFt(Delta):
    """`spectrum` (n,)."""

    spectrum: Entry
    scaling: float
    seed: int

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.spectrum,)

    @property
    def state_bytes(self) -> int:
        columns = self.num_columns + self.spectrum.shape[0]
        return super().state_bytes + 8 * prod(self.shape) + 3 * 16 * _BLOCK * columns

    def describe(self, factor: float) -> str:
        return f"FourierFT {self.spectrum.shape[0]} frequencies scaling {self.scaling * factor:g}"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) == 2 and prod(shape) < self.spectrum.shape[0]:
            return f"has {self.spectrum.shape[0]} frequencies, more than a weight {list(shape)} has"
        return super().misfit(shape) if len(shape) == 2 else "was made for a matrix"

    @contextmanager
    def open(self, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
        import torch

        outputs, inputs = self.shape
        spectrum = read_entry(self.spectrum, "cpu", "F64") * (self.scaling * factor / outputs)
        generator = torch.Generator().manual_seed(self.seed)
        at = torch.randperm(outputs * inputs, generator=generator)[: len(spectrum)].clone()
        row, column = at // inputs, at % inputs

        def block(start: int, stop: int) -> Tensor:
            turns = torch.arange(start, stop)[:, None] * row % outputs  # exact: an angle in whole steps
            values = torch.polar(spectrum.expand(turns.shape), turns.double() * (2 * pi / outputs))
            over = torch.zeros(stop - start, inputs, dtype=torch.complex128)
            return torch.fft.ifft(over.index_add_(1, column, values), dim=1).real

        def rows(start: int, stop: int, W: Tensor) -> Tensor:
            blocks = [block(at, min(at + _BLOCK, stop)) for at in range(start, stop, _BLOCK)]
            return torch.cat(blocks).to(torch_dtype(dtype)).to(device)

        yield rows


def read(trained: Trained) -> list[Delta]:
    """The delta of one module."""
    spectrum, config = trained["fourierft_spectrum"], trained.config
    check_floats(trained, spectrum)
    n = check_shapes(trained, {"fourierft_spectrum": ("n",)})["n"]
    told = [config["n_frequency"], *(config.get("n_frequency_pattern") or {}).values()]
    if n not in told:
        raise trained.refuse(f"has {n} frequencies, but the config says {' or '.join(map(str, told))}")
    scaling, seed = config["scaling"], config["random_loc_seed"]
    return [FourierFt(trained.module, "weight", (UNKNOWN, UNKNOWN), spectrum, scaling, seed)]


def _wrong(config: Mapping[str, Any]) -> list[str]:
    patterns = {"n_frequency_pattern": True}
    return wrong_values(config, ["n_frequency"], ["scaling"], seeds=["random_loc_seed"], patterns=patterns)


KIND = Kind(
    peft_type="FOURIERFT",
    tensors=("fourierft_spectrum",),
    fields=frozenset({"n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "init_weights"}),
    read=read,
    wrong=_wrong,
)
