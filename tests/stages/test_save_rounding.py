"""save.rounding: by chance, the same bytes whatever the order of work; and where auto takes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.ground import tiles
from pipeline.ground.errors import PipelineError, Refused
from pipeline.ground.report import Report, Status
from pipeline.ground.rounding import Rounding, round_by_chance, stream_of
from tests.models import tensors, write_llama, write_lora
from tests.running import merge

FILES_ONLY = {"tokens": 0}
SMALL = 2e-3  # of A and B: deltas of a tenth of a unit of bfloat16, which nearest mostly swallows
# Rounding by chance keeps 1 of such a delta in the mean, with a deviation of sqrt(unit / delta / elements):
# sqrt(10 / 4096) for the smallest weight here. Five of them:
NOISE = 0.25


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, an adapter of ordinary size, and a very small one."""
    folder = tmp_path_factory.mktemp("made")
    base = write_llama(folder / "base")
    targets = ["q_proj", "down_proj"]
    adapter = write_lora(folder / "adapter", base, target_modules=targets)
    return base, adapter, write_lora(folder / "small", base, size=SMALL, target_modules=targets)


def gates(report: Report) -> dict[str, Status]:
    return {gate.name: gate.status for gate in report.gates}


def roundings(folder: Path) -> dict[str, str]:
    """What merge.json says of each merged weight."""
    weights = json.loads((folder / "merge.json").read_text())["weights"]
    return {n: w.get("rounding", "nearest") for n, w in weights.items() if w["action"] == "merged"}


def same(one: Path, other: Path) -> bool:
    left, right = tensors(one), tensors(other)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("dtype", ["keep", "float16"])
def test_bytes_do_not_depend_on_workers_memory_or_tiles(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """merge_dtype is float64, so that the sums have the same bits however they are cut."""
    base, _, small = made
    runs = [(1, None, 1 << 18), (4, None, 1 << 9), (8, 40_000, 1 << 9), (3, None, 1 << 12)]
    for number, (workers, limit, elements) in enumerate(runs):
        monkeypatch.setattr("pipeline.output.stream.num_workers", lambda n=workers: n)
        monkeypatch.setattr(tiles, "TILE_ELEMENTS", elements)
        out = tmp_path / str(number)
        merge(base, small, out, rounding=Rounding.stochastic, memory_limit=limit, dtype=dtype,
              merge_dtype="float64")  # fmt: skip
        assert same(tmp_path / "0", out)
    merge(base, small, tmp_path / "seed", rounding=Rounding.stochastic, seed=1, dtype=dtype)
    assert not same(tmp_path / "0", tmp_path / "seed")


def test_what_is_written_is_the_sum_rounded_by_the_bits_of_name_and_place(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, _ = made
    merge(base, adapter, tmp_path / "wide", dtype="float32")
    merge(base, adapter, tmp_path / "out", rounding=Rounding.stochastic, seed=5)
    before, wide, found = tensors(base), tensors(tmp_path / "wide"), tensors(tmp_path / "out")
    for name, tensor in found.items():
        if "q_proj" in name or "down_proj" in name:
            assert torch.equal(tensor, round_by_chance(wide[name], "BF16", stream_of(5, name), 0))
        else:
            assert torch.equal(tensor, before[name])


def test_a_swallowed_adapter_is_kept_by_chance(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, small = made
    settings = {"verify": "standard", "verify_settings": FILES_ONLY}
    with pytest.raises(PipelineError, match=r"retained: 0\.\d+ of the delta; .* save.rounding=auto"):
        merge(base, small, tmp_path / "nearest", **settings)
    for rounding in (Rounding.stochastic, Rounding.auto):
        report = merge(
            base,
            small,
            tmp_path / rounding.value,
            rounding=rounding,
            **{**settings, "verify_settings": {**FILES_ONLY, "min_retained": 1 - NOISE}},
        )
        assert report.passed
        assert all(w["retained"] == pytest.approx(1, abs=NOISE) for w in report.weights.values())
        assert set(roundings(tmp_path / rounding.value).values()) == {"stochastic"}
        assert any("4 of 4 merged weights are rounded by chance" in f.text for f in report.findings)
    assert same(tmp_path / "stochastic", tmp_path / "auto")


def test_auto_leaves_nearest_where_it_keeps_enough(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = made
    merge(base, adapter, tmp_path / "nearest")
    report = merge(base, adapter, tmp_path / "auto", rounding=Rounding.auto)
    assert same(tmp_path / "nearest", tmp_path / "auto")
    assert set(roundings(tmp_path / "auto").values()) == {"nearest"}
    assert {w["rounding"] for w in report.weights.values()} == {"nearest"}
    assert report.plan.rounding == "auto"


def test_auto_decides_for_each_weight(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """One adapter whose deltas on two modules are of very different sizes."""
    from safetensors.torch import load_file, save_file

    base, adapter, _ = made
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    state = load_file(adapter / "adapter_model.safetensors")
    for name in state:
        if "q_proj" in name and "lora_B" in name:
            state[name] *= 1e-4
    save_file(state, mixed / "adapter_model.safetensors", {"format": "pt"})
    merge(base, mixed, tmp_path / "auto", rounding=Rounding.auto, verify="standard",
          verify_settings={**FILES_ONLY, "min_retained": 0})  # fmt: skip
    for name, rounding in roundings(tmp_path / "auto").items():
        assert rounding == ("stochastic" if "q_proj" in name else "nearest")


def test_verification_allows_a_whole_unit_only_where_chance_is_recorded(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, _ = made
    merge(base, adapter, tmp_path / "out", rounding=Rounding.stochastic)
    settings = {"save": "existing", "verify": "standard", "verify_settings": FILES_ONLY}
    report = merge(base, adapter, tmp_path / "out", **settings)
    assert gates(report)["rounding"] is Status.passed
    (tmp_path / "out" / "merge.json").unlink()
    with pytest.raises(PipelineError, match="rounding"):
        merge(base, adapter, tmp_path / "out", **settings)


def test_beyond_a_unit_is_refused_by_chance_too(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, adapter, _ = made
    merge(base, adapter, tmp_path / "out", rounding=Rounding.stochastic)
    shard = next(
        p for p in (tmp_path / "out").glob("*.safetensors") if any("q_proj" in n for n in load_file(p))
    )
    state = load_file(shard)
    name = next(n for n in state if "q_proj" in n)
    bits = state[name].view(torch.int16)
    bits[0, 0] += 2  # two units away from one of its neighbours
    save_file(state, shard, {"format": "pt"})
    with pytest.raises(PipelineError, match=rf"rounding: .* too far off, the worst in {name}"):
        merge(base, adapter, tmp_path / "out", save="existing", verify="standard", verify_settings=FILES_ONLY)


def test_float32_takes_no_chance(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = made
    with pytest.raises(Refused, match=r"save\.rounding: stochastic means nothing for float32"):
        merge(base, adapter, tmp_path / "out", rounding=Rounding.stochastic, dtype="float32")
    merge(base, adapter, tmp_path / "auto", rounding=Rounding.auto, dtype="float32")
    merge(base, adapter, tmp_path / "nearest", dtype="float32")
    assert same(tmp_path / "auto", tmp_path / "nearest")
