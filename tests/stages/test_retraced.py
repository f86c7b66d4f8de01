"""Faults of the main path - a formula, the binding, the tie - that T1 must see, since its own path has none.

The adapters are sound and so are the files; what is wrong is put into our code while it merges.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from pipeline.ground.deltas import lora_family
from pipeline.ground.deltas.delta import Base, Delta, RowsOf
from pipeline.ground.report import Rejected, Report, Status
from pipeline.merging import binding, plan, tying
from pipeline.merging.binding import Bound
from pipeline.stages.merge import exact
from tests import kind_cases, lora_cases
from tests.beside_peft import Case, load_base, quiet, quietly_merged, with_noise, write
from tests.lora_cases import TIED, gpt2, llama, lora, mixtral
from tests.models import tensors

FORMS = (
    "linear", "rslora", "bdlora", "dora", "conv1d", "conv1d dora", "embeddings", "embeddings dora",
    "convolutions", "convolutions dora", "experts", "experts (in, out)", "parameter of two dimensions",
    "lora_bias", "bias all", "modules_to_save", "tokens",
)  # fmt: skip
KINDS: dict[str, Case] = {**kind_cases.CASES, **{name: lora_cases.CASES[name] for name in FORMS}}
Fault = Callable[[Tensor], Tensor]
FAULTS: dict[str, Fault] = {
    "one percent too much": lambda change: change * 1.01,
    "columns turned round": lambda change: change.flip(1),
}


def written(case: Case, folder: Path) -> Path:
    with quiet():
        write(case, folder, torch.float32)
    return folder


def merged(folder: Path, adapter: Any = None, output: str = "out", **settings: Any) -> Report:
    """The merge, verified but for its logits."""
    report: Report = quietly_merged(
        folder / "base",
        adapter or folder / "adapter",
        folder / output,
        **{"verify": "standard", "verify_settings": {"tokens": 0}, **settings},
    )
    return report


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a kind's base and adapter, written once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = written(KINDS[name], tmp_path_factory.mktemp("kind"))
        return made[name]

    return folder


def kinds_of(cls: type[Delta]) -> Iterator[type[Delta]]:
    for own in cls.__subclasses__():
        yield own
        yield from kinds_of(own)


def with_fault(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Puts it into what every delta of the main path changes."""

    def spoil(cls: Any) -> None:
        sound = cls.open

        @contextmanager
        def open_(self: Delta, device: str, dtype: str, factor: float, base: Base) -> Iterator[RowsOf]:
            with sound(self, device, dtype, factor, base) as rows:

                def faulty(start: int, stop: int, W: Tensor) -> Tensor:
                    value = rows(start, stop, W)
                    if not self.replaces:
                        return fault(value)
                    return W.to(value.dtype) + fault(value - W.to(value.dtype))

                yield faulty

        monkeypatch.setattr(cls, "open", open_)

    for cls in set(kinds_of(Delta)):
        if "open" in vars(cls):
            spoil(cls)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", KINDS)
