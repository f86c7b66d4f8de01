# ruff: noqa: T201
"""Encoders against references: bytes that differ, and speed.

`encoding.py` encodes gaussians of ragged and of large shapes with each format of `save.quantize`, by tiles,
and with the library that the format comes from, and counts the bytes that differ, scales and all. The speed
is in gigabytes of bfloat16 weights per second of CPU on one thread, of ours and of the library. By chance
there is no reference: the last lines show the speed of stochastic rounding.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params
from compressed_tensors import compressors
from compressed_tensors import quantization as schemes
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline.ground import tiles
from pipeline.ground.codes.encoders.bnb4 import Bnb4Encoder
from pipeline.ground.codes.encoders.bnb8 import Bnb8Encoder
from pipeline.ground.codes.encoders.encoder import Encoder
from pipeline.ground.codes.encoders.schemes import SCHEMES
from pipeline.ground.rounding import round_by_chance
from tests.ground.codes.encoding import encoded
from tests.ground.codes.test_encoders import transformers_fp8

Reference = Callable[[Tensor], dict[str, Tensor]]
LARGE = (4096, 4096)
RAGGED = [(300, 704), (129, 2112), (7, 4160), (1000, 1)]
WHOLE = [(384, 768), (128, 2176)]  # in blocks and groups of 128


def bnb4(kind: str, nested: bool) -> Reference:
    def quantized(values: Tensor) -> dict[str, Tensor]:
        codes, state = functional.quantize_4bit(
            values, blocksize=64, quant_type=kind, compress_statistics=nested
        )
        return {"weight": codes, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}

    return quantized


def bnb8(values: Tensor) -> dict[str, Tensor]:
    made = Int8Params(values, requires_grad=False, has_fp16_weights=False).to("cpu")
    return {"weight": made.data, "SCB": made.SCB, "weight_format": torch.zeros((), dtype=torch.uint8)}


def fp8_block(values: Tensor) -> dict[str, Tensor]:
    codes, scale = transformers_fp8(values)
    return {"weight": codes, "weight_scale_inv": scale}


def compressed(name: str) -> Reference:
    config = SCHEMES[name].config("BF16", ["lm_head"], ["weight"])
    arguments = schemes.QuantizationArgs(**config["config_groups"]["group_0"]["weights"])
    compressor = compressors.BaseCompressor.get_value_from_registry(config["format"])
    scheme = schemes.QuantizationScheme(targets=["Linear"], weights=arguments)

    def made(values: Tensor) -> dict[str, Tensor]:
        groups = values.view(len(values), -1, 128) if name == "int4-g128" else values[:, None]
        scale, _ = calculate_qparams(groups.amin(2), groups.amax(2), arguments)
        found: dict[str, Tensor] = compressor.compress(
            {"weight": values, "weight_scale": scale.bfloat16()}, scheme
        )
        return found

    return made


def ours(name: str, shape: tuple[int, int]) -> Encoder:
    if name in ("nf4", "nf4-dq", "fp4"):
        return Bnb4Encoder("weight", shape, name[:3], 64, name == "nf4-dq", "float32")
    if name == "int8":
        return Bnb8Encoder("weight", shape)
    encoder = SCHEMES[name].encoder("weight", shape, "BF16")
    assert encoder
    return encoder


def cases() -> Iterator[tuple[str, str, Reference, list[tuple[int, int]]]]:
    """Format, library, what it writes, shapes."""
    for name in ("nf4", "nf4-dq", "fp4"):
        yield name, "bitsandbytes", bnb4(name[:3], name == "nf4-dq"), RAGGED
    yield "int8", "bitsandbytes", bnb8, RAGGED
    yield "fp8-block", "transformers", fp8_block, WHOLE
    yield "fp8-channel", "compressed-tensors", compressed("fp8-channel"), [*RAGGED[:3], *WHOLE]
    yield "int4-g128", "compressed-tensors", compressed("int4-g128"), WHOLE


def by_tiles(name: str, values: Tensor, stream: int | None = None) -> dict[str, Tensor]:
    encoder = ours(name, (values.shape[0], values.shape[1]))
    grains = tiles.tile_rows(values.shape[1], encoder.grain) // encoder.grain
    return encoded(encoder, values, grains, stream)[0]


def differing(made: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[int, int]:
    """(bytes, those of them that differ)."""
    assert made.keys() == wanted.keys(), (made.keys(), wanted.keys())
    count = off = 0
    for name, tensor in made.items():
        a, b = (x.contiguous().view(-1).view(torch.uint8) for x in (tensor, wanted[name]))
        assert len(a) == len(b), name
        count, off = count + len(a), off + int((a != b).sum())
    return count, off


def speed(work: Callable[[], object], elements: int, rounds: int = 3) -> float:
    """Gigabytes of bfloat16 per second of CPU, the best of the rounds."""
    work()
    times = []
    for _ in range(rounds):
        begun = time.thread_time()
        work()
        times.append(time.thread_time() - begun)
    return 2 * elements / min(times) / 1e9


def encoding_speed(name: str, values: Tensor, stream: int | None = None) -> float:
    encoder = ours(name, (values.shape[0], values.shape[1]))
    grid = list(tiles.grid(*values.shape, encoder.grain))

    def work() -> None:
        with encoder.open("cpu") as encode:
            encoder.finish([encode(values[a:b], a, stream).sides for a, b in grid])

    return speed(work, values.numel())


def main() -> None:
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    large = torch.randn(LARGE, generator=random) * 0.02
    print("| format | reference | bytes | differ | GB/s | reference, GB/s |")
    print("|---|---|---|---|---|---|")
    for name, library, reference, shapes in cases():
        count = off = 0
        for values in [large, *(torch.randn(shape, generator=random) * 0.02 for shape in shapes)]:
            found = differing(by_tiles(name, values), reference(values))
            count, off = count + found[0], off + found[1]
        theirs = speed(lambda: reference(large), large.numel(), 1)  # noqa: B023  called at once
        mine = encoding_speed(name, large)
        print(f"| {name} | {library} | {count:,} | {off} | {mine:.2f} | {theirs:.2f} |")
    chance = speed(lambda: round_by_chance(large, "BF16", 1, 0), large.numel())
    print(f"| bfloat16, stochastic | - | - | - | {chance:.2f} | - |")
    print(f"| fp8-block, stochastic | - | - | - | {encoding_speed('fp8-block', large, 1):.2f} | - |")


if __name__ == "__main__":
    main()
