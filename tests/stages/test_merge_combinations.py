"""Several adapters merged as a sum, by magnitude, by TIES and by DARE: full deltas, PEFT's formulas."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from pipeline.ground import selecting, tiles
from pipeline.ground.combining import MajoritySign
from pipeline.ground.errors import PipelineError, Refused
from pipeline.ground.report import Report, Status
from pipeline.ground.selecting import draws, key
from pipeline.merging.combined import Combined
from pipeline.merging.pieces import Merged
from pipeline.merging.plan import with_deltas
from pipeline.output.layout import factor_bytes, plan_shards, tile_bytes
from pipeline.stage import Pipeline
from pipeline.weight import Adapter, Checkpoint, Weight
from tests.command import answer, refusal
from tests.making import (
    adapter_tensors,
    base_tensors,
    linear_shapes,
    lora_config,
    write_adapter,
    write_base,
)
from tests.models import LINEAR, tensors, write_llama, write_lora
from tests.running import merge, pipeline
from tests.tolerance import FLOAT32_SLACK, num_different, within_half_ulp

SCALE = 2.0  # alpha 8 over rank 4
CONFIG = lora_config(target_modules=LINEAR)
SHARES = {"a": 1.0, "b": 0.5, "c": -0.75}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude_prune": {"density": 0.3},
    "ties": {"density": 0.3},
    "dare_linear": {"density": 0.3, "seed": 4},
    "dare_ties": {"density": 0.6, "majority_sign": MajoritySign.frequency},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 `base`, adapters `a`, `b` and `c` on all of its linear modules."""
    folder = tmp_path_factory.mktemp("made")
    write_base(folder / "base", base_tensors("F32"))
    for seed, name in enumerate(SHARES):
        write_adapter(folder / name, adapter_tensors(linear_shapes(), seed=seed), CONFIG)
    return folder


def chosen(made: Path, names: str) -> dict[Path, float]:
    return {made / name: SHARES[name] for name in names}


def run(made: Path, names: str, output: Path, method: str, **more: Any) -> dict[str, torch.Tensor]:
    """The tensors of a merge of these adapters."""
    settings = more.pop("method_settings", METHODS.get(method, {}))
    merge(made / "base", chosen(made, names), output, method=method, method_settings=settings, **more)
    return tensors(output)


def deltas_of(adapter: Path) -> dict[str, torch.Tensor]:
    """The adapter's full deltas by weight name, computed in float64."""
    lora = load_file(adapter / "adapter_model.safetensors")
    prefix, found = "base_model.model.", {}
    for name in lora:
        if "lora_A" in name:
            module = name.removeprefix(prefix).removesuffix(".lora_A.weight")
            A, B = (lora[f"{prefix}{module}.lora_{x}.weight"].double() for x in "AB")
            found[f"{module}.weight"] = (B @ A) * SCALE
    return found


# Sums


def test_two_adapters_are_their_float64_sum_within_half_a_unit(made: Path, tmp_path: Path) -> None:
    before, after = tensors(made / "base"), run(made, "ab", tmp_path / "out", "exact")
    one, other = deltas_of(made / "a"), deltas_of(made / "b")
    sizes = sizes_of(made / "a", 1.0), sizes_of(made / "b", 0.5)
    for name in one:
        W = before[name].double()
        target = W + one[name] + 0.5 * other[name]
        assert within_half_ulp(after[name], target, "F32", W.abs() + sizes[0][name] + sizes[1][name])
        assert num_different(after[name], before[name]) > 0
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - one.keys())


def sizes_of(adapter: Path, share: float) -> dict[str, torch.Tensor]:
    """|share| |B| |A| times the scale."""
    lora = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for name, A in lora.items():
        if "lora_A" in name:
            B = lora[name.replace("lora_A", "lora_B")].double()
            weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
            found[weight] = abs(share) * SCALE * (B.abs() @ A.double().abs())
    return found


