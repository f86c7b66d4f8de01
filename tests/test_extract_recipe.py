"""The extraction that was asked of mergekit (its issue 521), as a recipe file of ours, as a user runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.architectures import CASES
from tests.beside_peft import quiet
from tests.command import answer, refusal
from tests.models import tensors, write_llama
from tests.stages.extracting import answers_as, config_of, noisy

AS_ASKED = """\
finetune: {finetune}
base_model: {base}
rank: 128
alpha: 128
targeted_modules: {{filter: "self_attn, mlp, lm_head"}}
saved_modules: {{filter: "input_layernorm, embed_tokens, norm"}}
output: out
"""
MEANT = ("self_attn", "mlp", "lm_head", "input_layernorm", "embed_tokens", "model.norm")


def write(here: Path, model: Any, changes: tuple[str, ...] = MEANT) -> Any:
    """base and fine, of which the parameters with one of these in their names differ; the model's class."""
    with quiet():
        model.save_pretrained(here / "base")
        noisy(model, lambda name: any(part in name for part in changes))
        model.save_pretrained(here / "fine", max_shard_size="300KB")
    return type(model)


def llama(here: Path) -> Any:
    """One whose matrices all have a rank of 128."""
    from transformers import LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_key_value_heads": 4}
    with quiet():
        write_llama(here / "made", torch.float32, num_hidden_layers=1, **sizes)
        return LlamaForCausalLM.from_pretrained(here / "made")


def both(here: Path, cls: Any) -> tuple[Any, Any]:
    with quiet():
        return cls.from_pretrained(here / "base"), cls.from_pretrained(here / "fine")


def extracted(here: Path, recipe: str) -> None:
    """Runs the recipe: done and verified."""
    (here / "mine.yaml").write_text(recipe)
    said = answer("recipe=./mine.yaml", cwd=here)
    assert said.status == 0, said.err


def test_the_recipe_works_as_it_was_written(tmp_path: Path) -> None:
    cls = write(tmp_path, llama(tmp_path))
    extracted(tmp_path, AS_ASKED.format(base=tmp_path / "base", finetune=tmp_path / "fine"))
    found = config_of(tmp_path / "out")
    assert (found["r"], found["lora_alpha"], found["rank_pattern"]) == (128, 128, {})
    assert set(found["modules_to_save"]) == {
        "model.layers.0.input_layernorm",
        "model.embed_tokens",
        "model.norm",
    }
    assert {"lm_head", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"} < {
        *found["target_modules"]
    }
    answers_as(*_around(both(tmp_path, cls), tmp_path / "out"))


def test_a_change_that_it_does_not_mean_stops_it(tmp_path: Path) -> None:
    """`norm` is model.norm, and no layer's."""
    write(tmp_path, llama(tmp_path), (*MEANT, "post_attention"))
    (tmp_path / "mine.yaml").write_text(AS_ASKED.format(base="base", finetune="fine"))
    sentence = refusal(tmp_path, "recipe=./mine.yaml")
    assert sentence.startswith("finetune: model.layers.0.post_attention_layernorm.weight changed by ")
    assert "neither targeted_modules nor saved_modules means it" in sentence


@pytest.mark.parametrize(
    ("name", "patterns", "module"),
    [
        ("LLaVA", "", "model.language_model.layers.0.self_attn.q_proj"),
        ("Qwen2.5-VL", "", "model.language_model.layers.0.mlp.up_proj"),
        ("Mixtral", "rank_pattern: {gate: 4}", "model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_it_means_modules_by_the_names_that_files_and_models_in_memory_have(
    tmp_path: Path, name: str, patterns: str, module: str
) -> None:
    """Files say language_model.model.layers and block_sparse_moe, where transformers 5 has other names."""
    torch.manual_seed(0)
    layers, meant = "layers.0." if name == "Mixtral" else "language_model.layers.0.", ("self_attn", "mlp")
    model = CASES[name].make()
    with quiet():
        model.save_pretrained(tmp_path / "base")
        noisy(model, lambda n: "lm_head" in n or (layers in n and any(part in n for part in meant)))
        model.save_pretrained(tmp_path / "fine")
    assert module not in {key.removesuffix(".weight") for key in tensors(tmp_path / "base")}
    recipe = AS_ASKED.format(base="base", finetune="fine").replace("128", "16") + patterns
    extracted(tmp_path, recipe.replace("embed_tokens, norm", "embed_tokens"))
    found = config_of(tmp_path / "out")
    assert module in (*found["target_modules"], *(found["target_parameters"] or []))


def _around(models: tuple[Any, Any], adapter: Path) -> tuple[Any, Path, Any]:
    base, tuned = models
    return base, adapter, tuned
