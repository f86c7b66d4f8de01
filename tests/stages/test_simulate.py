"""dequantize=simulate: a 16-bit base as QLoRA training saw it; what a plan says of the choice of a base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.ground import tiles
from pipeline.ground.codes.bnb4_state import LEVELS
from pipeline.ground.errors import Refused
from pipeline.ground.report import Finding
from pipeline.ground.terminal import show_plan
from pipeline.merging.trained_base import Bases, which_base
from pipeline.simulated import Simulated
from pipeline.stages.dequantize.simulate import QuantType
from pipeline.weight import Adapter, Weight
from tests.models import tensors, write_llama, write_lora
from tests.quantizing import formats, is_linear, write_base
from tests.running import merge, pipeline

SHAPE = {"hidden_size": 96, "intermediate_size": 176}  # blocks of 64 straddle rows; 176 * 96 fills them


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    base = write_llama(folder / "base", shard="1GB", **SHAPE)
    return base, write_lora(folder / "adapter", base, target_modules=["q_proj", "down_proj"])


def simulated(base: Path, adapter: Path, out: Path, **settings: Any) -> dict[str, Weight]:
    p = pipeline(base, adapter, out, dequantize="simulate", dequantize_settings=settings)
    return {weight.name: weight for weight in p.dequantize(p.load()).weights}


def values(weight: Weight, rows: int) -> Tensor:
    step = max(rows // weight.grain, 1) * weight.grain
    with weight.open("cpu") as tile:
        starts = range(0, weight.num_rows, step)
        parts = [tile(start, min(start + step, weight.num_rows)).value for start in starts]
    return torch.cat(parts).view(weight.shape)


@pytest.mark.parametrize("kind", list(QuantType))
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("size", [64, 128])
def test_linear_layers_are_what_bitsandbytes_makes_of_them(
    made: tuple[Path, Path], tmp_path: Path, kind: QuantType, nested: bool, size: int
) -> None:
    """dequantize_4bit(quantize_4bit(W)) in bfloat16 is our float32, rounded; all other weights pass."""
    functional = pytest.importorskip("bitsandbytes.functional")
    settings = {"quant_type": kind, "double_quant": nested, "blocksize": size}
    found, base = simulated(*made, tmp_path / "never", **settings), tensors(made[0])
    assert {n for n, w in found.items() if isinstance(w, Simulated)} == {n for n in base if is_linear(n)}
    for name, weight in found.items():
        W = values(weight, 7)
        if not isinstance(weight, Simulated):
            assert torch.equal(W, base[name])
            continue
        codes, state = functional.quantize_4bit(
            base[name], blocksize=size, quant_type=kind.value, compress_statistics=nested
        )
        state.shape = torch.Size((1, base[name].numel()))  # else its AVX512 kernel counts blocks by rows
        theirs = functional.dequantize_4bit(codes, state).view(base[name].shape)
        assert W.dtype == torch.float32 and torch.equal(W.bfloat16(), theirs)
        assert torch.equal(values(weight, 10_000), W)


def test_the_merge_adds_to_it_in_float32_and_rounds_once(made: tuple[Path, Path], tmp_path: Path) -> None:
    merge(*made, tmp_path / "wide", dequantize="simulate", dtype="float32")
    merge(*made, tmp_path / "out", dequantize="simulate", verify="standard", verify_settings={"tokens": 0})
    weights = simulated(*made, tmp_path / "never")
    wide, found = tensors(tmp_path / "wide"), tensors(tmp_path / "out")
    plain = tensors(made[0])
    for name, weight in weights.items():
        W = values(weight, 10_000).float()
        touched = "q_proj" in name or "down_proj" in name
        assert torch.equal(found[name], wide[name].bfloat16())
        assert torch.equal(wide[name], W) != touched
        if touched:  # the delta is that of a merge onto 16 bits
            merge_delta = (wide[name] - W).norm()
            assert 0 < float(merge_delta) < float(W.norm())
    assert any(not torch.equal(found[n], plain[n]) for n in plain if "v_proj" in n)


def test_bytes_do_not_depend_on_workers_or_tiles(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (workers, elements) in enumerate([(1, 1 << 18), (4, 1 << 9)]):
        monkeypatch.setattr("pipeline.output.stream.num_workers", lambda n=workers: n)
        monkeypatch.setattr(tiles, "TILE_ELEMENTS", elements)
        merge(*made, tmp_path / str(number), dequantize="simulate", merge_dtype="float64")
    one, other = tensors(tmp_path / "0"), tensors(tmp_path / "1")
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_the_report_says_how_far_the_bases_are_apart(made: tuple[Path, Path], tmp_path: Path) -> None:
    """||W16 - W4|| / ||delta|| of every merged weight; these are looked at whole."""
    report = merge(*made, tmp_path / "out", dequantize="simulate", verify="structure")
    merge(*made, tmp_path / "wide", dtype="float32", dequantize="simulate")
    weights, base, wide = simulated(*made, tmp_path / "never"), tensors(made[0]), tensors(tmp_path / "wide")
    assert len(report.weights) == 4
    for name, facts in report.weights.items():
        W4 = values(weights[name], 10_000).double()
        shift = (base[name].double() - W4).norm() / (wide[name].double() - W4).norm()
        assert facts["base_shift"] == pytest.approx(
            float(shift), rel=1e-5
        )  # the delta, read off a float32 sum
    manifest = json.loads((tmp_path / "out" / "merge.json").read_text())["weights"]
    assert manifest[name]["base_shift"] == report.weights[name]["base_shift"]
    assert manifest[name]["from"] == "BF16 through nf4 block 64, nested scales"
    assert any("times the delta away from what four bits make of them" in f.text for f in report.findings)


def test_it_is_refused_for_codes_and_for_what_has_no_linear_layer(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    form = formats()["FP8 channel"]
    config = json.loads((made[0] / "config.json").read_text())
    base = write_base(tmp_path / "base", tensors(made[0]), config, lambda n: form if is_linear(n) else None)
    with pytest.raises(Refused, match=r"is stored as FP8 .* use dequantize=auto"):
        merge(base.folder, made[1], tmp_path / "out", dequantize="simulate")
    with pytest.raises(Refused, match=r"dequantize.blocksize: 65 is none of 32, 64"):
        merge(*made, tmp_path / "out", dequantize="simulate", dequantize_settings={"blocksize": 65})


def test_levels_of_a_block_are_those_of_its_largest_value() -> None:
    """By hand: a block of 64 whose largest magnitude is 2 holds twice the levels."""
    from pipeline.ground.codes.encoders.bnb4 import quantized

    values_ = torch.linspace(-2, 2, 64)
    codes, absmax = quantized(values_, "nf4", 64)
    levels = 2 * torch.tensor(LEVELS["nf4"])
    assert absmax.tolist() == [2]
    assert torch.equal((values_[:, None] - levels).abs().argmin(1), codes.long())


def trained_on(made: tuple[Path, Path], tmp_path: Path, name: str) -> tuple[Path, Path]:
    """The base and an adapter that says it was trained on this."""
    folder = tmp_path / "told"
    folder.mkdir(exist_ok=True)
    for path in made[1].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    return made[0], folder


def findings(made: tuple[Path, Path], tmp_path: Path, name: str, **settings: Any) -> list[str]:
    """What the plan says where the adapter was trained on this."""
    plan = pipeline(*trained_on(made, tmp_path, name), tmp_path / "out", **settings).plan()
    return [f.text for f in plan.findings]


@pytest.mark.parametrize(
    ("name", "simulate"),
    [
        ("unsloth/Llama-3.2-1B-bnb-4bit", True),
        ("someone/model-4bit", True),
        ("org/model-nf4", True),
        ("org/Model-AWQ", False),
        ("org/Model-GPTQ-Int4", False),
        ("neuralmagic/Model-FP8-dynamic", False),
        ("org/Model.w4a16", False),
    ],
)
def test_a_plan_tells_of_an_adapter_trained_on_quantized_weights(
    made: tuple[Path, Path], tmp_path: Path, name: str, simulate: bool
) -> None:
    (told,) = [t for t in findings(made, tmp_path, name) if "trained on" in t]
    assert f"'{name}'" in told and "dequantize=none" in told
    assert ("dequantize=simulate" in told) == simulate == ("times the delta" in told)
    for chosen in ("simulate", "none"):
        assert not [t for t in findings(made, tmp_path, name, dequantize=chosen) if "trained on" in t]


def apart(made: tuple[Path, Path]) -> dict[str, float]:
    """||W16 - bitsandbytes' NF4 of it|| / ||scale B A|| of every merged weight, in float64."""
    functional = pytest.importorskip("bitsandbytes.functional")
    base, found = tensors(made[0]), {}
    lora, config = tensors(made[1]), json.loads((made[1] / "adapter_config.json").read_text())
    for key in (key for key in lora if "lora_A" in key):
        A, B = (lora[key.replace("lora_A", factor)].double() for factor in ("lora_A", "lora_B"))
        name = key.removeprefix("base_model.model.").replace("lora_A.", "")
        codes, state = functional.quantize_4bit(base[name].float(), quant_type="nf4", blocksize=64)
        state.shape = torch.Size((1, base[name].numel()))  # as above
        four = functional.dequantize_4bit(codes, state).view(base[name].shape)
        delta = config["lora_alpha"] / config["r"] * B @ A
        found[name] = float((four.double() - base[name].double()).norm() / delta.norm())
    return found


