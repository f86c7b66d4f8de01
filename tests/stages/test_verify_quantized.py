"""Verification of quantized outputs: right ones pass, one wrong code is named, what survives is told."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html import unescape
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.ground import shards
from pipeline.ground.codes.encoders.schemes import SCHEMES
from pipeline.ground.errors import PipelineError, Refused
from pipeline.ground.reference import Facts
from pipeline.ground.report import Report, Status
from pipeline.ground.written import Written, standard_of
from tests.command import answer
from tests.models import tensors, write_llama, write_lora
from tests.running import merge
from tests.stages.quantized import (
    FILES_ONLY,
    FORMATS,
    decoded,
)

LENIENT = {"tokens": 0, "min_retained": -9.0}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", FORMATS)
def test_an_output_is_verified_again_later(
    dense: tuple[Path, Path], written: dict[str, Path], name: str
) -> None:
    report = merge(*dense, written[name], save="existing", verify="standard", verify_settings=FILES_ONLY)
    assert report.passed
    assert {g.name for g in report.gates} >= {"structure", "untouched", "rounding", "retained", "hashes"}


@pytest.fixture(scope="module")
def anew(
    dense: tuple[Path, Path], written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Each output as a base, merged and quantized into its own format again."""
    folders = {name: tmp_path_factory.mktemp("anew") / name for name in FORMATS}
    for name, out in folders.items():
        report = merge(
            written[name], dense[1], out, quantize=name, verify="standard", verify_settings=LENIENT
        )
        assert report.passed and "converted" in {gate.name for gate in report.gates}
    return folders


class Later(NamedTuple):
    """An output in its base's own format, to be verified with its manifest or without one."""

    name: str
    folder: Path
    known: bool
    verify: str
    run: Callable[[], Report]


@pytest.fixture(params=list(product(FORMATS, ["structure", "standard"], [True, False])), ids=str)
def later(
    request: pytest.FixtureRequest,
    dense: tuple[Path, Path],
    written: dict[str, Path],
    anew: dict[str, Path],
    tmp_path: Path,
) -> Later:
    name, verify, known = request.param
    folder = shutil.copytree(anew[name], tmp_path / "out")
    if not known:
        (folder / "merge.json").unlink()
    settings = LENIENT if verify == "standard" else {}
    asked = {"save": "existing", "verify": verify, "verify_settings": settings}
    return Later(name, folder, known, verify, lambda: merge(written[name], dense[1], folder, **asked))


def test_a_bases_format_written_anew_is_verified_later(later: Later) -> None:
    """What no delta reaches then lies on the codes' own grid, and its bytes need not be the base's."""
    assert later.run().passed


def test_a_wrong_byte_of_a_code_that_was_not_merged_is_found_in_it(later: Later) -> None:
    weight = "model.layers.1.self_attn.v_proj.weight"
    damaged(later.folder, f"{weight}_packed" if later.name == "int4-g128" else weight)
    by_hash = later.known and later.verify == "structure"
    found = "hashes: model-" if by_hash else rf"(untouched|converted): {weight}"
    with pytest.raises(PipelineError, match=found):
        later.run()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("nf4", ".absmax"),
        ("nf4-dq", ".absmax"),
        ("nf4-dq", ".nested_absmax"),
        ("fp8-block", "_scale_inv"),
        ("fp8-channel", "_scale"),
        ("int4-g128", "_scale"),
    ],
)
def test_the_last_bit_of_a_scale_that_was_to_be_kept_is_found(
    dense: tuple[Path, Path], written: dict[str, Path], tmp_path: Path, name: str, beside: str, known: bool
) -> None:
    """Where the other codes are the base's bytes, these are not taken for its values encoded anew."""
    out, weight = tmp_path / "out", f"model.layers.1.self_attn.v_proj.weight{beside}"
    merge(written[name], dense[1], out, quantize="keep")
    change(out, weight, lambda scale: scale.view(-1).view(torch.uint8)[:1].bitwise_xor_(1))
    if not known:
        (out / "merge.json").unlink()
    with pytest.raises(PipelineError, match=f"untouched: {weight} differs"):
        merge(written[name], dense[1], out, save="existing", verify="structure")


