"""Random module trees, ranks, patterns and dtypes: every element of every adapter tensor is used, once."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline import stage
from pipeline.merging.pieces import Merged
from tests.models import tensors
from tests.running import merge, pipeline
from tests.tolerance import within_half_ulp

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PARTS = st.sampled_from(["layers", "blocks", "self_attn", "mlp", "q_proj", "fc1", "gate", "0", "1", "10"])
MODULES = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=6, unique=True)
SIZES = st.integers(1, 40)


@st.composite
def trees(draw: Any) -> dict[str, Any]:
    """Modules with their shapes, which of them are trained, with which ranks, alphas and dtypes."""
    modules = {f"model.{name}": (draw(SIZES), draw(SIZES)) for name in draw(MODULES)}
    trained = draw(st.lists(st.sampled_from(sorted(modules)), min_size=1, unique=True))
    ranks = {name: draw(st.integers(1, 9)) for name in trained}
    alphas = {name: draw(st.integers(1, 64)) for name in trained}
    return {
        "modules": modules,
        "ranks": ranks,
        "alphas": alphas,
        "base": draw(st.sampled_from(sorted(DTYPES))),
        "adapter": draw(st.sampled_from(sorted(DTYPES))),
        "rslora": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


def write(tree: dict[str, Any], here: Path) -> dict[str, torch.Tensor]:
    """Base and adapter folders; the adapter's tensors."""
    random = torch.Generator().manual_seed(tree["seed"])
    base = {
        f"{name}.weight": torch.randn(shape, generator=random).to(DTYPES[tree["base"]])
        for name, shape in tree["modules"].items()
    }
    lora = {}
    for name, rank in tree["ranks"].items():
        out, into = tree["modules"][name]
        for letter, shape in (("A", (rank, into)), ("B", (out, rank))):
            values = torch.randn(shape, generator=random) * 0.3
            lora[f"base_model.model.{name}.lora_{letter}.weight"] = values.to(DTYPES[tree["adapter"]])
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": sorted(tree["ranks"]),
        "rank_pattern": {f"^{name}": rank for name, rank in tree["ranks"].items()},
        "alpha_pattern": {f"^{name}": alpha for name, alpha in tree["alphas"].items()},
        "use_rslora": tree["rslora"],
    }
    for folder, file, content in (
        ("base", "model.safetensors", base),
        ("adapter", "adapter_model.safetensors", lora),
    ):
        (here / folder).mkdir()
        save_file(content, here / folder / file, {"format": "pt"})
    (here / "base" / "config.json").write_text(json.dumps({"model_type": "x"}))
    (here / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return lora


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(trees())
def test_every_element_of_an_adapter_is_used_once_and_merged_exactly(tree: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        lora = write(tree, here)
        stages: stage.Pipeline = pipeline(here / "base", here / "adapter", here / "out")
        planned = stages.merge(stages.dequantize(stages.load()), stages.extract())
        used: Counter[str] = Counter()
        for weight in planned.weights:
            for placed in weight.placed if isinstance(weight, Merged) else ():
                assert placed.rows == (0, placed.delta.num_rows)
                used.update({entry.name: prod(entry.shape) for entry in placed.delta.entries})
        assert used == Counter({name: tensor.numel() for name, tensor in lora.items()})
        merge(here / "base", here / "adapter", here / "out")
        before, after = tensors(here / "base"), tensors(here / "out")
        for name in tree["modules"]:
            if name not in tree["ranks"]:
                assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
                continue
            rank, alpha = tree["ranks"][name], tree["alphas"][name]
            A, B = (lora[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
            scale = alpha / (rank**0.5 if tree["rslora"] else rank)
            W = before[f"{name}.weight"].double()
            size = W.abs() + scale * (B.abs() @ A.abs())
            assert within_half_ulp(after[f"{name}.weight"], W + scale * (B @ A), tree["base"], size)
