"""extract=svd over adapters: other kinds become LoRA, several become one, one becomes smaller.

Held against PEFT in float64: the merge of the adapter that came out against that of the one that went in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, convert_to_lora
from transformers import AutoModelForCausalLM

from pipeline.ground.errors import Refused
from pipeline.ground.ranks import NoiseEdge
from tests import kind_cases, lora_cases
from tests.beside_peft import Case, State, merged_by_peft, quiet, write
from tests.command import answer
from tests.models import tensors, write_llama, write_lora
from tests.stages.extracting import config_of, extract
from tests.tolerance import FLOAT32_FACTORS

ALL_CASES: dict[str, Case] = {**kind_cases.CASES, **lora_cases.CASES}
# Kinds that add to weights, each with the rank that what it adds has here; None where it has all ranks.
ADDITIVE: dict[str, int | None] = {
    "LoHa": 16,
    "LoKr": None,
    "AdaLoRA on Conv1D": 6,
    "VeRA": 8,
    "RandLoRA": None,
    "FourierFT": None,
    "C3A": None,
    "VBLoRA": 4,
    "SHiRA": None,
    "MiSS": 4,
    "DeLoRA": 4,
    "GraLoRA": 8,
    "HiRA": None,
    "patterns": 8,
    "bdlora": 4,
    "embeddings": 4,
    "convolutions": 4,
    "experts rslora": 4,
    "lora_bias conv1d": 4,
    "bias all": 4,
    "larger, both trained": 4,
    "larger, tied": 4,
    "tied, head saved": 4,
}
REFUSED = {
    "dora": "DoRA rank 4",
    "IA3": "IA3 on inputs",
    "OFT": "OFT blocks of 4",
    "BOFT": "BOFT 1 factors",
    "HRA": "HRA 4 reflections",
    "MiSS, bat": "MiSS bat r 4",
    "tokens": "3 token rows",
}


def written(name: str, folder: Path) -> Case:
    with quiet():
        write(ALL_CASES[name], folder, torch.float32)
    return ALL_CASES[name]


def by_peft(case: Case, folder: Path, adapter: str) -> State:
    """PEFT's merge of one of the folder's adapters in float64."""
    seen = folder / f"with {adapter}"
    seen.mkdir()
    (seen / "base").symlink_to(folder / "base")
    (seen / "adapter").symlink_to(folder / adapter)
    with quiet():
        return merged_by_peft(case, seen, torch.float64)


def apart(one: State, other: State, base: State) -> dict[str, float]:
    """For each weight that differs, ||one - other|| as a share of the change."""
    found = {}
    for name, value in other.items():
        before = base.get(name)
        size = value if before is None or before.shape != value.shape else value - before
        found[name] = float((one[name] - value).norm() / size.norm().clamp_min(1e-30))
    return found


@pytest.mark.parametrize("name", ADDITIVE)
def test_what_adds_to_weights_becomes_a_lora_of_the_rank_that_it_has(tmp_path: Path, name: str) -> None:
    case = written(name, tmp_path)
    with quiet():
        report = extract(
            tmp_path / "base", None, tmp_path / "out", adapter=tmp_path / "adapter", rank=NoiseEdge()
        )
    assert report.passed
    config, rank = config_of(tmp_path / "out"), ADDITIVE[name]
    assert (config["peft_type"], config["use_dora"], config["lora_bias"]) == ("LORA", False, False)
    if rank is not None:
        assert max(config["r"], *config["rank_pattern"].values(), 0) == rank
    wanted, found = by_peft(case, tmp_path, "adapter"), by_peft(case, tmp_path, "out")
    assert wanted.keys() == found.keys()
    worst = apart(found, wanted, tensors(tmp_path / "base"))
    assert {weight: far for weight, far in worst.items() if far > FLOAT32_FACTORS} == {}


@pytest.mark.parametrize("name", REFUSED)
def test_what_depends_on_the_base_is_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    written(name, tmp_path)
    with quiet(), pytest.raises(Refused, match=rf"adapter: '.*' has {REFUSED[name]}.* whose change depends"):
        extract(tmp_path / "base", None, tmp_path / "out", adapter=tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


def test_norms_alone_are_no_lora(tmp_path: Path) -> None:
    written("LN tuning", tmp_path)
    with quiet(), pytest.raises(Refused, match="PEFT takes no adapter of saved modules alone"):
        extract(tmp_path / "base", None, tmp_path / "out", adapter=tmp_path / "adapter")


@pytest.mark.parametrize("name", ["LoHa", "C3A"])
def test_no_conversion_of_pefts_holds_more_at_the_same_rank(tmp_path: Path, name: str) -> None:
    """PEFT's own takes a full SVD of each delta, so it is the best there is."""
    case = written(name, tmp_path)
    with quiet():
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")
        )
        told, theirs = convert_to_lora(model, rank=5)
        extract(tmp_path / "base", None, tmp_path / "out", adapter=tmp_path / "adapter", rank=5)
    exact, base = by_peft(case, tmp_path, "adapter"), tensors(tmp_path / "base")
    ours = tensors(tmp_path / "out")
    assert told.r == 5
    for key in (k for k in ours if k.endswith("lora_A.weight")):
        weight = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        D = exact[weight] - base[weight]

        def missed(found: Any, key: str = key, D: torch.Tensor = D) -> float:
            A, B = (found[key.replace("lora_A", x)].double() for x in ("lora_A", "lora_B"))
            return float((D - B @ A).norm())

        assert missed(ours) <= missed(theirs) * (1 + FLOAT32_FACTORS)