def test_the_command_verifies_a_bases_format_written_anew(
    dense: tuple[Path, Path], written: dict[str, Path], anew: dict[str, Path], tmp_path: Path
) -> None:
    request = [f"base_model={written['fp4']}", f"adapter={dense[1]}", f"output={anew['fp4']}"]
    said = answer("recipe=verify", *request, "verify.tokens=0", "verify.min_retained=-9", cwd=tmp_path)
    assert said.status == 0, said


def damaged(folder: Path, weight: str) -> None:
    def flip(codes: Tensor) -> None:
        codes.view(-1).view(torch.uint8)[7] ^= 0x88 if codes.dtype == torch.uint8 else 0x40

    change(folder, weight, flip)


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "int8", "fp8-block", "int4-g128"])
@pytest.mark.parametrize("module", ["self_attn.q_proj", "self_attn.v_proj"])
def test_one_wrong_code_is_found(
    dense: tuple[Path, Path], tmp_path: Path, written: dict[str, Path], name: str, module: str
) -> None:
    folder = shutil.copytree(written[name], tmp_path / "out")
    (folder / "merge.json").unlink()
    suffix = "_packed" if name == "int4-g128" else ""
    damaged(folder, f"model.layers.1.{module}.weight{suffix}")
    gate = "rounding" if "q_proj" in module else "converted"
    with pytest.raises(PipelineError, match=f"{gate}: .*model.layers.1.{module}"):
        merge(*dense, folder, save="existing", verify="standard", verify_settings=FILES_ONLY)


def test_a_tensor_beside_the_codes_that_is_gone_is_missed(
    dense: tuple[Path, Path], tmp_path: Path, written: dict[str, Path]
) -> None:
    folder = shutil.copytree(written["int8"], tmp_path / "out")
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        kept = {n: t for n, t in state.items() if n != "model.layers.1.self_attn.q_proj.SCB"}
        if len(kept) < len(state):
            save_file(kept, path, {"format": "pt"})
            index = json.loads((folder / shards.INDEX).read_text())
            index["weight_map"].pop("model.layers.1.self_attn.q_proj.SCB")
            (folder / shards.INDEX).write_text(json.dumps(index))
    with pytest.raises((PipelineError, Refused), match=r"q_proj\.(weight|SCB)"):
        merge(*dense, folder, save="existing", verify="structure")


def test_the_report_says_what_survives(written: dict[str, Path]) -> None:
    report = json.loads((written["nf4"] / "report.json").read_text())
    assert any("codes are off by" in text and "of the deltas" in text for text in report["findings"])
    manifest = json.loads((written["nf4"] / "merge.json").read_text())
    merged = [w for w in manifest["weights"].values() if w["action"] == "merged"]
    assert all(w["noise"] > 0 and w["dtype"] == "bnb nf4 block 64" for w in merged)
    encoded = [w for w in manifest["weights"].values() if w["action"] == "encoded"]
    assert len(merged) == 4 and len(encoded) == 10
    assert "quantized to bnb nf4 block 64" in (written["nf4"] / "README.md").read_text()


def test_noise_is_the_distance_over_the_delta(dense: tuple[Path, Path], tmp_path: Path) -> None:
    report = merge(*dense, tmp_path / "out", quantize="nf4")
    merge(*dense, tmp_path / "wide", dtype="float32")
    base, wide, found = tensors(dense[0]), tensors(tmp_path / "wide"), decoded(tmp_path / "out")
    for name, facts in report.weights.items():
        D = wide[name].double() - base[name].double()
        off = (found[name].double() - wide[name].double()).norm() / D.norm()
        kept = ((found[name].double() - base[name].double()) * D).sum() / (D * D).sum()
        assert facts["noise"] == pytest.approx(float(off), rel=1e-3)  # sums in float32 over bfloat16's D
        assert facts["retained"] == pytest.approx(float(kept), rel=1e-3)


def test_logits_are_compared_by_our_own_decoding_and_only_told(
    dense: tuple[Path, Path], tmp_path: Path
) -> None:
    report = merge(
        *dense, tmp_path / "out", quantize="nf4", verify="standard", verify_settings={"tokens": 128}
    )
    (gate,) = (gate for gate in report.gates if gate.name == "logits")
    assert gate.status is Status.passed and "reported only" in gate.wanted
    assert report.logits and report.logits["kl_mean"] > 0