@pytest.mark.parametrize("method", ["exact", "linear", "magnitude_prune", "ties"])
@pytest.mark.parametrize("names", ["ab", "abc"])
def test_the_order_of_adapters_changes_no_bit(made: Path, tmp_path: Path, method: str, names: str) -> None:
    results = [run(made, "".join(order), tmp_path / "".join(order), method) for order in permutations(names)]
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_linear_is_exact_and_normalized_a_mean(made: Path, tmp_path: Path) -> None:
    plain, linear = run(made, "ab", tmp_path / "exact", "exact"), run(made, "ab", tmp_path / "sum", "linear")
    assert all(torch.equal(plain[name], linear[name]) for name in plain)
    mean = run(made, "ab", tmp_path / "mean", "linear", method_settings={"normalize": True})
    thirds = {made / "a": 1 / 1.5, made / "b": 0.5 / 1.5}
    merge(made / "base", thirds, tmp_path / "thirds")
    told = tensors(tmp_path / "thirds")
    assert all(torch.equal(mean[name], told[name]) for name in mean)
    assert any(not torch.equal(mean[name], plain[name]) for name in mean)


def test_ours_is_the_weighted_sum_and_pefts_linear_is_not(tmp_path: Path) -> None:
    """PEFT adds sqrt(w) A and sqrt(w) B of the adapters apart, so that B1 A2 and B2 A1 come in."""
    base = write_llama(tmp_path / "base", torch.float32, hidden_size=32, intermediate_size=48)
    one = write_lora(tmp_path / "one", base)
    other = write_lora(tmp_path / "other", base)
    path = other / "adapter_model.safetensors"
    random = torch.Generator().manual_seed(5)
    save_file(
        {n: torch.randn(t.shape, generator=random) * 0.05 for n, t in load_file(path).items()},
        path,
        {"format": "pt"},
    )
    merge(base, {one: 0.7, other: 0.4}, tmp_path / "out", method="linear")
    before, after = tensors(base), tensors(tmp_path / "out")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(one), adapter_name="one"
    )
    model.load_adapter(str(other), "other")
    model.add_weighted_adapter(["one", "other"], [0.7, 0.4], "both", combination_type="linear")
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = f"{name.removeprefix('base_model.model.')}.weight"
        A, B = ({k: v.weight.detach().double() for k, v in x.items()} for x in (layer.lora_A, layer.lora_B))
        true = 1.5 * (0.7 * (B["one"] @ A["one"]) + 0.4 * (B["other"] @ A["other"]))
        ours = after[weight].double() - before[weight].double()
        theirs = layer.get_delta_weight("both").detach().double()
        assert float((ours - true).norm() / true.norm()) < 2 * FLOAT32_SLACK
        assert float((theirs - true).norm() / true.norm()) > 0.3


# Magnitudes, TIES, DARE


def by_peft(method: str, name: str, deltas: list[torch.Tensor], shares: list[float]) -> torch.Tensor:
    """PEFT's function on full deltas; DARE with our masks in place of its chance."""
    settings, weights = METHODS[method], torch.tensor(shares)
    density = settings["density"]
    if method == "magnitude_prune":
        return merge_utils.magnitude_prune(deltas, weights, density)
    if method == "ties":
        return merge_utils.ties(deltas, weights, density)
    for number, delta in enumerate(deltas):
        drawn = draws(key(settings.get("seed", 0), number, name), 0, delta.numel(), "cpu")
        deltas[number] = delta * (drawn < int(density * 2**53)).view(delta.shape) / density
    if method == "dare_linear":
        return merge_utils.task_arithmetic(deltas, weights)
    return merge_utils.ties(deltas, weights, 1.0, "frequency")


@pytest.mark.filterwarnings("ignore:The density 1.0")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("names", ["a", "ab"])
def test_combinations_are_pefts_on_full_deltas(made: Path, tmp_path: Path, method: str, names: str) -> None:
    before, after = tensors(made / "base"), run(made, names, tmp_path / "out", method)
    full = [deltas_of(made / name) for name in names]
    for name in full[0]:
        deltas = [delta[name].float() for delta in full]
        expected = before[name] + by_peft(method, name, deltas, [SHARES[n] for n in names])
        assert num_different(after[name], expected) == 0
        assert num_different(after[name], before[name]) > 0
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - full[0].keys())


