"""Trainable tokens against PEFT's own merge: rows are copied, so equal bits everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig
from safetensors.torch import load_file
from torch import nn

from pipeline.ground.deltas.delta import UNKNOWN
from pipeline.ground.deltas.tokens import KIND, TokenRows
from pipeline.ground.errors import Refused
from pipeline.ground.shards import read_shard
from tests.ground.deltas.claims import (
    DTYPES,
    WEIGHTS,
    does_not_depend_on_cuts,
    merges,
    model,
    refusal,
    wide_rows,
)
from tests.ground.deltas.parity import merged_by_peft, merged_by_us, write_adapter

LAYERS: Callable[[], nn.Module] = lambda: nn.Sequential(  # noqa: E731
    nn.Embedding(17, 6), nn.Linear(6, 5)
)
INDICES = [7, 2, 16, 0]


def config() -> TrainableTokensConfig:
    return TrainableTokensConfig(target_modules=["0"], token_indices=INDICES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_replaced_in_the_order_of_the_config(tmp_path: Path, dtype: torch.dtype) -> None:
    found = merges(tmp_path, KIND, LAYERS, config(), dtype)
    assert found.different == []
    assert found.unmoved == ["1.weight", "1.bias"]
    others = [i for i in range(17) if i not in INDICES]
    assert torch.equal(found.ours["0.weight"][others], found.base["0.weight"][others])
    rows = found.adapter("0.trainable_tokens_delta", torch.float32).to(dtype)
    assert torch.equal(found.ours["0.weight"][INDICES], rows)


def test_rows_keep_their_values_in_float64_and_by_any_cut(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS, config(), torch.bfloat16)
    [delta], weight = found.deltas, found.base["0.weight"]
    exact = weight.double()
    exact[INDICES] = found.adapter("0.trainable_tokens_delta")
    assert torch.equal(wide_rows(delta, weight), exact)
    assert torch.equal(weight, found.base["0.weight"])
    assert does_not_depend_on_cuts(delta, weight)


def test_the_same_rows_beside_lora(tmp_path: Path) -> None:
    """trainable_token_indices of a LoRA config writes the same tensor under another key."""
    chosen = LoraConfig(target_modules=["1"], trainable_token_indices={"0": INDICES})
    write_adapter(tmp_path, model(LAYERS, torch.bfloat16), chosen)
    name = "base_model.model.0.token_adapter.trainable_tokens_delta"
    assert name in load_file(tmp_path / WEIGHTS)
    entry = next(e for e in read_shard(tmp_path / WEIGHTS).entries if e.name == name)
    delta = TokenRows("0", "weight", (UNKNOWN, 6), entry, tuple(INDICES))
    base = model(LAYERS, torch.bfloat16).state_dict()
    theirs = merged_by_peft(model(LAYERS, torch.bfloat16), tmp_path)
    assert torch.equal(merged_by_us(base, [delta])["0.weight"], theirs["0.weight"])


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    [delta] = merges(tmp_path, KIND, LAYERS, config()).deltas
    assert delta.misfit((16, 6)) == "has a row for token 16, beyond a vocabulary of 16"
    assert delta.misfit((17, 6)) is None
    assert delta.misfit((20, 7)) == "was made for a weight [-1, 6]"
    assert delta.turned().misfit((6, 17)) is not None
    assert refusal(tmp_path, KIND, token_indices=[7, 2, 7, 0]) == "'0' has a token index twice"
    assert refusal(tmp_path, KIND, token_indices=[7, 2, -1, 0]) == "'0' has the token index -1, which is none"
    assert (
        refusal(tmp_path, KIND, token_indices=[7, 2, "3", 0]) == "'0' has the token index '3', which is none"
    )
    assert refusal(tmp_path, KIND, token_indices=[7, True, 2, 0]) == (
        "'0' has the token index True, which is none"
    )
    assert refusal(tmp_path, KIND, token_indices=[1]) == "'0' has 4 token rows for 1 token indices"
    assert refusal(tmp_path, KIND, token_indices=None) == "token_indices is None, not a list of token indices"
    with pytest.raises(Refused, match="token index twice"):
        TokenRows("emb", "weight", (UNKNOWN, 6), delta.entries[0], (1, 1, 2, 3))