def test_a_fault_in_a_kinds_rows_is_seen(
    name: str, fault: str, cases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cases(name)
    with_fault(monkeypatch, FAULTS[fault])
    for own in ("base", "adapter"):
        (tmp_path / own).symlink_to(folder / own)
    with pytest.raises(Rejected, match=r"rounding: .* too far off, the worst in"):
        merged(tmp_path)


Change = Callable[[Bound], None]


def with_binding(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Changes what the main path binds to what."""
    sound = binding.bind

    def bind(*arguments: Any) -> Bound:
        bound = sound(*arguments)
        change(bound)
        return bound

    monkeypatch.setattr(plan, "bind", bind)


def exchange(one: str, other: str) -> Change:
    """Two weights get each other's deltas."""

    def change(bound: Bound) -> None:
        bound.placed[one], bound.placed[other] = bound.placed[other], bound.placed[one]

    return change


ATTENTION = "model.layers.0.self_attn.{}_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"


def test_two_modules_of_one_shape_exchanged_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(Case(llama(), lora()), tmp_path)
    with_binding(monkeypatch, exchange(ATTENTION.format("q"), ATTENTION.format("o")))
    with pytest.raises(Rejected, match=r"rounding: .* the worst in model\.layers\.0\.self_attn\.[qo]_proj"):
        merged(tmp_path)


def test_modules_exchanged_are_seen_where_arithmetic_is_narrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(Case(llama(), lora(target_modules=["q_proj", "o_proj"])), tmp_path)
    names = [ATTENTION.format(x) for x in "qo"]
    every = [exchange(*(name.replace(".0.", f".{layer}.") for name in names)) for layer in (0, 1)]
    with_binding(monkeypatch, lambda bound: [change(bound) for change in every] and None)
    with pytest.raises(Rejected, match=r"retained"):
        merged(tmp_path, merge_dtype="bfloat16")


def test_two_experts_exchanged_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(KINDS["experts"], tmp_path)
    with_binding(monkeypatch, exchange(EXPERT.format(0), EXPERT.format(3)))
    with pytest.raises(Rejected, match=r"rounding: .* the worst in .*\.experts\.[03]\.w2"):
        merged(tmp_path)


def test_gate_and_up_exchanged_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(Case(mixtral, lora_cases.CASES["experts"].config), tmp_path)
    gate, up = (EXPERT.format(2).replace("w2", w) for w in ("w1", "w3"))
    with_binding(monkeypatch, exchange(gate, up))
    with pytest.raises(Rejected, match=r"rounding: .* the worst in .*\.experts\.2\.w[13]"):
        merged(tmp_path)


FUSED = "model.layers.0.mlp.experts.gate_up_proj"


def fused(folder: Path) -> None:
    """Three experts in one weight (3, 2 * 8, 6), and an adapter with a module for each and each half."""
    torch.manual_seed(0)
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    save_file({FUSED: torch.randn(3, 16, 6)}, folder / "base" / "model.safetensors", {"format": "pt"})
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    held = {}
    for expert in range(3):
        for half in ("gate", "up"):
            key = f"base_model.model.model.layers.0.mlp.experts.{expert}.{half}_proj.lora_"
            held |= {f"{key}A.weight": torch.randn(2, 6), f"{key}B.weight": torch.randn(8, 2)}
    save_file(held, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["gate_proj", "up_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(told))


def test_an_experts_module_held_whole_is_retraced_into_the_weight_that_holds_all(tmp_path: Path) -> None:
    fused(tmp_path)
    path, config = (tmp_path / "adapter" / n for n in ("adapter_model.safetensors", "adapter_config.json"))
    held = tensors(path.parent)
    module = "base_model.model.model.layers.0.mlp.experts.1.up_proj"
    own = {name: value for name, value in held.items() if not name.startswith(module)}
    save_file({**own, f"{module}.weight": torch.randn(8, 6)}, path, {"format": "pt"})
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "modules_to_save": ["1.up_proj"]}))
    assert merged(tmp_path).passed


def test_modules_of_experts_are_retraced_into_the_weight_that_holds_all(tmp_path: Path) -> None:
    fused(tmp_path)
    report = merged(tmp_path)
    assert report.passed
    assert report.weights[FUSED]["verified_elements"] == 3 * 16 * 6


@pytest.mark.parametrize("rows", [8, 16, 1])
def test_rows_of_a_fused_weight_shifted_are_seen(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a half (gate for up), by an expert, by one."""
    fused(tmp_path)

    def change(bound: Bound) -> None:
        bound.placed[FUSED] = [
            replace(p, row=(p.row + rows) % 48) if p.row + rows + 8 <= 48 or rows > 1 else p
            for p in bound.placed[FUSED]
        ]

    with_binding(monkeypatch, change)
    with pytest.raises(Rejected, match=rf"rounding: .* the worst in {FUSED}"):
        merged(tmp_path)


def test_a_weight_that_the_binding_forgets_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(Case(llama(), lora()), tmp_path)
    name = ATTENTION.format("k")
    with_binding(monkeypatch, lambda bound: bound.placed.pop(name) and None)
    with pytest.raises(Rejected, match=rf"retraced: {name} is not changed, but tensors of the adapter mean"):
        merged(tmp_path)


def test_a_module_that_is_dropped_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(Case(llama(), lora(target_modules=["q_proj", "o_proj"])), tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    held = {key.replace("1.self_attn.q", "1.attn.q"): value for key, value in tensors(path.parent).items()}
    save_file(held, path, {"format": "pt"})
    monkeypatch.setattr(plan, "promises", lambda *_: ())
    with_binding(monkeypatch, lambda bound: bound.homeless.clear())
    with pytest.raises(Rejected, match=r"retraced: no weight answers to the adapter's .*1\.attn\.q_proj"):
        merged(tmp_path)


def test_a_weight_that_nothing_of_the_adapter_means_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(Case(llama(), lora(target_modules=["q_proj"])), tmp_path)
    q, o = ATTENTION.format("q"), ATTENTION.format("o")
    with_binding(monkeypatch, lambda bound: bound.placed.update({o: bound.placed[q]}))
    with pytest.raises(Rejected, match=rf"retraced: {o} is changed, but no tensor of the adapter means it"):
        merged(tmp_path)


def test_a_module_held_whole_that_is_forgotten_or_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(lora_cases.CASES["larger, both saved"], tmp_path)
    head, embeddings = "lm_head.weight", "model.embed_tokens.weight"

    def change(bound: Bound) -> None:
        whole = bound.whole[head]
        bound.whole[head] = replace(bound.whole[embeddings], name=head)
        bound.whole[embeddings] = replace(whole, name=embeddings)

    with_binding(monkeypatch, change)
    with pytest.raises(Rejected, match=r"retraced: .* is not what the adapter holds \(2 in all\)"):
        merged(tmp_path)


def test_a_square_conv1d_merged_as_a_linear_layer_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(Case(gpt2, lora(target_modules=["c_proj"], fan_in_fan_out=True)), tmp_path)
    monkeypatch.setattr(binding, "is_conv1d", lambda *_: False)
    with pytest.raises(Rejected, match=r"rounding: .* the worst in transformer\.h\.\d\.attn\.c_proj"):
        merged(tmp_path)


def test_a_factor_that_patterns_should_have_changed_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(lora_cases.CASES["patterns"], tmp_path)
    monkeypatch.setattr(lora_family, "scaling", lambda module, config, rank: config["lora_alpha"] / rank)
    with pytest.raises(Rejected, match=r"rounding: .* too far off"):
        merged(tmp_path)


def test_embeddings_left_tied_though_one_side_was_trained_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(Case(TIED, lora(target_modules=["lm_head"])), tmp_path)
    monkeypatch.setattr(tying, "_meant_once", lambda *_: True)
    with pytest.raises(Rejected, match=r"retraced: lm_head\.weight is not in the output, but the adapter"):
        merged(tmp_path)


def test_modules_that_the_request_renames_are_retraced_under_their_new_names(tmp_path: Path) -> None:
    written(Case(llama(), lora()), tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    held = tensors(path.parent)
    save_file(
        {k.replace(".model.layers", ".text.layers"): v for k, v in held.items()}, path, {"format": "pt"}
    )
    assert merged(tmp_path, names={"text": "model"}).passed


def test_a_head_that_only_the_adapter_has_is_retraced(tmp_path: Path) -> None:
    """A classifier trained on a language model's files brings its own."""
    written(Case(llama(), lora()), tmp_path)
    path, config = (tmp_path / "adapter" / n for n in ("adapter_model.safetensors", "adapter_config.json"))
    held = tensors(path.parent)
    held["base_model.model.score.weight"] = torch.randn(3, 32)
    save_file(held, path, {"format": "pt"})
    told = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    config.write_text(json.dumps({**json.loads(config.read_text()), **told}))
    assert merged(tmp_path).passed
    assert torch.equal(tensors(tmp_path / "out")["score.weight"], held["base_model.model.score.weight"])


def test_a_merge_stage_that_does_not_tell_what_it_was_asked_is_not_retraced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(Case(llama(), lora()), tmp_path)
    sound = exact.merged
    monkeypatch.setattr(exact, "merged", lambda *arguments: replace(sound(*arguments), merging=None))
    report = merged(tmp_path)
    assert {gate.name: gate.status for gate in report.gates}["retraced"] is Status.skipped


COMBINED = {
    "linear": {},
    "ties": {"density": 0.4},
    "dare_ties": {"density": 0.6},
    "dare_linear": {"density": 0.6},
    "magnitude_prune": {"density": 0.4},
}


@pytest.mark.parametrize("method", COMBINED)
def test_a_fault_in_one_of_several_adapters_is_seen(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_twice(tmp_path)
    several = {tmp_path / "adapter": 0.7, tmp_path / "second": -0.4}
    merged(tmp_path, several, method=method, method_settings=COMBINED[method])
    q, o = ATTENTION.format("q"), ATTENTION.format("o")

    def change(bound: Bound) -> None:
        """The second adapter's deltas on two weights change places."""
        bound.placed[q], bound.placed[o] = (
            [bound.placed[q][0], bound.placed[o][1]],
            [bound.placed[o][0], bound.placed[q][1]],
        )

    with_binding(monkeypatch, change)
    with pytest.raises(Rejected, match=r"rounding: .* the worst in model\.layers\.0\.self_attn\.[qo]_proj"):
        merged(tmp_path, several, "faulty", method=method, method_settings=COMBINED[method])


def written_twice(folder: Path) -> None:
    """Two adapters on one base."""
    case = Case(llama(), lora())
    written(case, folder)
    with quiet():
        tuned = get_peft_model(load_base(case, folder / "base", torch.float32), lora(r=2)())
        with_noise(tuned, seed=2).save_pretrained(folder / "second")


def test_the_share_of_each_adapter_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """normalize=true divides by the sum of the weights."""
    written_twice(tmp_path)
    several = {tmp_path / "adapter": 3.0, tmp_path / "second": 1.0}
    told = {"normalize": True}
    assert merged(tmp_path, several, method="linear", method_settings=told).passed
    monkeypatch.setattr(plan, "normalized", lambda adapter: adapter)
    with pytest.raises(Rejected, match=r"rounding"):
        merged(tmp_path, several, "faulty", method="linear", method_settings=told)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("form", ["nf4", "int8", "fp8-channel"])
def test_a_fault_is_seen_in_codes_too(
    form: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(Case(llama(hidden_size=64, intermediate_size=128), lora()), tmp_path)
    with_fault(monkeypatch, FAULTS[fault])
    with pytest.raises(Rejected, match=r"rounding: .* too far off|retained"):
        merged(tmp_path, quantize=form)
