"""A base's own format encoded again: untouched codes come out as they were, moved ones as the nearest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.ground.codes import bnb4, bnb8, compressed_tensors, fp8, mx
from pipeline.ground.codes.code import Finder
from pipeline.ground.codes.encoders.encoder import Encoder
from pipeline.ground.codes.encoders.same import same_format
from pipeline.ground.codes.small_floats import E2M1
from tests.ground.codes.encoding import assert_same_bytes, encoded, raw
from tests.ground.codes.holding import found, gaussian, random_bytes, whole
from tests.quantizing import Written, formats

pytestmark = pytest.mark.usefixtures("one_thread")


KEPT = ["FP8 block", "FP8 channel", "FP8 tensor", "MXFP8", "MXFP4", "int4 packed", "int8 channel"]
KEPT += ["int4 packed, zero points"]
FINDERS: dict[str, Finder] = {"FP8": fp8.find, "MXFP8": fp8.find, "MXFP4": mx.find}


def finder_of(name: str) -> Finder:
    return FINDERS.get(name.split()[0], compressed_tensors.find)


def folder(parent: Path) -> Path:
    """A new one, for files are held to what they were when they were read."""
    made = parent / str(len(list(parent.iterdir())))
    made.mkdir()
    return made


def as_read(name: str, written: Written, parent: Path) -> Encoder:
    """The encoder of the format in which a weight stands in a file."""
    tensors = {f"a.{last}": tensor for last, tensor in written.tensors.items()}
    one = found(finder_of(name), folder(parent), tensors, formats()[name].config)
    encoder = same_format(one.name, one.code)
    assert encoder
    return encoder


@pytest.mark.parametrize("name", KEPT)
def test_what_no_delta_moves_keeps_its_very_codes(name: str, tmp_path: Path) -> None:
    for seed, shape in enumerate([(130, 192), (64, 320)]):
        written = formats()[name].write(gaussian(*shape, seed=seed))
        encoder = as_read(name, written, tmp_path)
        made, decoded = encoded(encoder, written.weight.float(), 3)
        assert_same_bytes(made, {f"a.{last}": tensor for last, tensor in written.tensors.items()})
        assert torch.equal(decoded, written.weight)


@pytest.mark.parametrize("name", KEPT)
def test_codes_over_the_bases_scales_are_the_nearest_ones(name: str, tmp_path: Path) -> None:
    """No other codes over the same scales are nearer; and the decoder reads what the encoder says."""
    written = formats()[name].write(gaussian(130, 192, seed=1))
    values = 0.9 * written.weight.float() + gaussian(130, 192, seed=2) / 50
    encoder = as_read(name, written, tmp_path)
    made, decoded = encoded(encoder, values, 2)
    main = encoder.parts[0].name
    wanted = {f"a.{last}": tensor for last, tensor in written.tensors.items()}
    assert [key for key in made if key != main and raw(made[key]) != raw(wanted[key])] == []

    def meant(codes: Tensor) -> Tensor:
        shaped = codes.view(wanted[main].dtype).view(wanted[main].shape)
        one = found(finder_of(name), folder(tmp_path), {**wanted, main: shaped}, formats()[name].config)
        return whole(one.code)

    assert torch.equal(meant(made[main]), decoded)
    for seed in range(4):
        others = meant(random_bytes(*made[main].shape, seed=seed))
        assert bool(((others - values).abs().nan_to_num(nan=torch.inf) >= (decoded - values).abs()).all())


def test_a_kept_scale_grows_where_a_value_lies_beyond_the_largest_code(tmp_path: Path) -> None:
    for name in ("FP8 block", "FP8 channel", "MXFP8", "MXFP4"):
        written = formats()[name].write(gaussian(130, 192))
        encoder = as_read(name, written, tmp_path)
        values = written.weight.float()
        values[3, 5] = 10 * values.abs().max()
        made, decoded = encoded(encoder, values)
        assert float((decoded[3, 5] / values[3, 5] - 1).abs()) <= 2.0**-3  # half a step of three, at most
        (before,) = (tensor for key, tensor in written.tensors.items() if "scale" in key)
        (after,) = (tensor for key, tensor in made.items() if "scale" in key)
        assert int((before.float() != after.float().view(before.shape)).sum()) == 1  # that block's alone


def test_gpt_oss_experts_keep_their_codes(tmp_path: Path) -> None:
    scales = torch.randint(110, 125, (3, 48, 2), dtype=torch.uint8)
    tensors = {"a.x_blocks": random_bytes(3, 48, 2, 16), "a.x_scales": scales}
    code = found(mx.find, folder(tmp_path), tensors).code
    encoder = same_format("a.x", code)
    assert encoder
    made, decoded = encoded(encoder, whole(code))
    assert torch.equal(decoded, whole(code))
    again = {"a.x_blocks": made["a.x_blocks"].view(3, 48, 2, 16), "a.x_scales": made["a.x_scales"]}
    assert torch.equal(whole(found(mx.find, folder(tmp_path), again).code), whole(code))
    levels = torch.tensor(E2M1)  # minus zero is another code with the same value
    assert torch.equal(levels[(again["a.x_blocks"] & 15).long()], levels[(tensors["a.x_blocks"] & 15).long()])


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_bitsandbytes_own_format_is_written_again_as_it_stood(tmp_path: Path, storage: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for nested in (False, True):
        codes, state = functional.quantize_4bit(
            gaussian(48, 80).bfloat16(), quant_type="nf4", compress_statistics=nested, quant_storage=storage
        )
        tensors = {"a.weight": codes, **{f"a.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
        one = found(bnb4.find, folder(tmp_path), tensors)
        encoder = same_format(one.name, one.code)
        assert encoder
        values = whole(one.code) + gaussian(48, 80, seed=3) / 10
        wanted_codes, wanted_state = functional.quantize_4bit(
            values, quant_type="nf4", compress_statistics=nested, quant_storage=storage
        )
        wanted_state.dtype = torch.bfloat16  # what the base computes in
        packed_state = {f"a.weight.{k}": v for k, v in wanted_state.as_dict(packed=True).items()}
        assert_same_bytes(encoded(encoder, values, 2)[0], {"a.weight": wanted_codes, **packed_state})


def test_int8_without_a_format_stays_so(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(3, 4, dtype=torch.int8), "a.SCB": torch.ones(3)}
    one = found(bnb8.find, tmp_path, tensors)
    encoder = same_format(one.name, one.code)
    assert encoder and [part.name for part in encoder.parts] == ["a.weight", "a.SCB"]