def test_a_plan_says_of_every_weight_how_far_the_bases_are_apart(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The number beside bitsandbytes' own NF4 of every merged weight; small ones are looked at whole."""
    expected = apart(made)
    assert len(expected) == 4
    plan = pipeline(*trained_on(made, tmp_path, "org/model-bnb-4bit"), tmp_path / "out").plan()
    shifts = {w.name: w.base_shift for w in plan.weights if w.base_shift is not None}
    assert shifts == pytest.approx(expected, rel=1e-5)  # sums in float32
    show_plan(plan, every_weight=True)
    printed = " ".join(capsys.readouterr().out.split())
    for name, shift in shifts.items():
        assert f" {name} " in printed
        assert f"NF4 is {shift:.3g} times the delta away" in printed
    (told,) = [f.text for f in plan.findings if "trained on" in f.text]
    most, middle = max(expected, key=lambda name: expected[name]), sum(sorted(expected.values())[1:3]) / 2
    assert f"{middle:.3g} times the delta away from what NF4 makes of them" in told
    assert f"(median of 4 weights, {expected[most]:.3g} in {most})" in told


def test_the_report_has_it_too_and_says_it_once(made: tuple[Path, Path], tmp_path: Path) -> None:
    report = merge(*trained_on(made, tmp_path, "org/model-bnb-4bit"), tmp_path / "out", verify="structure")
    told = {name: facts["base_shift"] for name, facts in report.as_dict()["weights"].items()}
    assert told == pytest.approx(apart(made), rel=1e-5)
    manifest = json.loads((tmp_path / "out" / "merge.json").read_text())["weights"]
    assert {n: facts["base_shift"] for n, facts in manifest.items() if "base_shift" in facts} == told
    assert sum("times the delta away" in text for text in report.as_dict()["findings"]) == 1
    assert "base_shift" in report.plots
    merge(*made, tmp_path / "plain", verify="structure")
    assert "base_shift" not in (tmp_path / "plain" / "merge.json").read_text()


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "base", "", "/home/me/models/tiny"])
def test_a_plan_is_silent_where_nothing_speaks_for_another_base(
    made: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    assert findings(made, tmp_path, name) == []


def test_a_plan_tells_which_codes_it_merges_onto(made: tuple[Path, Path], tmp_path: Path) -> None:
    form = formats()["FP8 channel"]
    config = json.loads((made[0] / "config.json").read_text())
    base = write_base(tmp_path / "base", tensors(made[0]), config, lambda n: form if is_linear(n) else None)
    p = pipeline(base.folder, made[1], tmp_path / "out")
    merged = p.merge(p.dequantize(p.load()), p.extract())
    (told,) = which_base(merged, p.extract()).findings
    assert told.text.startswith("the base is held as FP8 E4M3, a scale per row and merged as that decodes")
    assert which_base(merged, p.extract()).shifts == {}
    assert which_base(replace(merged, left_open=False), p.extract()) == Bases()
    extracted: Any = replace(p.extract().parts[0], extraction="of a fine-tune")  # which no base has trained
    assert which_base(merged, Adapter((extracted,))) == Bases()
    assert isinstance(told, Finding)
