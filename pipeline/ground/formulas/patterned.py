"""Changes that a few numbers spread over the weight: spectra, circulants, single entries, repeated rows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pipeline.ground.formulas.module import Change, Module, Parameter, dense, instead

if TYPE_CHECKING:
    from torch import Tensor


def fourierft(module: Module, W: Parameter) -> Change:
    """scaling * real(ifft2(S)), S zero but at places that a seed draws (arXiv:2405.03003).

    Of a real S half the transform tells the rest: column n - q is column q with the rows turned round.
    """
    import torch

    spectrum, (outputs, inputs) = module["fourierft_spectrum"], W.shape
    generator = torch.Generator().manual_seed(module.config["random_loc_seed"])
    places = torch.randperm(outputs * inputs, generator=generator)[: len(spectrum)]
    S = spectrum.new_zeros(outputs * inputs)
    S[places] = spectrum
    half = torch.fft.rfft2(S.view(outputs, inputs)).real
    rest = half[:, 1 : (inputs + 1) // 2]
    D = torch.cat([half, torch.cat([rest[:1], rest[1:].flip(0)]).flip(1)], 1)
    return dense(D.mul_(module.config["scaling"] / (outputs * inputs)))


def c3a(module: Module, W: Parameter) -> Change:
    """Circulant blocks, each row of which is the one above moved on by one, / in (arXiv:2407.19342)."""
    kernel = module["c3a_kernel"]
    m, n, b = kernel.shape
    D = kernel.new_empty(m, b, n, b)
    for row in range(b):
        D[:, row] = kernel.roll(row, -1)
    return dense(D.view(m * b, n * b) / (n * b))


def shira(module: Module, W: Parameter) -> Change:
    """Single entries (arXiv:2406.13175)."""
    values, (row, column) = module["shira_weight"], module.raw("shira_indices").long()
    D = values.new_zeros(W.shape)
    D.index_put_((row, column), values, accumulate=True)
    return dense(D)


def miss(module: Module, W: Parameter) -> Change:
    """D[i, j] = B[j mod r, i]; "mini" repeats B along outputs, "bat" multiplies by W (arXiv:2409.15371)."""
    B, (outputs, inputs) = module["miss_block"], W.shape
    if B.ndim == 3:
        return instead(partial(_bat, B, W), W.rows)
    across = B.T.repeat(outputs // B.shape[1], inputs // len(B) + 1)
    return dense(across[:, :inputs])


def _bat(B: Tensor, W: Parameter, start: int, stop: int) -> Tensor:
    """In every (r, r) block X of the rows that B_o belongs to, X + X B_o + B_o."""
    import torch

    r = B.shape[1]
    first, last = start // r, -(-stop // r)
    value = [
        torch.cat([X + X @ B[o] + B[o] for X in W.rows(o * r, (o + 1) * r).split(r, 1)], 1)
        for o in range(first, last)
    ]
    return torch.cat(value)[start - first * r : stop - first * r]