def test_a_verdict_of_verified_says_what_is_lost_wherever_it_is_read(
    dense: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where weights of 16 bits would be refused: the ratio refuses no codes, the share was allowed for."""
    small, out = write_lora(tmp_path / "small", dense[0], size=0.02), tmp_path / "out"
    nf4 = tmp_path / "nf4"
    merge(*dense, nf4, quantize="nf4")
    settings = {"verify": "standard", "verify_settings": {"tokens": 128, "min_retained": 0}}
    report = merge(nf4, small, out, quantize="keep", **settings)
    assert report.passed and report.logits and report.logits["ratio"] > 0.01
    share = next(gate for gate in report.gates if gate.name == "retained").seen.split()[0]
    told = (
        "the files are what was asked for, but "
        f"only {100 * float(share):.3g} % of the delta is kept and "
        f"{100 * report.logits['ratio']:.3g} % of the adapter's effect is lost "
        f"(KL ratio {report.logits['ratio']:.3g}), stored as bnb nf4 block 64"
    )
    assert report.reservation == json.loads((out / "report.json").read_text())["reservation"] == told
    assert re.search(rf"^verified in .*: {re.escape(told)}$", capsys.readouterr().out, re.MULTILINE)
    assert f"The{told[3:]}." in unescape((out / "report.html").read_text())
    sixteen = merge(nf4, small, tmp_path / "sixteen", verify="standard", verify_settings={"tokens": 128})
    assert sixteen.passed and sixteen.reservation == ""


def test_float16_overflow_of_int8_is_refused(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", torch.bfloat16)
    adapter = write_lora(tmp_path / "adapter", base, size=300.0)
    with pytest.raises(PipelineError, match="holds values that are not finite"):
        merge(base, adapter, tmp_path / "out", quantize="int8")


@pytest.mark.parametrize(
    ("name", "beside"), [("nf4", ".absmax"), ("fp8-block", "_scale_inv"), ("int4-g128", "_scale")]
)
def test_a_wrong_scale_is_found(
    dense: tuple[Path, Path], tmp_path: Path, written: dict[str, Path], name: str, beside: str
) -> None:
    folder = shutil.copytree(written[name], tmp_path / "out")
    (folder / "merge.json").unlink()
    weight = "model.layers.0.self_attn.q_proj.weight"
    change(folder, f"{weight}{beside}", lambda scale: scale.view(-1)[:1].mul_(1.5))
    with pytest.raises(PipelineError, match=rf"rounding: .*{weight}"):
        merge(*dense, folder, save="existing", verify="standard", verify_settings=FILES_ONLY)


def test_codes_that_fit_a_scale_that_serves_badly_are_found(
    dense: tuple[Path, Path], tmp_path: Path, written: dict[str, Path]
) -> None:
    """Each code is the nearest over its scale; but that is so large that all of them are subnormal."""
    folder = shutil.copytree(written["fp8-channel"], tmp_path / "out")
    weight = "model.layers.0.self_attn.v_proj.weight"
    W = tensors(dense[0])[weight]
    scale = tensors(folder)[f"{weight}_scale"].float() * 2.0**15
    codes = (W.float() / scale).to(torch.float8_e4m3fn)
    change(folder, f"{weight}_scale", lambda stored: stored.copy_(scale.to(stored.dtype)))
    change(folder, weight, lambda stored: stored.copy_(codes))
    encoder = SCHEMES["fp8-channel"].encoder(weight, tuple(W.shape), "BF16")
    assert encoder
    for path, faulty in ((written["fp8-channel"], False), (folder, True)):
        read, facts, nothing = Written(path), Facts(), torch.zeros(1, 1, dtype=torch.float64)
        with standard_of(encoder, read.codes[weight], False) as standard:
            standard.compare(facts, read.rows(weight, 0, len(W)), 0, W, nothing, nothing)
        assert facts.beyond == 0 and facts.is_noisy == faulty


def change(folder: Path, name: str, how: Callable[[Tensor], object]) -> None:
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        if name in state:
            how(state[name])
            save_file(state, path, {"format": "pt"})