@pytest.mark.filterwarnings("ignore:The density 1.0")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_combinations_are_rounded_once_and_verified(
    made: Path, tmp_path: Path, method: str, dtype: str
) -> None:
    settings: dict[str, Any] = {"method": method, "method_settings": METHODS[method], "dtype": dtype}
    report = merge(
        made / "base",
        chosen(made, "abc"),
        tmp_path / "out",
        verify="standard",
        **settings,
    )
    gates = {gate.name: gate.status for gate in report.gates}
    assert gates.pop("logits") is Status.skipped
    assert set(gates.values()) == {Status.passed}
    assert f"logits were not compared: base and adapters do not add up to what {method} merges" in [
        finding.text for finding in report.findings
    ]
    before, after = tensors(made / "base"), tensors(tmp_path / "out")
    full = [deltas_of(made / name) for name in SHARES]
    kind = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    for name in full[0]:
        deltas = [delta[name].float() for delta in full]
        size = (
            before[name].abs()
            + sum(abs(s) * d.abs() for s, d in zip(SHARES.values(), deltas, strict=True))
            / (METHODS[method]["density"])
        )
        delta = by_peft(method, name, deltas, list(SHARES.values()))
        assert within_half_ulp(after[name], before[name].double() + delta.double(), kind, size)


@pytest.mark.parametrize("method", METHODS)
def test_float64_arithmetic_keeps_the_same_elements(made: Path, tmp_path: Path, method: str) -> None:
    narrow = run(made, "ab", tmp_path / "narrow", method)
    wide = run(made, "ab", tmp_path / "wide", method, merge_dtype="float64")
    one, other = deltas_of(made / "a"), deltas_of(made / "b")
    for name in one:
        size = (one[name].abs() + other[name].abs()) / METHODS[method]["density"]
        assert within_half_ulp(narrow[name], wide[name].double(), "F32", narrow[name].abs() + size)


@pytest.mark.parametrize("merge_dtype", ["bfloat16", "float16"])
def test_a_narrow_merge_dtype_adds_the_rounded_combination(
    made: Path, tmp_path: Path, merge_dtype: str
) -> None:
    before, after = tensors(made / "base"), run(made, "ab", tmp_path / "out", "ties", merge_dtype=merge_dtype)
    one, other, kind = deltas_of(made / "a"), deltas_of(made / "b"), getattr(torch, merge_dtype)
    for name in one:
        delta = by_peft("ties", name, [one[name].float(), other[name].float()], [1.0, 0.5])
        assert num_different(after[name], (before[name].to(kind) + delta.to(kind)).float()) == 0


@pytest.mark.parametrize("method", ["magnitude_prune", "dare_linear"])
def test_a_density_of_one_is_the_plain_sum(made: Path, tmp_path: Path, method: str) -> None:
    plain = run(made, "abc", tmp_path / "plain", "exact")
    all_of_it = run(made, "abc", tmp_path / "all", method, method_settings={"density": 1.0})
    assert all(torch.equal(plain[name], all_of_it[name]) for name in plain)


def test_the_weight_of_the_merge_scales_the_combination(made: Path, tmp_path: Path) -> None:
    plain, half = (
        run(made, "ab", tmp_path / "1", "ties"),
        run(made, "ab", tmp_path / "2", "ties", weight=-2.0),
    )
    before = tensors(made / "base")
    for name, W in before.items():
        one, other = (x[name].double() - W.double() for x in (plain, half))
        assert bool(((-2 * one - other).abs() <= FLOAT32_SLACK * 4 * (W.abs() + one.abs())).all())


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_the_seed_alone_decides(made: Path, tmp_path: Path, method: str) -> None:
    one, again, other = (
        run(made, "ab", tmp_path / str(n), method, method_settings={"density": 0.3, "seed": seed})
        for n, seed in enumerate((1, 1, 2))
    )
    changed = deltas_of(made / "a")
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in changed)