@pytest.fixture
def several(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base, and two adapters of ranks 4 and 3 on some of the same modules."""
    with quiet():
        base = write_llama(tmp_path / "base", torch.float32)
        one = write_lora(tmp_path / "one", base, target_modules=["q_proj", "up_proj"], use_rslora=True)
        two = write_lora(tmp_path / "two", base, r=3, size=0.07, target_modules=["q_proj", "v_proj"])
    for key, value in (held := tensors(two)).items():
        held[key] = value.flip(0).contiguous()  # else both begin with the same numbers
    from safetensors.torch import save_file

    save_file(held, two / "adapter_model.safetensors", {"format": "pt"})
    return base, one, two


def combined(base: Path, weights: dict[Path, float]) -> State:
    """The sum of PEFT's merges in float64."""
    before = {name: value.double() for name, value in tensors(base).items()}
    total = dict(before)
    for adapter, weight in weights.items():
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
            merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
        for name in before:
            total[name] = total[name] + weight * (merged[name] - before[name])
    return total


def test_several_adapters_become_one_of_the_rank_of_their_sum(
    several: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, one, two = several
    weights = {one: 0.75, two: -0.5}
    with quiet():
        extract(base, None, tmp_path / "out", adapter=weights, rank=NoiseEdge())
    config = config_of(tmp_path / "out")
    ranks = {name.split(".")[-1]: rank for name, rank in config["rank_pattern"].items()}
    assert (config["r"], ranks) == (7, {"up_proj": 4, "v_proj": 3})
    worst = apart(combined(base, {tmp_path / "out": 1.0}), combined(base, weights), tensors(base))
    assert max(worst.values()) < FLOAT32_FACTORS


def test_one_of_a_lower_rank_is_the_best_there_is(several: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, two = several
    with quiet():
        extract(base, None, tmp_path / "out", adapter={one: 1.0, two: 1.0}, rank=3)
    exact, found = combined(base, {one: 1.0, two: 1.0}), combined(base, {tmp_path / "out": 1.0})
    before = tensors(base)
    for name in (n for n in before if "q_proj" in n):
        D = exact[name] - before[name]
        best = torch.linalg.svdvals(D)[3:].norm()
        assert float((found[name] - exact[name]).norm() / best) < 1 + FLOAT32_FACTORS


def test_the_recipe_shrinks_by_noise_energy_and_budget(
    several: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, one, two = several
    request = ("recipe=shrink", f"base_model={base}", f"adapter=[{one},{{path: {two}, weight: 0.5}}]")
    for name, rank in (("auto", "auto"), ("share", "{energy: 0.9}"), ("count", "{parameters: 1500}")):
        said = answer(*request, f"output={name}", f"rank={rank}", cwd=tmp_path)
        assert said.status == 0, said.err
    sizes = {n: sum(t.numel() for t in tensors(tmp_path / n).values()) for n in ("auto", "share", "count")}
    assert sizes["share"] < sizes["auto"]
    assert 1500 - 176 < sizes["count"] <= 1500  # within a rank of up_proj
    exact, found = (combined(base, w) for w in ({one: 1.0, two: 0.5}, {tmp_path / "share": 1.0}))
    for name, before in tensors(base).items():
        if name.endswith("proj.weight") and bool((exact[name] != before).any()):
            missed = (exact[name] - found[name]).square().sum() / (exact[name] - before).square().sum()
            assert float(missed) <= 0.1 + FLOAT32_FACTORS


def test_the_tokenizer_that_an_adapter_brings_goes_along(
    several: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, one, _ = several
    (one / "tokenizer.json").write_text('{"version": "1.0"}')
    with quiet():
        extract(base, None, tmp_path / "out", adapter=one, rank=2)
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"version": "1.0"}'
