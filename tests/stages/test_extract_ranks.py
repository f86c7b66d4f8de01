"""Rank rules end to end: what a recipe sets of ranks is what the adapter's tensors have."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.ground.dtypes import FloatDtype
from pipeline.ground.ranks import Budget, Energy
from tests.beside_peft import quiet
from tests.models import tensors
from tests.stages.extracting import config_of, extract, noisy

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
NORMS = 5 * 32  # elements of all norms
COSTLIEST = 2 * (96 + 32)  # parameters of a rank of tied embeddings, which a file holds twice


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a fine-tune that differ in everything."""
    here = tmp_path_factory.mktemp("pair")
    with quiet():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=request.param))
        model.save_pretrained(here / "base")
        noisy(model)
        model.save_pretrained(here / "tuned")
    return here / "base", here / "tuned"


def extracted(folders: tuple[Path, Path], out: Path, **settings: Any) -> dict[str, torch.Tensor]:
    with quiet():
        assert extract(*folders, out, **settings).passed
    return tensors(out)


def ranks(held: dict[str, torch.Tensor]) -> dict[str, int]:
    found = {}
    for key, value in held.items():
        if key.endswith(("lora_A.weight", "lora_embedding_A")):
            found[key.removeprefix("base_model.model.").rpartition(".lora")[0]] = len(value)
    return found


@pytest.mark.parametrize("budget", [1000, 3000, 9000, 10**6])
def test_a_budget_of_parameters_counts_all_that_the_file_holds(
    folders: tuple[Path, Path], tmp_path: Path, budget: int
) -> None:
    held = extracted(folders, tmp_path / "out", rank=Budget(budget, in_bytes=False))
    spent = sum(t.numel() for t in held.values())
    full = budget == 10**6
    assert spent <= budget
    assert full or spent > budget - COSTLIEST
    if full:
        assert set(ranks(held).values()) == {16, 32}


@pytest.mark.parametrize(("factors", "size"), [("float32", 4), ("bfloat16", 2)])
def test_a_budget_of_bytes_counts_factors_and_saved_modules_in_their_dtypes(
    folders: tuple[Path, Path], tmp_path: Path, factors: str, size: int
) -> None:
    budget = 16000
    settings = {"saved_modules": ("norm", "input_layernorm"), "factors": FloatDtype[factors]}
    held = extracted(folders, tmp_path / "out", rank=Budget(budget, in_bytes=True), **settings)
    spent = sum(t.numel() * t.element_size() for t in held.values())
    assert budget - COSTLIEST * size < spent <= budget
    saved = [key for key, t in held.items() if "lora" not in key]
    assert all(held[key].dtype == torch.float32 for key in saved)


def test_a_budget_buys_multiples_up_to_the_most_and_leaves_what_has_its_own_rank(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = {"rank_pattern": {"down_proj": 5}, "max_rank": 12, "multiple_of": 4}
    held = extracted(folders, tmp_path / "out", rank=Budget(12000, in_bytes=False), **settings)
    found = ranks(held)
    assert {rank for name, rank in found.items() if name.endswith("down_proj")} == {8}  # a multiple, too
    assert set(found.values()) <= {4, 8, 12}
    assert sum(t.numel() for t in held.values()) <= 12000


def test_a_larger_budget_never_holds_less(folders: tuple[Path, Path], tmp_path: Path) -> None:
    energies = []
    for budget in (1500, 3000, 6000):
        with quiet():
            report = extract(*folders, tmp_path / str(budget), rank=Budget(budget, in_bytes=False))
        found = report.extraction["weights"].values()
        missed = sum(w["energy"] * (1 - w["captured"]) for w in found)
        energies.append(missed / sum(w["energy"] for w in found))
    assert all(more > less for more, less in pairwise(energies))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_an_energy_is_reached_by_every_matrix_and_by_no_rank_less(
    folders: tuple[Path, Path], tmp_path: Path, share: float
) -> None:
    base, tuned = folders
    held = extracted(folders, tmp_path / "out", rank=Energy(share))
    before, after = tensors(base), tensors(tuned)
    for module, rank in ranks(held).items():
        name = f"{module}.weight"
        if name not in before:
            continue  # the head that shares the embeddings
        energies = torch.linalg.svdvals((after[name] - before[name]).double()).square()
        held_by = energies.cumsum(0) / energies.sum()
        assert float(held_by[rank - 1]) >= share - 1e-6  # its singular values are in float32
        assert rank == 1 or float(held_by[rank - 2]) < share + 1e-6


def test_ranks_and_scales_by_pattern_reach_the_modules_that_they_name(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    patterns = {"rank_pattern": {"re:.*layers.1.*up_proj": 7, "mlp": 3}, "alpha_pattern": {"q_proj": 10}}
    held = extracted(folders, tmp_path / "out", rank=5, alpha=20.0, **patterns)
    found, config = ranks(held), config_of(tmp_path / "out")
    assert (found["model.layers.0.mlp.up_proj"], found["model.layers.1.mlp.up_proj"]) == (3, 7)
    assert (found["model.layers.0.self_attn.q_proj"], config["lora_alpha"]) == (5, 20)
    assert config["alpha_pattern"] == {f"model.layers.{n}.self_attn.q_proj": 10 for n in range(2)}


def test_a_router_that_is_smaller_than_the_rank_is_saved_and_a_layer_is_refused(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from pipeline.ground.errors import Refused

    with quiet():
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, tie_word_embeddings=False))
        model.save_pretrained(tmp_path / "base")
        noisy(model)
        model.save_pretrained(tmp_path / "tuned")
        folders = (tmp_path / "base", tmp_path / "tuned")
        extract(*folders, tmp_path / "out", rank=8)
        assert "model.layers.0.mlp.gate" in config_of(tmp_path / "out")["modules_to_save"]
        with pytest.raises(
            Refused, match=r"rank: 20 is more than model\.layers\.0\.self_attn\.k_proj\.weight"
        ):
            extract(*folders, tmp_path / "large", rank=20)
        with pytest.raises(
            Refused, match=r"rank: 8 is more than model\.layers\.0\.mlp\.gate\.weight \(4 x 32"
        ):
            extract(*folders, tmp_path / "named", rank=8, targeted_modules=("mlp",))
