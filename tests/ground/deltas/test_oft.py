"""OFT against PEFT's own merge.

Both compute W R^T in float32 and round once. PEFT multiplies by the whole block-diagonal matrix, we by its
blocks: float32 sums of other order, so they agree up to the slack of such a sum, and in bits nearly always
once rounded to 16.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import OFTConfig, PeftModel, get_peft_model
from torch import nn

from pipeline.ground.deltas.delta import UNKNOWN
from pipeline.ground.deltas.kind import Trained
from pipeline.ground.deltas.oft import KIND, Oft, neumann_factors
from tests.ground.deltas.claims import (
    DTYPES,
    Merges,
    does_not_depend_on_cuts,
    merges,
    model,
    refusal,
    turns,
    wide_rows,
)
from tests.ground.deltas.parity import NAMES
from tests.tolerance import FLOAT64_SLACK, num_different, within_half_ulp

CASES: dict[str, dict[str, object]] = {
    "series": {"oft_block_size": 4},
    "blocks": {"oft_block_size": 0, "r": 3},
    "adjusted": {"oft_block_size": 10},  # PEFT takes 8 for 24 inputs, 9 for 36
    "exact": {"oft_block_size": 6, "use_cayley_neumann": False},
    "shared": {"oft_block_size": 4, "block_share": True},
    "constrained": {"oft_block_size": 4, "coft": True, "eps": 0.1},
    "one_term": {"oft_block_size": 4, "num_cayley_neumann_terms": 1},
    "two_terms": {"oft_block_size": 4, "num_cayley_neumann_terms": 2},
    "three_terms": {"oft_block_size": 4, "num_cayley_neumann_terms": 3},
    "four_terms": {"oft_block_size": 4, "num_cayley_neumann_terms": 4},
    "single": {"oft_block_size": 1},
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(24, 13), nn.Linear(36, 7, bias=False)),
    "embedding": lambda: nn.Sequential(nn.Embedding(11, 24), nn.Embedding(17, 36)),
    "pixel": lambda: nn.Sequential(nn.Conv2d(24, 5, 1), nn.Conv2d(36, 8, 1)),
}


def config(case: str) -> OFTConfig:
    return OFTConfig(target_modules=["0", "1"], **CASES[case])  # type: ignore[arg-type]


def rotation(found: Merges, module: str, case: str, inputs: int) -> torch.Tensor:
    """The dense rotation in float64, entry by entry; Q from its row-major upper triangle."""
    settings = CASES[case]
    R = torch.zeros(inputs, inputs, dtype=torch.float64)
    [triangles] = (found.adapter(e.name) for d in found.deltas if d.module == module for e in d.entries)
    size = next(n for n in range(1, inputs + 1) if n * (n - 1) // 2 == triangles.shape[1])
    for block in range(inputs // size):
        triangle = iter(triangles[0 if settings.get("block_share") else block])
        Q = torch.zeros(size, size, dtype=torch.float64)
        for i in range(size):
            for j in range(i + 1, size):
                Q[i, j] = next(triangle)
                Q[j, i] = -Q[i, j]
        if settings.get("coft"):
            limit = settings["eps"] / len(triangles) ** 0.5  # type: ignore[operator]
            Q *= min(1.0, float(limit / (Q**2).sum().sqrt()))
        eye = torch.eye(size, dtype=torch.float64)
        if settings.get("use_cayley_neumann", True):
            terms = settings.get("num_cayley_neumann_terms", 5)
            factors = {1: [], 2: [2], 3: [2, 2, 1], 4: [2, 2, 1], 5: [2, 2, 2, 1]}[terms]  # type: ignore[index]
            turned = eye + sum(
                (c * torch.linalg.matrix_power(Q, n) for n, c in enumerate(factors, 1)), torch.zeros(())
            )
        else:
            turned = (eye - Q) @ torch.linalg.inv(eye + Q)
        where = slice(block * size, block * size + size)
        R[where, where] = turned
    return R


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("layer", "case"),
    [("linear", case) for case in CASES]
    + [(layer, case) for layer in ("embedding", "pixel") for case in ("series", "exact", "shared")],
)
def test_the_merge_is_the_rotation_rounded_once_and_so_is_pefts(
    tmp_path: Path, case: str, layer: str, dtype: torch.dtype
) -> None:
    found = merges(tmp_path, KIND, LAYERS[layer], config(case), dtype)
    for module, inputs in (("0", 24), ("1", 36)):
        name = f"{module}.weight"
        W = found.base[name].flatten(1).double()
        R = rotation(found, module, case, inputs)
        R = R if layer == "embedding" else R.T
        exact, size = W @ R, W.abs() @ R.abs()
        ours, theirs = found.ours[name].flatten(1), found.theirs[name].flatten(1)
        assert within_half_ulp(ours, exact, NAMES[dtype], size)
        assert within_half_ulp(theirs, exact, NAMES[dtype], size)
        if dtype != torch.float32:
            assert num_different(ours, theirs) <= ours.numel() / 100
        delta = next(d for d in found.deltas if d.module == module)
        wide = wide_rows(delta, found.base[name]).flatten(1)
        assert bool(((wide - exact).abs() <= FLOAT64_SLACK * size).all())
    assert [name for name in found.unmoved if "weight" in name] == (
        ["0.weight", "1.weight"] if case in ("one_term", "single") else []
    )


@pytest.mark.parametrize("case", ["series", "shared"])
def test_rows_do_not_depend_on_cuts(tmp_path: Path, case: str) -> None:
    found = merges(tmp_path, KIND, LAYERS["linear"], config(case))
    for delta in found.deltas:
        weight = found.base[f"{delta.module}.weight"]
        assert does_not_depend_on_cuts(delta, weight) and turns(delta, weight)


def test_the_series_of_before_0_18_ends_with_its_last_term_twice(tmp_path: Path) -> None:
    """PEFT < 0.18 summed I + 2Q + ... + 2Q^(t-1), and its configs do not say their version.

    PEFT 0.21 warns and merges such adapters with the new series, which is not what was trained.
    """
    found = merges(tmp_path, KIND, LAYERS["linear"], config("series"))
    new = found.deltas[0]
    assert isinstance(new, Oft) and new.halved

    def read(**fields: object) -> Oft:
        told = {**CASES["series"], "use_cayley_neumann": True, "num_cayley_neumann_terms": 5, **fields}
        [delta] = KIND.read(Trained("0", {"oft_R.weight": new.entry}, told))
        assert isinstance(delta, Oft)
        return delta

    assert read(peft_version="0.18.0").halved
    assert not read().halved
    assert not read(peft_version="0.17.1").halved
    difference = wide_rows(read(), found.base["0.weight"]) - wide_rows(new, found.base["0.weight"])
    triangles = found.adapter("0.oft_R.weight")
    Q = torch.zeros(len(triangles), 4, 4, dtype=torch.float64)
    Q[:, *torch.triu_indices(4, 4, 1)] = triangles
    last = torch.block_diag(*torch.linalg.matrix_power(Q - Q.mT, 4))
    W = found.base["0.weight"].double()
    assert bool((difference - W @ last.T).abs().max() <= FLOAT64_SLACK * W.abs().sum(1).max())
    assert KIND.wrong({**CASES["series"], "use_cayley_neumann": True, "num_cayley_neumann_terms": 5}) == []
    odd = {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "peft_version": "0.18.0.dev0@abc"}
    assert KIND.wrong({**CASES["series"], **odd}) == [
        "peft_version is '0.18.0.dev0@abc', between two meanings of the Cayley-Neumann series"
    ]


def test_series_by_terms_and_version() -> None:
    assert [neumann_factors(terms, halved=False) for terms in (1, 2, 3, 5)] == [[], [2], [2, 2], [2, 2, 2, 2]]
    assert neumann_factors(3, halved=True) == neumann_factors(4, halved=True) == [2, 2, 1]


def test_larger_kernels_are_refused_because_peft_trains_another_function(tmp_path: Path) -> None:
    """PEFT's forward sums overlapping patches: it changes the output though the rotation is the identity."""
    layers = lambda: nn.Sequential(nn.Conv2d(4, 6, 3))  # noqa: E731
    x = torch.randn(1, 4, 8, 8)
    tuned = get_peft_model(model(layers), OFTConfig(target_modules=["0"], oft_block_size=4))
    assert isinstance(tuned, PeftModel)
    plain, trained = model(layers)(x), tuned(x)
    assert not torch.allclose(plain, trained)
    assert torch.equal(plain, tuned.merge_and_unload()(x))
    delta = Oft("0", "weight", (UNKNOWN, 36), None, 4, 5, True, None, False)  # type: ignore[arg-type]
    assert "overlapping patches" in (delta.misfit((6, 4, 3, 3)) or "")
    assert delta.misfit((6, 36, 1, 1)) is None


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    found = merges(tmp_path, KIND, LAYERS["linear"], config("shared"))
    assert found.deltas[0].misfit((13, 26)) == "was made for inputs in blocks of 4"
    assert found.deltas[0].misfit((13, 28)) is None
    two = {"0.oft_R.weight": torch.zeros(2, 6)}
    assert refusal(tmp_path, KIND, tensors=two) == "'0' has 2 blocks, but the config's block_share allows one"
    odd = {"0.oft_R.weight": torch.zeros(2, 7)}
    assert refusal(tmp_path, KIND, tensors=odd) == (
        "'0' has oft_R.weight [2, 7], whose rows are no triangles"
    )
    merges(tmp_path, KIND, LAYERS["linear"], config("series"))
    assert refusal(tmp_path, KIND, oft_block_size=6) == "'0' has blocks of 4, but the config's mean 6"
    both = {"0.oft_embedding_R.weight": torch.zeros(6, 6)}
    assert refusal(tmp_path, KIND, tensors=both, oft_block_size=4) == (
        "'0' has rotations of a layer and of an embedding"
    )
    assert KIND.wrong({"r": 0, "use_cayley_neumann": True, "num_cayley_neumann_terms": 0, "coft": True}) == [
        "oft_block_size is missing, so PEFT before 0.14 wrote this; its OFT meant something else",
        "num_cayley_neumann_terms is 0, not a number of terms",
        "eps is None, not a finite number",
    ]
    assert KIND.wrong({"r": 0, "oft_block_size": 0, "use_cayley_neumann": None}) == [
        "oft_block_size is 0 and r 0",
        "use_cayley_neumann is None, neither true nor false",
    ]
