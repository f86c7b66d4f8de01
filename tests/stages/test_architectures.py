"""LoRA on all linear layers and stacked experts of each architecture, saved by PEFT and merged by us.

Ours goes onto the files that save_pretrained writes, in the layout of their names; PEFT's goes into the model
and is then saved by transformers. Both are the same files. Stacked experts PEFT rounds twice in 16 bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.ground.report import Status
from tests.architectures import CASES, all_linear
from tests.beside_peft import WEIGHTS, Case, Merges, merges, quiet, quietly_merged, write
from tests.models import tensors

# What cannot be run on tokens alone.
NO_TEXT = {"T5", "Whisper", "ViT"}
_LLAVA = {
    "model.language_model.": "language_model.model.",
    "model.multi_modal_projector": "multi_modal_projector",
}
SAVED = all_linear(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
ERAS: dict[str, dict[str, str]] = {
    "Gemma 3": {**_LLAVA, "model.vision_tower.": "vision_tower.vision_model."},
    "LLaVA": {**_LLAVA, "model.vision_tower.": "vision_tower.vision_model."},
    "Mistral 3": {**_LLAVA, "model.vision_tower.": "vision_tower."},
}


def passed(found: Merges) -> set[str]:
    assert found.report.passed
    return {gate.name for gate in found.report.gates if gate.status is Status.passed}


def check(found: Merges, dtype: torch.dtype) -> None:
    assert found.ours.keys() == found.theirs.keys() == found.base.keys()
    assert found.changed
    assert found.apart <= found.case.beside.bound(dtype)
    configs = [json.loads((found.folder / name / "config.json").read_text()) for name in ("base", "out")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", CASES)
def test_merges_into_float32_are_pefts_bits_and_answer_as_its_unmerged_model(
    name: str, tmp_path: Path
) -> None:
    found = merges(CASES[name], tmp_path, torch.float32, 32)
    check(found, torch.float32)
    assert found.different == []
    assert ("logits" in passed(found)) == (name not in NO_TEXT)


@pytest.mark.parametrize("name", CASES)
def test_merges_into_bfloat16_are_pefts_bits_but_where_it_rounds_stacked_experts_twice(
    name: str, tmp_path: Path
) -> None:
    found = merges(CASES[name], tmp_path, torch.bfloat16)
    check(found, torch.bfloat16)
    assert all("expert" in n or ".gate." in n or "router" in n for n in found.different)
    assert passed(found) >= {"structure", "untouched", "rounding", "effect", "retained"}


def rewritten(names: dict[str, str]) -> Callable[[Path], None]:
    """Writes the adapter's keys as another version of transformers called its modules."""

    def rewrite(folder: Path) -> None:
        path, held = folder / "adapter" / WEIGHTS, {}
        for key, value in tensors(folder / "adapter").items():
            for new, old in names.items():
                key = key.replace(f"base_model.model.{new}", f"base_model.model.{old}")
            held[key] = value
        save_file(held, path, {"format": "pt"})

    return rewrite


@pytest.mark.parametrize("name", ERAS)
def test_adapters_with_the_names_of_before_transformers_5_are_merged_alike(name: str, tmp_path: Path) -> None:
    with quiet():
        write(CASES[name], tmp_path, torch.float32)
    quietly_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "new")
    before = set(tensors(tmp_path / "adapter"))
    rewritten(ERAS[name])(tmp_path)
    assert before.isdisjoint(tensors(tmp_path / "adapter"))
    quietly_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "old")
    new, old = tensors(tmp_path / "new"), tensors(tmp_path / "old")
    assert all(torch.equal(new[n], old[n]) for n in new)


@pytest.mark.parametrize("name", ["Gemma 3", "Qwen2.5-VL"])
def test_a_larger_vocabulary_is_written_where_the_text_model_has_it(name: str, tmp_path: Path) -> None:
    found = merges(replace(CASES[name], config=SAVED, vocabulary=110), tmp_path, torch.float32, 32)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["text_config"]["vocab_size"] == 110
    assert told.get("vocab_size", 110) == 110
    ends = [n for n in found.ours if n.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert [len(found.ours[n]) for n in ends] == [110, 110]
    assert "logits" in passed(found)


@pytest.mark.parametrize("name", ["Gemma 3", "Mistral 3", "LLaVA", "PaliGemma", "Qwen2.5-VL"])
def test_an_lm_head_that_is_untied_is_called_as_untied_files_of_that_layout_call_it(
    name: str, tmp_path: Path
) -> None:
    """PEFT and transformers write lm_head.weight there; what was untied from the start is called as ours."""

    def untied() -> nn.Module:
        model: Any = CASES[name].make()
        model.config.tie_word_embeddings = False
        made: nn.Module = type(model)(model.config)
        return made

    def tied() -> nn.Module:
        model: Any = CASES[name].make()
        model.config.tie_word_embeddings = True
        made: nn.Module = type(model)(model.config)
        return made

    apart = merges(Case(untied, SAVED), tmp_path / "untied", torch.float32)
    one = merges(Case(tied, SAVED), tmp_path / "tied", torch.float32, 32)
    assert apart.different == []
    assert one.ours.keys() == apart.ours.keys()
    [head] = one.ours.keys() - one.base.keys()
    assert torch.equal(one.ours[head], one.theirs["lm_head.weight"])
    assert all(torch.equal(one.ours[n], one.theirs[n]) for n in one.base)
    assert "logits" in passed(one)
