"""`tied`: what becomes of embeddings that lm_head shares, by policy and by what the adapter changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pipeline.ground.errors import Refused
from pipeline.ground.report import Report
from pipeline.weight import Tied
from tests.beside_peft import Case, load_base, quiet, quietly_merged, with_noise, write, write_base
from tests.lora_cases import ENDS, TIED, lora
from tests.models import tensors
from tests.peft_defects import EMBED, HEAD, SCALE, Files, with_copies
from tests.tolerance import FLOAT32_SLACK

EMBEDDINGS, OUTPUT = f"{EMBED}.weight", f"{HEAD}.weight"
ADAPTERS: dict[str, Callable[[], LoraConfig]] = {
    "embeddings": lora(target_modules=ENDS[:1]),
    "head": lora(target_modules=ENDS[1:]),
    "both": lora(target_modules=ENDS),
    "as one": lora(target_modules=ENDS[:1], ensure_weight_tying=True),
    "tokens": lora(target_modules=["q_proj"], trainable_token_indices=[3, 77]),
    "head saved": lora(target_modules=["q_proj"], modules_to_save=ENDS[1:]),
    "embeddings saved": lora(target_modules=["q_proj"], modules_to_save=ENDS[:1]),
}  # type: ignore[dict-item]


def made(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> None:
    rewrite = with_copies if name == "as one" else lambda folder: None
    with quiet():
        write(Case(TIED, ADAPTERS[name], rewrite=rewrite), folder, dtype)


def merged(folder: Path, tied: str, base: str = "base", **settings: Any) -> Report:
    told = {"tied": Tied[tied]}
    return quietly_merged(
        folder / base,
        folder / "adapter",
        folder / "out",
        method_settings=told,
        verify="standard",
        verify_settings={"tokens": 0},
        **settings,
    )


def is_tied(folder: Path) -> bool:
    found: bool = json.loads((folder / "out" / "config.json").read_text())["tie_word_embeddings"]
    return found


def change(folder: Path, name: str) -> torch.Tensor:
    """What was added to the shared tensor, in float64."""
    return tensors(folder / "out")[name].double() - tensors(folder / "base")[EMBEDDINGS].double()


def is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Two deltas of the same size as the base: equal up to float32 sums."""
    return bool((one - other).abs().max() <= 2 * FLOAT32_SLACK * (1 + other.abs().max()))


@pytest.mark.parametrize("policy", ["auto", "untie"])
@pytest.mark.parametrize("name", ["embeddings", "head", "both"])
def test_each_side_gets_its_own_delta_and_the_config_says_untied(
    name: str, policy: str, tmp_path: Path
) -> None:
    made(tmp_path, name)
    report = merged(tmp_path, policy)
    files = Files(tmp_path)
    on_embeddings = SCALE * files.embedding(EMBED) if name != "head" else torch.zeros(())
    on_head = SCALE * files.lora(HEAD) if name != "embeddings" else torch.zeros(())
    assert is_close(change(tmp_path, EMBEDDINGS), on_embeddings)
    assert is_close(change(tmp_path, OUTPUT), on_head)
    assert not is_tied(tmp_path)
    assert any("lm_head.weight is written" in finding.text for finding in report.plan.findings)


@pytest.mark.parametrize("name", ["embeddings", "head", "both"])
def test_shared_puts_every_delta_into_the_one_tensor_as_peft_does(name: str, tmp_path: Path) -> None:
    made(tmp_path, name)
    report = merged(tmp_path, "shared")
    assert any("was trained for one side" in finding.text for finding in report.plan.findings)
    files = Files(tmp_path)
    total = torch.zeros(80, 32, dtype=torch.float64)
    total += SCALE * files.embedding(EMBED) if name != "head" else 0
    total += SCALE * files.lora(HEAD) if name != "embeddings" else 0
    assert is_close(change(tmp_path, EMBEDDINGS), total)
    assert OUTPUT not in tensors(tmp_path / "out")
    assert is_tied(tmp_path)


@pytest.mark.parametrize("policy", ["auto", "shared"])
def test_what_was_trained_as_one_is_added_once_and_stays_tied(policy: str, tmp_path: Path) -> None:
    made(tmp_path, "as one")
    report = merged(tmp_path, policy)
    assert is_close(change(tmp_path, EMBEDDINGS), SCALE * Files(tmp_path).embedding(EMBED))
    assert OUTPUT not in tensors(tmp_path / "out")
    assert is_tied(tmp_path)
    assert any("it is used once, for both" in finding.text for finding in report.plan.findings)


def test_what_was_trained_as_one_can_be_untied(tmp_path: Path) -> None:
    made(tmp_path, "as one")
    merged(tmp_path, "untie")
    D = SCALE * Files(tmp_path).embedding(EMBED)
    assert is_close(change(tmp_path, EMBEDDINGS), D)
    assert is_close(change(tmp_path, OUTPUT), D)
    assert not is_tied(tmp_path)