@pytest.mark.parametrize("method", METHODS)
def test_neither_tiles_nor_workers_change_a_bit(
    made: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(made, "abc", tmp_path / "plain", method)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 100)
    monkeypatch.setattr(selecting, "WORKERS", 3)
    monkeypatch.setattr("pipeline.stages.save.merged.num_workers", lambda: 5)
    cut = run(made, "abc", tmp_path / "cut", method)
    assert all(torch.equal(plain[name], cut[name]) for name in plain)


# Verification


@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_verification_has_the_same_elements_with_other_rows(
    made: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(made, "ab", tmp_path / "out", method)
    monkeypatch.setattr("pipeline.ground.reference._SAMPLE_ELEMENTS", 128)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 200)
    assert verified(made, tmp_path / "out", method).passed


def test_verification_finds_an_element_of_another_choice(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    state = run(made, "ab", out, "ties")
    weight = "model.layers.1.mlp.up_proj.weight"
    at = (state[weight] == tensors(made / "base")[weight]).nonzero()[0].tolist()
    state[weight][tuple(at)] += deltas_of(made / "a")[weight][tuple(at)]
    (path,) = out.glob("*.safetensors")
    save_file(state, path, {"format": "pt"})
    with pytest.raises(PipelineError, match=f"rounding: .* 1 too far off, the worst in {weight}"):
        verified(made, out, "ties")


@pytest.mark.parametrize("other", ["exact", "magnitude_prune"])
def test_verification_tells_methods_apart(made: Path, tmp_path: Path, other: str) -> None:
    run(made, "ab", tmp_path / "out", "ties")
    with pytest.raises(PipelineError, match="rounding"):
        verified(made, tmp_path / "out", other)


def verified(made: Path, folder: Path, method: str) -> Report:
    return merge(
        made / "base",
        chosen(made, "ab"),
        folder,
        save="existing",
        verify="standard",
        verify_settings={"tokens": 0},
        method=method,
        method_settings=METHODS.get(method, {}),
    )


# Deltas that give a value, and those that reach a part of a weight


def test_a_value_takes_part_with_its_change(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", torch.float32, hidden_size=32, intermediate_size=48)
    adapter = write_lora(tmp_path / "adapter", base, use_dora=True, modules_to_save=["lm_head"])
    merge(base, adapter, tmp_path / "exact")
    settings = {"density": 0.25}
    merge(base, adapter, tmp_path / "out", method="magnitude_prune", method_settings=settings)
    before, whole, after = (tensors(tmp_path / name) for name in ("base", "exact", "out"))
    moved = [name for name in before if not torch.equal(before[name], whole[name])]
    assert len(moved) >= 14
    for name in moved:
        change = (whole[name].double() - before[name].double()).abs()
        kept = after[name] != before[name]
        assert int(kept.sum()) <= int(0.25 * kept.numel())  # fewer where a change is below half a unit
        assert int(kept.sum()) >= int(0.25 * kept.numel()) - 2
        assert float(change[kept].min()) >= float(change[~kept].max()) - FLOAT32_SLACK
        size = 4 * (whole[name].abs() + before[name].abs())  # W + BA may cancel, and is scaled
        assert within_half_ulp(after[name][kept], whole[name].double()[kept], "F32", size[kept])


def test_where_a_value_meets_another_adapter_every_method_refuses(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", torch.float32, hidden_size=32, intermediate_size=48)
    dora = write_lora(tmp_path / "dora", base, use_dora=True)
    lora = write_lora(tmp_path / "lora", base)
    for method in ("exact", "linear", *METHODS):
        planned = pipeline(base, {dora: 1.0, lora: 1.0}, tmp_path / "out", method=method)
        with pytest.raises(Refused, match="whose order would change the result"):
            planned.plan()


def test_density_counts_what_an_adapter_reaches(made: Path, tmp_path: Path) -> None:
    """Gate and up in one weight: an adapter on one of them keeps a share of that, not of both."""
    planned = ties(made, tmp_path, "a")
    checkpoint = merged(planned)
    (first,) = [w for w in checkpoint.weights if w.name == "model.layers.0.mlp.gate_proj.weight"]
    assert isinstance(first, Combined)
    rows, columns = first.shape
    fused = replace(first.base, shape=(2 * rows, columns), entry=None)  # type: ignore[call-arg]
    weight = with_deltas(
        _Zeros(fused.name, fused.shape, "F32"),
        [replace(placed, row=rows) for placed in first.placed],
        "F32",
        first.combination,
    )
    with weight.open("cpu") as opened:
        delta = opened(0, 2 * rows).delta
    assert delta is not None
    assert not bool(delta[:rows].any())
    assert int(delta[rows:].count_nonzero()) == int(0.3 * rows * columns)


class _Zeros(Weight):
    """A base of zeros."""

    def open(self, device: str) -> Any:
        from contextlib import nullcontext

        from pipeline.weight import Tile

        def tile(start: int, stop: int) -> Tile:
            value = torch.zeros(stop - start, self.num_columns)
            return Tile(value, value)

        return nullcontext(tile)


def ties(made: Path, tmp_path: Path, names: str, **more: Any) -> Pipeline:
    settings = {"method": "ties", "method_settings": METHODS["ties"], **more}
    return pipeline(made / "base", chosen(made, names), tmp_path / "out", **settings)


def merged(planned: Pipeline) -> Checkpoint[Weight]:
    return planned.merge(planned.dequantize(planned.load()), planned.extract())


# Memory


class Live(TorchDispatchMode):
    """The most bytes that tensors made within it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, weakref.ref[torch.Tensor]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._made |= {id(t): weakref.ref(t) for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        alive = {number: t for number, ref in self._made.items() if (t := ref()) is not None}
        self._made = {number: self._made[number] for number in alive}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive.values()}
        self.most = max(self.most, sum(storages.values()))
        return out


@pytest.mark.parametrize("arithmetic", ["F32", "F64"])
@pytest.mark.parametrize("method", ["exact", *METHODS])
@pytest.mark.parametrize("names", ["a", "ab", "abc"])
def test_memory_is_as_planned_whatever_the_size_of_a_weight(
    tmp_path: Path, method: str, names: str, arithmetic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 1 << 15)
    monkeypatch.setattr(selecting, "in_order", in_turn)  # the mode sees this thread alone
    opened, config = [], lora_config(target_modules=["q_proj"])
    for width in (512, 1024):
        shapes = {"model.layers.0.self_attn.q_proj": (width, 256)}
        folder = tmp_path / str(width)
        base = base_tensors("F32", layers=1)
        for name, shape in shapes.items():
            base[f"{name}.weight"] = base_tensors("F32", layers=1, hidden=width)[f"{name}.weight"]._replace(
                shape=shape, data=bytes(4 * width * 256)
            )
        write_base(folder / "base", base)
        for seed, name in enumerate(names):
            write_adapter(folder / name, adapter_tensors(shapes, seed=seed, shapes=shapes), config)
        settings = {"method": method, "method_settings": METHODS.get(method, {})}
        checkpoint = merged(pipeline(folder / "base", chosen(folder, names), folder / "out", **settings))
        [weight] = [w for w in checkpoint.weights if isinstance(w, Merged)]
        weight = replace(weight, arithmetic=arithmetic)
        shards = plan_shards(replace(checkpoint, weights=(weight,)), lambda w: w.dtype, None)
        with Live() as opening, weight.open("cpu") as rows:
            opened.append(opening.most)
            assert opening.most <= 2 * factor_bytes(shards)  # as the plan counts it
            with Live() as computing:
                rows(0, 128)
            assert computing.most <= tile_bytes(shards)
    factors = sum(placed.delta.state_bytes for placed in weight.placed)  # which grow with the weight
    assert opened[1] <= opened[0] + factors


def in_turn(tasks: Iterator[Callable[[], Any]], workers: int, window: int) -> Any:
    from contextlib import nullcontext

    return nullcontext(task() for task in tasks)


# Requests


def arguments(made: Path, *more: str) -> tuple[str, ...]:
    adapters = f"adapter=[{{path:{made}/a}},{{path:{made}/b,weight:0.5}}]"
    return f"base_model={made}/base", adapters, "output=out", *more


def test_the_plan_names_the_method(made: Path, tmp_path: Path) -> None:
    said = answer(*arguments(made, "merge=ties", "merge.density=0.2", "dry_run=true"), cwd=tmp_path)
    assert said.status == 0, said
    assert "a + 0.5 b (ties, density 0.2, signs by total): 14 x LoRA rank 4 scale 2" in said.out
    said = answer(*arguments(made, "merge=dare_ties", "seed=9", "dry_run=true"), cwd=tmp_path)
    assert "a + 0.5 b (dare_ties, density 0.5, seed 9, signs by total): " in said.out
    said = answer(*arguments(made, "merge=linear", "merge.normalize=true", "dry_run=true"), cwd=tmp_path)
    assert "a + 0.5 b: 14 x LoRA rank 4 scale 1.33333, 14 x LoRA rank 4 scale 0.666667" in said.out


def test_a_merge_from_the_command_line(made: Path, tmp_path: Path) -> None:
    more = ("merge=dare_ties", "merge.majority_sign=frequency", "seed=3", "verify=structure")
    said = answer(*arguments(made, *more), cwd=tmp_path)
    assert said.status == 0, said
    told = {"density": 0.5, "seed": 3, "majority_sign": MajoritySign.frequency}
    same = run(made, "ab", tmp_path / "same", "dare_ties", method_settings=told)
    after = tensors(tmp_path / "out")
    assert all(torch.equal(after[name], same[name]) for name in same)
    assert '"seed": 3' in (tmp_path / "out" / "merge.json").read_text()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("density", ["0", "1.5", "-0.1", "nan"])
def test_a_density_that_is_no_share_is_refused(made: Path, tmp_path: Path, method: str, density: str) -> None:
    said = refusal(tmp_path, *arguments(made, f"merge={method}", f"merge.density={density}"))
    assert said == (
        f"merge.density: {float(density):g} is no share of a delta to keep; give a number above 0, at most 1"
    )


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("merge=ties", "merge.weight=0"), "merge.weight: 0.0 would merge nothing"),
        (
            ("merge=ties", "merge.majority_sign=most"),
            "merge.majority_sign: 'most' is none of total, frequency",
        ),
        (("merge=dare_linear", "merge.seed=1"), "merge.seed: no such key"),
        (("merge=dare_linear", "merge.majority_sign=total"), "merge.majority_sign: no such key"),
        (("merge=exact", "merge.density=0.5"), "merge.density: no such key"),
        (("merge=dare_linear", "seed=one"), "seed: 'one' is not a whole number"),
    ],
)
def test_wrong_settings_are_refused(made: Path, tmp_path: Path, more: tuple[str, ...], sentence: str) -> None:
    assert refusal(tmp_path, *arguments(made, *more)).startswith(sentence)


@pytest.mark.parametrize(("weight", "total"), [("-1", "0"), ("-3", "-2")])
def test_a_mean_over_weights_without_a_sum_is_refused(
    made: Path, tmp_path: Path, weight: str, total: str
) -> None:
    adapters = f"adapter=[{{path:{made}/a}},{{path:{made}/b,weight:{weight}}}]"
    request = (f"base_model={made}/base", adapters, "output=out", "merge=linear", "merge.normalize=true")
    assert refusal(tmp_path, *request) == (
        f"merge.normalize: the adapters' weights sum to {total}; a mean needs a sum above 0, "
        "normalize=false takes them as they are"
    )


def test_normalized_weights_leave_what_save_knows_of_the_adapters(made: Path, tmp_path: Path) -> None:
    planned = pipeline(made / "base", chosen(made, "ab"), tmp_path / "out", method="linear")
    adapter = planned.extract()
    assert isinstance(adapter, Adapter)
    assert [part.weight for part in adapter.parts] == [1.0, 0.5]
