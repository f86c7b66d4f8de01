"""Memory that the large matrices of one thread take turns in."""

from __future__ import annotations

from math import prod
from threading import local
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Scratch(local):
    """For each use one stretch of memory, each thread its own, kept until the thread or this object ends.

    A matrix beyond malloc's largest threshold gets fresh pages from the system each time, and to have those
    cleared and mapped takes several times as long as to fill them.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def empty(self, use: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with any values in it, valid until this thread asks again for the same use.

        On other devices than the CPU a new one: their libraries keep what is freed.
        """
        import torch

        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        num_bytes = prod(shape) * dtype.itemsize
        if use not in self._held or self._held[use].numel() < num_bytes:
            self._held.pop(use, None)  # given back before more is taken
            self._held[use] = torch.empty(num_bytes, dtype=torch.uint8)
        return self._held[use][:num_bytes].view(dtype).view(shape)