def test_a_tie_that_peft_has_broken_is_not_merged_as_one(tmp_path: Path) -> None:
    """On a 16-bit base PEFT casts the adapter to float32 after tying it: the two sides train apart."""
    with quiet():
        write(Case(TIED, ADAPTERS["as one"]), tmp_path, torch.bfloat16)
    held = tensors(tmp_path / "adapter")
    A, B = (held[f"base_model.model.{key}"] for key in (f"{EMBED}.lora_embedding_A", f"{HEAD}.lora_B.weight"))
    assert not torch.equal(A, B.T)
    with pytest.raises(
        Refused, match="ensure_weight_tying says that embeddings and lm_head are one, but what"
    ):
        merged(tmp_path, "auto")
    merged(tmp_path, "untie")
    files = Files(tmp_path)
    ours = tensors(tmp_path / "out")
    for name, D in ((EMBEDDINGS, files.embedding(EMBED)), (OUTPUT, files.lora(HEAD))):
        exact = (files(EMBEDDINGS) + SCALE * D).to(torch.bfloat16)
        assert int((ours[name] != exact).sum()) <= exact.numel() // 1000  # roundings that tip over


@pytest.mark.parametrize("policy", ["auto", "untie", "shared"])
def test_token_rows_are_the_same_for_both_sides_under_every_policy(policy: str, tmp_path: Path) -> None:
    made(tmp_path, "tokens")
    merged(tmp_path, policy)
    ours, rows = (
        tensors(tmp_path / "out"),
        Files(tmp_path).of(f"{EMBED}.token_adapter.trainable_tokens_delta"),
    )
    assert torch.equal(ours[EMBEDDINGS][[3, 77]].double(), rows)
    assert is_tied(tmp_path) == (OUTPUT not in ours) == (policy != "untie")


@pytest.mark.parametrize("policy", ["auto", "untie"])
@pytest.mark.parametrize("name", ["head saved", "embeddings saved"])
def test_a_saved_side_leaves_the_other_as_it_was(name: str, policy: str, tmp_path: Path) -> None:
    made(tmp_path, name)
    merged(tmp_path, policy)
    ours, base, files = tensors(tmp_path / "out"), tensors(tmp_path / "base"), Files(tmp_path)
    saved, other = (OUTPUT, EMBEDDINGS) if name == "head saved" else (EMBEDDINGS, OUTPUT)
    assert torch.equal(ours[saved].double(), files.of(saved))
    assert torch.equal(ours[other], base[EMBEDDINGS])
    assert not torch.equal(ours[saved], ours[other])
    assert not is_tied(tmp_path)


@pytest.mark.parametrize("name", ADAPTERS)
def test_refuse_refuses_whatever_touches_the_shared_tensor(name: str, tmp_path: Path) -> None:
    made(tmp_path, name)
    with pytest.raises(
        Refused, match=r"^tied: the adapter changes .* and tied=refuse; tied=untie writes both"
    ):
        merged(tmp_path, "refuse")


@pytest.mark.parametrize("policy", list(Tied))
def test_an_adapter_that_touches_neither_side_never_unties(policy: Tied, tmp_path: Path) -> None:
    with quiet():
        write(Case(TIED, lora()), tmp_path, torch.float32)
    merged(tmp_path, policy.name)
    assert OUTPUT not in tensors(tmp_path / "out")
    assert is_tied(tmp_path)


def test_a_sharded_base_gets_the_new_lm_head_into_its_index(tmp_path: Path) -> None:
    made(tmp_path, "head")
    case = Case(TIED, ADAPTERS["head"])
    torch.manual_seed(0)
    write_base(case.make(), tmp_path / "shards", max_shard_size="40KB")
    merged(tmp_path, "auto", base="shards")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    ours = tensors(tmp_path / "out")
    assert len(set(index["weight_map"].values())) > 1
    assert index["weight_map"].keys() == ours.keys()
    assert OUTPUT in ours
    assert index["metadata"]["total_size"] == sum(v.numel() * v.element_size() for v in ours.values())


def test_adapters_that_disagree_about_the_tie_are_refused(tmp_path: Path) -> None:
    made(tmp_path, "as one")
    head = ADAPTERS["head"]
    with quiet():
        tuned = get_peft_model(load_base(Case(TIED, head), tmp_path / "base", torch.float32), head())
        with_noise(tuned).save_pretrained(tmp_path / "second")
    both = {tmp_path / "adapter": 1.0, tmp_path / "second": 1.0}
    with pytest.raises(Refused, match="one adapter trained embeddings and lm_head as one, another only one"):
        quietly_merged(tmp_path / "base", both, tmp_path / "out")
