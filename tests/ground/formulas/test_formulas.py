"""Each formula of the second path against PEFT's merge in float64, from base and adapter folder alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft.tuners.boft.layer as boft_layer
import pytest
import torch
from peft import PeftConfig
from torch import Tensor, nn

from pipeline.ground.formulas.table import FORMULAS
from pipeline.ground.retraced.adapter import Told, opened
from pipeline.ground.retraced.pieces import area_of, change_on
from pipeline.ground.retraced.weights import Weights
from tests import kind_cases, lora_cases
from tests.beside_peft import Case, merged_by_peft, quiet, write
from tests.ground.deltas import (
    parity,
    test_adalora,
    test_boft,
    test_c3a,
    test_delora,
    test_fourierft,
    test_gralora,
    test_hira,
    test_hra,
    test_ia3,
    test_ln_tuning,
    test_loha,
    test_lokr,
    test_miss,
    test_oft,
    test_randlora,
    test_shira,
    test_tokens,
    test_vblora,
    test_vera,
)
from tests.ground.deltas.claims import model
from tests.models import tensors
from tests.tolerance import FLOAT32_FFT, FLOAT32_SLACK, FLOAT64_FORMULA

State = dict[str, Tensor]
Make = Callable[[], nn.Module]
CASES = {**lora_cases.CASES, **kind_cases.CASES}
BY_FFT = ("FourierFT", "C3A")  # which PEFT does in float32, whatever the base
# The same of its factors alpha / r and eps, and of the logarithms of saved shares.
ROUNDED_FACTORS = ("LoHa", "LoKr", "OFT constrained", "VBLoRA, top")


def merged(base: Mapping[str, Tensor], folder: Path, model_type: str | None) -> State:
    """base + delta in float64, of every weight that the adapter's keys mean."""
    weights = Weights({name: tuple(value.shape) for name, value in base.items()}, model_type, {})
    found = {name: value.double().contiguous() for name, value in base.items()}
    with opened(folder, 1.0, Told(), model_type) as adapter:
        for piece in adapter.saved(weights):
            found[piece.place.weight] = piece.module[""]
            weights.shapes[piece.place.weight] = piece.module.shape("")
        before = {name: value.clone().reshape(-1, *value.shape[-1:]) for name, value in found.items()}
        changes, homeless = adapter.changes(weights)
        assert not homeless
        for piece in changes:
            area, W = area_of(piece), before[piece.place.weight]
            change = change_on(piece, lambda start, stop, W=W: W[start:stop])  # type: ignore[misc]
            into = found[piece.place.weight].view(W.shape)
            into[area.row : area.stop, area.column : area.end] += change.rows(area.row, area.stop)
    return found


def tolerance(name: str) -> float:
    """Of the largest element."""
    if name.startswith(BY_FFT):
        return FLOAT32_FFT
    return FLOAT32_SLACK if name.startswith(ROUNDED_FACTORS) else FLOAT64_FORMULA


def is_same(ours: State, theirs: Mapping[str, Tensor], share: float) -> bool:
    """Whether all weights agree, to a share of their largest element."""
    assert ours.keys() == theirs.keys()
    pairs = [(ours[name], value.double()) for name, value in theirs.items()]
    return all(bool(((one - other).abs() <= share * other.abs().max()).all()) for one, other in pairs)


@pytest.mark.parametrize("name", [name for name in CASES if "tied" not in name])
def test_whole_models_are_as_peft_merges_them(name: str, tmp_path: Path) -> None:
    case: Case = CASES[name]
    with quiet():
        write(case, tmp_path, torch.float32)
        theirs = merged_by_peft(case, tmp_path, torch.float64)
    told = json.loads((tmp_path / "base" / "config.json").read_text())
    ours = merged(tensors(tmp_path / "base"), tmp_path / "adapter", told.get("model_type"))
    assert is_same(ours, theirs, tolerance(name))


