"""A base's own format written again: which encoder makes the codes of a weight that was held as such."""

from __future__ import annotations

from dataclasses import replace

from pipeline.ground.codes.bnb4 import Bnb4
from pipeline.ground.codes.bnb4_state import State
from pipeline.ground.codes.bnb8 import Bnb8
from pipeline.ground.codes.code import Code
from pipeline.ground.codes.compressed_tensors import Integers
from pipeline.ground.codes.encoders.bnb4 import Bnb4Encoder
from pipeline.ground.codes.encoders.bnb8 import Bnb8Encoder
from pipeline.ground.codes.encoders.encoder import Encoder, Part
from pipeline.ground.codes.encoders.fp8 import Fp8Encoder, Way
from pipeline.ground.codes.encoders.integers import KeptIntegers
from pipeline.ground.codes.encoders.mx import MxEncoder
from pipeline.ground.codes.fp4 import Fp4
from pipeline.ground.codes.fp8 import Fp8
from pipeline.ground.codes.mx import GptOss


def over_its_scales(name: str, code: Code) -> Encoder | None:
    """What makes the nearest codes over the very scales that stand there; None where scales follow values.

    A scale that is rounded itself, or that grows at a threshold, may come out otherwise for a last bit of
    what it is made of; then all codes over it do.
    """
    encoder = same_format(name, code)
    if isinstance(encoder, Fp8Encoder | MxEncoder):
        return replace(encoder, grows=False)
    return encoder if isinstance(encoder, KeptIntegers) else None


def same_format(name: str, code: Code) -> Encoder | None:
    """The encoder of a weight's own format, into tensors of the same names; None where there is none.

    bitsandbytes' scales are found anew, as PEFT does it; those of FP8, MXFP4 and compressed-tensors stay.
    """
    if isinstance(code, Bnb4):
        state = State.read(code.beside[0], code.kind).fields
        storage = (code.weight.dtype, code.weight.shape)
        nested = code.nested is not None
        return Bnb4Encoder(name, code.shape, code.kind, code.blocksize, nested, state["dtype"], storage)
    if isinstance(code, Bnb8):
        return Bnb8Encoder(name, code.shape, code.format is not None)
    if isinstance(code, Fp8):
        scale = Part(code.scale.name, code.scale.dtype, code.scale.shape)
        return Fp8Encoder(name, code.shape, code.grid, Way.kept, scale, code.weight.dtype, code)
    if isinstance(code, GptOss) or (isinstance(code, Fp4) and code.kind == "MXFP4" and not code.stacked):
        return MxEncoder(name, code.shape, code)
    if isinstance(code, Integers):
        return KeptIntegers(name, code.shape, code)
    return None
