"""Each tier of verify=thorough catches what the tiers below it let pass, and skips those above it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.ground.errors import PipelineError, Refused
from pipeline.ground.reference import every_row, sampled_rows
from pipeline.ground.report import Report, Status
from pipeline.ground.rounding import Rounding
from tests.making import floats, lora_config, write_adapter, write_base
from tests.models import exact, tensors, write_llama, write_lora
from tests.running import merge
from tests.tolerance import FLOAT64_SUM

RANK, ALPHA = 16, 16.0
WIDE = "model.layers.0.mlp.gate_proj.weight"
Made = tuple[Path, Path, Path]
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A base with weights too large for samples to see all of them, an adapter, and a sound merge."""
    folder = tmp_path_factory.mktemp("made")
    sizes = {"hidden_size": 128, "intermediate_size": 4096, "num_hidden_layers": 1}
    base = write_llama(folder / "base", shard="1GB", **sizes)
    adapter = write_lora(folder / "adapter", base, r=RANK, lora_alpha=ALPHA, size=0.02)
    merge(base, adapter, folder / "merged")
    return base, adapter, folder / "merged"


def verify(
    made: Made, folder: Path, verify: str = "thorough", arithmetic: str = "float32", **own: Any
) -> Report:
    base, adapter, _ = made
    settings = {"tokens": 256 if verify == "thorough" else 0, **own}
    return merge(
        base,
        adapter,
        folder,
        save="existing",
        verify=verify,
        merge_dtype=arithmetic,
        verify_settings=settings,
    )


def statuses(report: Report) -> dict[str, Status]:
    return {gate.name: gate.status for gate in report.gates}


def broken(made: Made, tmp_path: Path, change: Callable[[State, Path, Path], None]) -> Path:
    """A copy of the sound merge, changed, as another tool might have left it."""
    folder = shutil.copytree(made[2], tmp_path / "out")
    (folder / "merge.json").unlink()
    state = load_file(folder / "model.safetensors")
    change(state, *made[:2])
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_sound_merge_passes_every_tier(made: Made) -> None:
    report = verify(made, made[2])
    assert set(statuses(report).values()) == {Status.passed}
    assert list(statuses(report))[:9] == [
        "structure", "config", "untouched", "converted", "retraced", "rounding", "effect", "retained",
        "layers",
    ]  # fmt: skip
    facts = report.weights[WIDE]
    assert facts["verified_elements"] == 4096 * 128
    stored, before = (tensors(folder)[WIDE].double() for folder in (made[2], made[0]))
    for told, values in (("before", before), ("after", stored)):
        assert facts[told]["std"] == pytest.approx(float(values.std(correction=0)), rel=FLOAT64_SUM)
        assert (facts[told]["min"], facts[told]["max"]) == (float(values.min()), float(values.max()))


def one_row(state: State, base: Path, adapter: Path) -> None:
    """An element between the samples."""
    seen = {row for start, stop in sampled_rows(WIDE, 4096, 128, 1) for row in range(start, stop)}
    row = next(row for row in range(4096) if row not in seen)
    state[WIDE][row, 5] += 1


def twice(state: State, base: Path, adapter: Path) -> None:
    for name in state:
        if ".layers." in name and "norm" not in name:
            module = name.removesuffix(".weight")
            W = tensors(base)[name]
            target, _ = exact(W, adapter, module, ALPHA / RANK)
            state[name] = (2 * target - W.double()).bfloat16()


def one_direction_lost(state: State, base: Path, adapter: Path) -> None:
    """One of the sixteen columns of B counts for nothing, in one weight."""
    lora = load_file(adapter / "adapter_model.safetensors")
    key = f"base_model.model.{WIDE.removesuffix('.weight')}.lora_"
    A, B = (lora[f"{key}{x}.weight"].double() for x in "AB")
    B[:, 3] = 0
    state[WIDE] = (tensors(base)[WIDE].double() + ALPHA / RANK * (B @ A)).bfloat16()