def forms() -> Iterator[tuple[str, Make, Callable[[], PeftConfig]]]:
    """What the tests of the main path's formulas try of each kind, on layers that lie as they are."""
    adalora, hira, ia3 = test_adalora, test_hira, test_ia3
    for layer in ("linear", "conv2d"):
        yield f"AdaLoRA {layer}", adalora.LAYERS[layer], adalora.config
    yield "AdaLoRA without alpha", adalora.LAYERS["linear"], lambda: adalora.config(0)
    for layer, (make, _) in test_boft.LAYERS.items():
        yield f"BOFT {layer}", make, lambda layer=layer: test_boft.config(layer)  # type: ignore[misc]
    yield "C3A", test_c3a.LAYERS, test_c3a.config
    yield "DeLoRA", test_delora.LAYERS, test_delora.config
    yield "FourierFT", test_fourierft.LAYERS["linear"], test_fourierft.config
    for k, hybrid in ((2, 0), (4, 3)):
        make = test_gralora.LAYERS["linear"]
        yield f"GraLoRA {k} {hybrid}", make, lambda k=k, h=hybrid: test_gralora.config(k, h)  # type: ignore[misc]
    for layer in ("linear", "embedding", "kernels_1d", "kernels_2d", "kernels_3d"):
        yield f"HiRA {layer}", hira.LAYERS[layer], hira.config
    for layer in ("linear", "kernels"):
        for plane in (False, True):
            make = test_hra.LAYERS[layer]
            yield f"HRA {layer} {plane}", make, lambda plane=plane: test_hra.config(plane)  # type: ignore[misc]
    for layer in ("linear", "conv2d", "grouped", "conv3d"):
        yield f"IA3 {layer}", ia3.LAYERS[layer], lambda: ia3.config(["1"])
    yield "LN tuning", test_ln_tuning.LAYERS, test_ln_tuning.config
    for layer, make in test_loha.LAYERS.items():
        for core in (False, True):
            yield f"LoHa {layer} {core}", make, lambda core=core: test_loha.config(core)  # type: ignore[misc]
    for layer, make in test_lokr.LAYERS.items():
        for form, told in test_lokr.FORMS.items():
            yield f"LoKr {layer} {form}", make, lambda told=told: test_lokr.config(**told)  # type: ignore[misc]
    effective = {"use_effective_conv2d": True, "target_modules": ["0"]}
    for layer, conv in (("1d", nn.Conv1d), ("2d", nn.Conv2d)):
        make = lambda conv=conv: nn.Sequential(conv(36, 49, 3))  # type: ignore[misc]  # noqa: E731
        yield f"LoKr core {layer}", make, lambda: test_lokr.config(**effective)
    for form in test_miss.CASES:
        yield f"MiSS {form}", test_miss.LAYERS, lambda form=form: test_miss.config(form)  # type: ignore[misc]
    for form in test_oft.CASES:
        make = test_oft.LAYERS["linear"]
        yield f"OFT {form}", make, lambda form=form: test_oft.config(form)  # type: ignore[misc]
    for layer in ("embedding", "pixel"):
        yield f"OFT {layer}", test_oft.LAYERS[layer], lambda: test_oft.config("exact")
    for form, told in test_randlora.BASES.items():
        make = test_randlora.LAYERS["linear"]
        yield f"RandLoRA {form}", make, lambda told=told: test_randlora.config(**told)  # type: ignore[misc]
    yield "SHiRA", test_shira.LAYERS, test_shira.config
    yield "tokens", test_tokens.LAYERS, test_tokens.config
    for form, told in test_vblora.FORMS.items():
        make = test_vblora.LAYERS["linear"]
        yield f"VBLoRA, {form}", make, lambda told=told: test_vblora.config(**told)  # type: ignore[misc]
    for kept in (True, False):
        make, drawn = test_vera.LAYERS["linear"], {"projection_prng_key": 7, "save_projection": kept}
        yield f"VeRA {kept}", make, lambda told=drawn: test_vera.config(**told)  # type: ignore[misc]


FORMS: dict[str, tuple[Make, Callable[[], PeftConfig]]] = {name: rest for name, *rest in forms()}  # type: ignore[misc]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_every_kind_is_as_peft_merges_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", test_boft.BlockDiagonal)
    make, config = FORMS[name]
    dtype = torch.float32 if name.startswith("VBLoRA, top") else torch.float64  # which PEFT cannot load
    with quiet():
        parity.write_adapter(tmp_path, model(make, dtype), config())
        theirs = parity.merged_by_peft(model(make, dtype), tmp_path)
    ours = merged(model(make, dtype).state_dict(), tmp_path, None)
    assert is_same(ours, theirs, tolerance(name))


@pytest.mark.parametrize("version", ["0.17.1", "0.18.0"])
def test_the_series_of_oft_is_that_of_the_writers_version(version: str, tmp_path: Path) -> None:
    """I + 2Q + 2Q^2 + 2Q^3 + 2Q^4, the last term once since 0.18."""
    make = test_oft.LAYERS["linear"]
    parity.write_adapter(tmp_path, model(make, torch.float64), test_oft.config("series"))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_version": version}))
    base, [upper] = model(make, torch.float64).state_dict(), [torch.triu_indices(4, 4, 1)]
    W, held = base["0.weight"], tensors(tmp_path)["base_model.model.0.oft_R.weight"].double()
    blocks = []
    for triangle in held:
        Q = torch.zeros(4, 4, dtype=torch.float64)
        Q[upper[0], upper[1]] = triangle
        Q = Q - Q.T
        last = 2 if version == "0.17.1" else 1
        powers = [torch.linalg.matrix_power(Q, n) for n in range(5)]
        blocks.append(powers[0] + 2 * (powers[1] + powers[2] + powers[3]) + last * powers[4])
    exact = {"0.weight": W @ torch.block_diag(*blocks).T}
    ours = merged(base, tmp_path, None)
    assert is_same({"0.weight": ours["0.weight"]}, exact, FLOAT64_FORMULA)


def test_every_kind_has_its_formula() -> None:
    from pipeline.ground.deltas.kinds import KINDS

    assert FORMULAS.keys() == KINDS.keys()
    told: Any = {kind: set(FORMULAS[kind]) for kind in KINDS}
    for kind, words in told.items():
        known = {name.split(".")[0] for name in KINDS[kind].tensors} - {"token_adapter"}
        assert known <= words
