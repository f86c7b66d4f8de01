"""dequantize=simulate: a 16-bit base as QLoRA training saw it, through bitsandbytes' four bits and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from pipeline.dequantizing import dense
from pipeline.ground.codes.bnb4_state import BLOCKSIZES
from pipeline.ground.codes.code import Code
from pipeline.ground.codes.encoders.linear import is_linear
from pipeline.ground.errors import Refused
from pipeline.ground.names import is_conv1d
from pipeline.simulated import Simulated
from pipeline.stage import Dequantize, stage
from pipeline.weight import Checkpoint, Stored, Weight


class QuantType(Enum):
    """The codes of bitsandbytes."""

    nf4 = "nf4"
    fp4 = "fp4"


@stage("simulate")
@dataclass(frozen=True, kw_only=True)
class Simulate(Dequantize):
    """A base of plain numbers; what training would have loaded in four bits is quantized and decoded."""

    quant_type: QuantType = QuantType.nf4
    """nf4 or fp4, as bnb_4bit_quant_type in training"""
    blocksize: int = 64
    """values to a scale"""
    double_quant: bool = True
    """whether the scales are quantized too, as bnb_4bit_use_double_quant in training"""

    def check(self) -> None:
        if self.blocksize not in BLOCKSIZES:
            raise Refused(
                f"dequantize.blocksize: {self.blocksize} is none of {', '.join(map(str, BLOCKSIZES))}"
            )

    def __call__(self, stored: Checkpoint[Stored]) -> Checkpoint[Weight]:
        for weight in stored.weights:
            if isinstance(weight.held, Code):
                raise Refused(
                    f"dequantize: '{weight.name}' is stored as {weight.held.describe} codes, and simulate is "
                    "for a 16-bit base; use dequantize=auto"
                )
        base = dense(stored)
        kind = base.config.model_type
        if turned := [w.name for w in base.weights if is_conv1d(kind, w.name, w.shape)]:
            raise Refused(f"dequantize: {kind} holds {turned[0]} as (in, out), which is not simulated")
        weights = tuple(self._simulated(weight) for weight in base.weights)
        if not any(isinstance(weight, Simulated) for weight in weights):
            raise Refused("dequantize: simulate finds no linear layer in this base; use dequantize=none")
        return replace(base, weights=weights)

    def _simulated(self, weight: Weight) -> Weight:
        if not is_linear(weight.name, weight.shape, experts=False):
            return weight
        settings = (self.quant_type.value, self.blocksize, self.double_quant)
        return Simulated(weight.name, weight.shape, weight.dtype, weight, *settings)