def other_positions(folder: Path) -> None:
    """Rotary positions scaled, which no weight shows."""
    config = json.loads((folder / "config.json").read_text())
    rope = {**config["rope_parameters"], "rope_type": "linear", "factor": 8.0}
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))


def test_files_skip_all_that_follows(made: Made, tmp_path: Path) -> None:
    def change(state: State, *_: Path) -> None:
        state["model.norm.weight"] += 1
        one_row(state, *made[:2])

    folder = broken(made, tmp_path, change)
    with pytest.raises(PipelineError, match=r"untouched: model.norm.weight differs"):
        verify(made, folder)
    assert set(failed(made, folder, tmp_path)) == {"structure", "untouched", "config"}


def failed(made: Made, folder: Path, tmp_path: Path, **settings: Any) -> dict[str, str]:
    """The gates of a report that refuses."""
    from pipeline.door import Request, fulfil
    from tests.running import pipeline

    arithmetic = settings.pop("arithmetic", "float32")
    base, adapter, _ = made
    own = {"tokens": 256, **settings}
    asked = pipeline(
        base, adapter, folder, save="existing", verify="thorough", merge_dtype=arithmetic, verify_settings=own
    )
    with pytest.raises(PipelineError):
        fulfil(Request(asked, {}, report=tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    return {gate["name"]: gate["status"] for gate in report["gates"]}


def test_an_element_between_the_samples_is_found_by_looking_at_every_row(made: Made, tmp_path: Path) -> None:
    folder = broken(made, tmp_path, one_row)
    assert verify(made, folder, "standard").passed
    with pytest.raises(PipelineError, match=rf"rounding: .*; 1 too far off, the worst in {WIDE}"):
        verify(made, folder)
    gates = failed(made, folder, tmp_path)
    assert "layers" not in gates
    assert "logits" not in gates


def test_a_direction_that_is_lost_is_found_by_the_layers(made: Made, tmp_path: Path) -> None:
    """In 16-bit arithmetic no distance of elements is asked; fifteen sixteenths of the delta are there."""
    folder = broken(made, tmp_path, one_direction_lost)
    assert verify(made, folder, "standard", "bfloat16").passed
    with pytest.raises(PipelineError, match=rf"layers: .*{WIDE} by 0\.\d+ to 0\.\d+ \(1 of 7 do not hold\)"):
        verify(made, folder, arithmetic="bfloat16")
    gates = failed(made, folder, tmp_path, arithmetic="bfloat16")
    assert [name for name, status in gates.items() if status == "failed"] == ["layers"]
    assert "logits" not in gates


def test_other_positions_are_found_by_the_models_answers(made: Made, tmp_path: Path) -> None:
    folder = broken(made, tmp_path, lambda *_: None)
    other_positions(folder)
    assert verify(made, folder, tokens=0).passed
    gates = failed(made, folder, tmp_path)
    assert [name for name, status in gates.items() if status == "failed"] == ["logits"]


@pytest.mark.parametrize("tier", ["standard", "thorough"])
@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_a_delta_that_was_added_twice_is_refused_and_named(
    made: Made, tmp_path: Path, tier: str, arithmetic: str
) -> None:
    folder = broken(made, tmp_path, twice)
    said = (
        r"retained: 2\.\d* of the delta, 2\.?\d* times in .* \(7 weights\)"
        if arithmetic == "bfloat16"
        else ""
    )
    with pytest.raises(PipelineError, match=rf"{said or 'rounding: '}.*merged twice"):
        verify(made, folder, tier, arithmetic)


def test_one_weight_that_holds_its_delta_twice_is_refused_among_others(made: Made, tmp_path: Path) -> None:
    def one(state: State, base: Path, adapter: Path) -> None:
        sound = {name: t.clone() for name, t in state.items()}
        twice(state, base, adapter)
        small = "model.layers.0.self_attn.k_proj.weight"
        state |= {name: t for name, t in sound.items() if name != small}

    folder = broken(made, tmp_path, one)
    with pytest.raises(PipelineError, match=r"retained: 1\.\d+ of the delta, 2 times in .*k_proj"):
        verify(made, folder, "standard", "bfloat16")
    assert verify(made, folder, "standard", "bfloat16", max_retained=3.0).passed


def test_what_the_layers_answer_is_the_formula(made: Made) -> None:
    """Against E and D from PEFT's files in float64, for probes of our own: unit normal, and along A."""
    base, adapter, merged = made
    stored, before = (tensors(folder)[WIDE].double() for folder in (merged, base))
    target, _ = exact(before, adapter, WIDE.removesuffix(".weight"), ALPHA / RANK)
    E, D = stored - target, target - before
    generator = torch.Generator().manual_seed(7)
    X = torch.randn(128, 20_000, generator=generator, dtype=torch.float64)
    facts = verify(made, merged, tokens=0, probes=400).weights[WIDE]
    wanted = float((E @ X).norm() / (D @ X).norm())
    assert facts["random_outerr"] == pytest.approx(wanted, rel=0.05)  # of 400 draws
    lora = load_file(adapter / "adapter_model.safetensors")
    A = lora[f"base_model.model.{WIDE.removesuffix('.weight')}.lora_A.weight"].double()
    Z = torch.randn(RANK, 20_000, generator=generator, dtype=torch.float64)
    along = (A / A.norm(dim=1, keepdim=True)).T @ Z
    wanted = float((E @ along).norm() / (D @ along).norm())
    assert facts["aligned_outerr"] == pytest.approx(wanted, rel=0.05)
    low, high = facts["aligned_outerr_interval"]
    assert low < wanted < high


def test_rounding_alone_is_told_and_refused_only_where_a_recipe_asks(made: Made, tmp_path: Path) -> None:
    base = made[0]
    adapter = write_lora(tmp_path / "faint", base, r=RANK, lora_alpha=ALPHA, size=0.004)
    settings = {"tokens": 0, "min_retained": 0}
    report = merge(base, adapter, tmp_path / "out", verify="thorough", verify_settings=settings)
    assert statuses(report)["layers"] is Status.passed
    assert any("rounding alone changes what" in f.text for f in report.findings)
    with pytest.raises(PipelineError, match=r"layers: .*wanted <= 0.05"):
        asked = {**settings, "max_outerr": 0.05}
        merge(base, adapter, tmp_path / "asked", verify="thorough", verify_settings=asked)
    stochastic = merge(
        base,
        adapter,
        tmp_path / "chance",
        verify="thorough",
        verify_settings=settings,
        rounding=Rounding.stochastic,
    )
    assert statuses(stochastic)["layers"] is Status.passed


def test_the_nearest_values_of_many_directions_are_not_refused(tmp_path: Path) -> None:
    """Nearly all of the delta is kept; along 64 rows of A what rounding costs is still beyond the limit."""
    base = write_llama(
        tmp_path / "base", shard="1GB", hidden_size=512, intermediate_size=512, num_hidden_layers=1
    )
    adapter = write_lora(tmp_path / "adapter", base, r=64, lora_alpha=64, size=0.0042)
    report = merge(base, adapter, tmp_path / "out", verify="thorough", verify_settings={"tokens": 0})
    assert statuses(report)["layers"] is Status.passed
    assert min(facts["retained"] for facts in report.weights.values()) > 0.995
    assert max(facts["aligned_outerr"] for facts in report.weights.values()) > 0.07
    assert any("rounding alone changes what 7 of 7 layers add" in f.text for f in report.findings)


@pytest.mark.parametrize("value", ["float16", "float32"])
def test_finer_outputs_pass_thoroughly(made: Made, tmp_path: Path, value: str) -> None:
    settings = {"tokens": 0}
    report = merge(*made[:2], tmp_path / "out", dtype=value, verify="thorough", verify_settings=settings)
    assert statuses(report)["layers"] is Status.passed
    assert report.weights[WIDE]["aligned_outerr"] < 0.002


def test_settings_that_mean_nothing_are_refused(made: Made) -> None:
    with pytest.raises(Refused, match=r"verify.probes: 1 is too few"):
        verify(made, made[2], probes=1)
    for prompts in (7, ["a", ""], {"a": "b"}):
        with pytest.raises(Refused, match=r"verify.prompts: .* is neither a text nor a list of texts"):
            verify(made, made[2], prompts=prompts)


@pytest.mark.parametrize("name", ["max_ratio", "max_kl", "max_kl_p999", "max_rms", "max_outerr"])
@pytest.mark.parametrize("limit", [-0.1, float("nan")])
def test_a_limit_that_nothing_can_keep_is_refused_before_a_model_is_merged(
    made: Made, name: str, limit: float
) -> None:
    with pytest.raises(Refused, match=rf"verify.{name}: .* is not a number of at least 0"):
        verify(made, made[2], **{name: limit})


@pytest.mark.parametrize("share", [99.5, -0.1, float("nan")])
def test_a_share_in_percent_is_refused_before_a_model_is_merged(made: Made, share: float) -> None:
    with pytest.raises(Refused, match=r"verify.min_top1: .* is not a share; write 0.995 for 99.5 %"):
        verify(made, made[2], min_top1=share)


# Stacked experts


EXPERTS, OUT, IN, R = 8, 12, 10, 2
STACK = "model.layers.0.mlp.experts.gate_up_proj"


def stacked(folder: Path, still: int | None = None) -> tuple[Path, Path]:
    """A base with stacked experts, `(experts, out, in)`, and a LoRA on all of them or on all but one."""
    random = np.random.default_rng(0)
    weights = {STACK: floats("BF16", random.standard_normal((EXPERTS, OUT, IN), np.float32) / 8)}
    base = write_base(folder / "base", weights)
    B = random.standard_normal((OUT, R * EXPERTS), np.float32) / 8
    if still is not None:
        B.reshape(OUT, R, EXPERTS)[:, :, still] = 0
    owner = "base_model.model.model.layers.0.mlp.experts"
    lora = {
        f"{owner}.lora_A.weight": floats("F32", random.standard_normal((EXPERTS * R, IN), np.float32)),
        f"{owner}.lora_B.weight": floats("F32", B),
    }
    config = lora_config(r=R, lora_alpha=2 * R, target_modules=[], target_parameters=["experts.gate_up_proj"])
    return base, write_adapter(folder / "adapter", lora, config)


@pytest.mark.parametrize("tier", ["standard", "thorough"])
def test_every_expert_of_a_stack_is_asked_whether_it_changed(tmp_path: Path, tier: str) -> None:
    base, adapter = stacked(tmp_path)
    settings = {"tokens": 0}
    report = merge(base, adapter, tmp_path / "out", verify=tier, verify_settings=settings)
    assert statuses(report)["effect"] is Status.passed
    state = load_file(tmp_path / "out" / "model.safetensors")
    for expert in (2, 5):
        state[STACK][expert] = tensors(base)[STACK][expert]
    (tmp_path / "out" / "merge.json").unlink()
    save_file(state, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    # 16-bit arithmetic, so that the rounding of elements is reported only
    with pytest.raises(PipelineError, match=rf"effect: 1 of 1 .*; experts 2, 5 of {STACK} are the base's"):
        merge(
            base, adapter, tmp_path / "out", save="existing", verify=tier, verify_settings=settings,
            merge_dtype="bfloat16",
        )  # fmt: skip


def test_an_expert_without_a_delta_is_told_where_its_siblings_have_one(tmp_path: Path) -> None:
    base, adapter = stacked(tmp_path, still=3)
    report = merge(base, adapter, tmp_path / "out", verify="thorough", verify_settings={"tokens": 0})
    assert report.passed
    assert any(f"the delta of experts 3 of {STACK} is zero, where 7 siblings have one" in f.text
               for f in report.findings)  # fmt: skip


def test_the_layers_of_stacked_experts_are_each_probed_along_their_own_factors(tmp_path: Path) -> None:
    base, adapter = stacked(tmp_path)
    report = merge(base, adapter, tmp_path / "out", verify="thorough", verify_settings={"tokens": 0})
    assert statuses(report)["layers"] is Status.passed
    before, after = (tensors(folder)[STACK].double() for folder in (base, tmp_path / "out"))
    lora = load_file(adapter / "adapter_model.safetensors")
    A, B = (t.double() for _, t in sorted(lora.items()))
    worst = 0.0
    for e in range(EXPERTS):
        D = 2 * B.view(OUT, R, EXPERTS)[:, :, e] @ A.view(EXPERTS, R, IN)[e]
        E = after[e] - before[e] - D
        rows = A.view(EXPERTS, R, IN)[e]
        along = (rows / rows.norm(dim=1, keepdim=True)).T @ torch.randn(R, 5000, dtype=torch.float64)
        worst = max(worst, float((E @ along).norm() / (D @ along).norm()))
    assert report.weights[STACK]["aligned_outerr"] == pytest.approx(worst, rel=0.5)  # 16 draws of rank 2


def test_ranges_of_a_stack_end_where_its_matrices_do() -> None:
    for rows in (every_row, lambda *a: sampled_rows("w", *a)):
        ranges = rows(6 * 700, 300, 4, 6)
        assert {start // 700 for start, _ in ranges} == set(range(6))
        assert all(start // 700 == (stop - 1) // 700 and start % 4 == 0 for start, stop in ranges)
    covered = [row for start, stop in every_row(6 * 700, 300, 4, 6) for row in range(start, stop)]
    assert covered == list(range(6 * 700))


# Outliers


def test_an_adapter_at_a_wild_scale_is_told(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", shard="1GB")
    adapter = write_lora(tmp_path / "adapter", base, lora_alpha=4000)
    report = merge(base, adapter, tmp_path / "out", verify="standard", verify_settings={"tokens": 0})
    assert report.passed
    assert any("times as far as before (14 weights do): the delta is larger than the weight" in f.text
               for f in report.findings)  # fmt: skip


def test_a_few_wild_values_are_told(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", shard="1GB")
    adapter = write_lora(tmp_path / "adapter", base)
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    state[f"{key}A.weight"].zero_()[0, 7] = 1
    state[f"{key}B.weight"].zero_()[9, 0] = 1
    save_file(state, path, {"format": "pt"})
    report = merge(base, adapter, tmp_path / "out", verify="thorough", verify_settings={"tokens": 0})
    assert report.passed
    assert any("the largest value of model.layers.1.mlp.up_proj.weight is" in f.text for f in report.findings)


@pytest.mark.parametrize(("line", "number"), [("row", 33), ("column", 21)])
def test_a_row_or_column_that_no_rounding_explains_is_told(
    made: Made, tmp_path: Path, line: str, number: int
) -> None:
    """Also where the arithmetic is narrow, so that no gate asks how far single elements are off."""

    def moved(state: State, *_: Path) -> None:
        small = "model.layers.0.self_attn.q_proj.weight"
        where = (number, slice(None)) if line == "row" else (slice(None), number)
        state[small][where] = (state[small][where].float() * 1.04).bfloat16()

    sound = verify(made, made[2], "standard", "bfloat16")
    assert not [f.text for f in sound.findings if "two roundings" in f.text]
    report = verify(made, broken(made, tmp_path, moved), "standard", "bfloat16")
    assert any(f.text.startswith(f"{line} {number} of model.layers.0.self_attn.q_proj.weight is ")
               for f in report.findings)  # fmt: skip
