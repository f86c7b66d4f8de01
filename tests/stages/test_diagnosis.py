"""recipe=verify on merges that others made: every broken one is named by its cause, no sound one refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.door import Request, fulfil
from pipeline.ground.errors import PipelineError
from tests.models import LINEAR, tensors, write_llama, write_lora
from tests.running import merge, pipeline

RANK, ALPHA = 8, 12.0
Q = "model.layers.1.self_attn.q_proj.weight"
Made = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A base, an adapter, and a sound merge of them."""
    folder = tmp_path_factory.mktemp("made")
    base = write_llama(folder / "base", shard="1GB")
    (base / "tokenizer.json").write_text(json.dumps(tokenizer("abc")))
    adapter = write_lora(folder / "adapter", base, r=RANK, lora_alpha=ALPHA)
    merge(base, adapter, folder / "merged")
    for name in ("merge.json", "report.json", "report.html"):
        (folder / "merged" / name).unlink()  # another tool's would not be there
    return base, adapter, folder / "merged"


def tokenizer(tokens: str) -> dict[str, object]:
    return {"model": {"type": "BPE", "vocab": {t: n for n, t in enumerate(tokens)}, "merges": []}}


def verify(base: Path, adapter: Path, merged: Path) -> None:
    merge(base, adapter, merged, save="existing", verify="standard", verify_settings={"tokens": 0})


def causes(base: Path, adapter: Path | dict[Path, float], merged: Path, page: Path) -> str:
    """What is told of a merge that is refused, all of it: the failed gate and the likely causes."""
    settings = {"save": "existing", "verify": "standard", "verify_settings": {"tokens": 0}}
    request = Request(pipeline(base, adapter, merged, **settings), {}, report=page)
    with pytest.raises(PipelineError, match=r"likely cause: |config: "):
        fulfil(request)
    report = json.loads(page.read_text())
    failed = [f"{g['name']}: {g['seen']}" for g in report["gates"] if g["status"] == "failed"]
    return " | ".join([*failed, *report["causes"]])


State = dict[str, torch.Tensor]


def changed(change: Callable[[State, State, State], None]) -> Callable[[Path, State, State], None]:
    """A change of the merged state; given too are the base's and the exact deltas in float32."""

    def on(folder: Path, base: State, deltas: State) -> None:
        state = load_file(folder / "model.safetensors")
        change(state, base, deltas)
        tensors = {name: t.contiguous().clone() for name, t in state.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return on


def scaled(factor: float, only: str = "") -> Callable[[Path, State, State], None]:
    def change(state: State, base: State, deltas: State) -> None:
        for name, D in deltas.items():
            if only in name:
                state[name] = (base[name].float() + factor * D).bfloat16()

    return changed(change)


def config(**fields: object) -> Callable[[Path, State, State], None]:
    def on(folder: Path, base: State, deltas: State) -> None:
        table = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**table, **fields}))

    return on


def another_base(state: State, base: State, deltas: State) -> None:
    torch.manual_seed(5)
    for name in state:
        state[name] = (state[name].float() * (1 + 0.05 * torch.randn(state[name].shape))).bfloat16()


def another_unmerged(state: State, base: State, deltas: State) -> None:
    state |= base
    another_base(state, base, deltas)


def another_twice(state: State, base: State, deltas: State) -> None:
    another_unmerged(state, base, deltas)
    for name, D in deltas.items():
        state[name] = (state[name].float() + 2 * D).bfloat16()


def another_adapter(state: State, base: State, deltas: State) -> None:
    torch.manual_seed(5)
    for name, D in deltas.items():
        other = torch.randn(D.shape[0], RANK) @ torch.randn(RANK, D.shape[1])
        state[name] = (base[name].float() + other * (D.norm() / other.norm())).bfloat16()


def eight_bit_base(state: State, base: State, deltas: State) -> None:
    for name, D in deltas.items():
        step = base[name].float().abs().amax(1, keepdim=True) / 127
        state[name] = ((base[name].float() / step).round() * step + D).bfloat16()


def nf4(values: torch.Tensor) -> torch.Tensor:
    """Through bitsandbytes' four bits and back, as one row: its CPU kernel wants rows of whole blocks."""
    row = values.reshape(1, -1)
    return dequantize_4bit(*quantize_4bit(row, quant_type="nf4", compress_statistics=True)).view(values.shape)


def four_bit_base(state: State, base: State, deltas: State) -> None:
    for name, D in deltas.items():
        state[name] = (nf4(base[name]).float() + D).bfloat16()


def quantized_after(state: State, base: State, deltas: State) -> None:
    for name in deltas:
        state[name] = nf4(state[name])


def rounded_twice(state: State, base: State, deltas: State) -> None:
    for name, D in deltas.items():
        state[name] = base[name] + D.bfloat16()


def through_float16(state: State, base: State, deltas: State) -> None:
    for name in state:
        state[name] = state[name].float()


def lost_prefix(state: State, base: State, deltas: State) -> None:
    for name in list(state):
        state[name.replace("model.", "language_model.model.", 1)] = state.pop(name)


def beside(state: State, base: State, deltas: State) -> None:
    for name in deltas:
        module = name.removesuffix(".weight")
        state[f"{module}.base_layer.weight"] = base[name]
        state[f"{module}.lora_A.default.weight"] = torch.zeros(RANK, base[name].shape[1])
        del state[name]


def swapped_layers(state: State, base: State, deltas: State) -> None:
    for name in deltas:
        other = (
            name.replace("layers.0", "layers.x")
            .replace("layers.1", "layers.0")
            .replace("layers.x", "layers.1")
        )
        state[name] = (base[name].float() + deltas[other]).bfloat16()


def permuted(state: State, base: State, deltas: State) -> None:
    for name in deltas:
        if "q_proj" in name:
            state[name] = state[name].view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)


def transposed(state: State, base: State, deltas: State) -> None:
    state[Q] = (base[Q].float() + deltas[Q].T).bfloat16()


def mixed_rank(state: State, base: State, deltas: State) -> None:
    U, S, V = torch.linalg.svd(deltas[Q])
    state[Q] = (base[Q].float() + (U[:, :RANK] * S[:RANK]).roll(1, 1) @ V[:RANK]).bfloat16()


def overflown(state: State, base: State, deltas: State) -> None:
    state[Q][0, 0] = torch.inf


def copy_adapter(folder: Path, base: State, deltas: State) -> None:
    (folder / "adapter_config.json").write_text("{}")


def other_tokens(folder: Path, base: State, deltas: State) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer("acb")))


def fewer_rows(state: State, base: State, deltas: State) -> None:
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:100]


BROKEN: dict[str, tuple[Callable[[Path, State, State], None], str]] = {
    "not merged at all": (scaled(0), "the adapter was not merged: every weight is the base's"),
    "some modules not merged": (scaled(0, "v_proj"), "not merged into 2 of 14 merged weights"),
    "merged twice": (scaled(2), "all 14 merged weights: holds 2 times the delta: merged twice"),
    "subtracted": (scaled(-1), "subtracted instead of added"),
    "alpha forgotten": (scaled(RANK / ALPHA), "the scale was left out (alpha forgotten)"),
    "alpha taken for 1": (scaled(1 / ALPHA), "alpha was taken for 1"),
    "not divided by the rank": (scaled(RANK), "alpha was not divided by the rank"),
    "as if rank-stabilised": (scaled(RANK**0.5), "as for rslora"),
    "too small by the root of the rank": (scaled(RANK**-0.5), "too small by sqrt(rank)"),
    "half of it": (scaled(0.5), "holds 0.5 times the delta: a scale or weight that the recipe does not name"),
    "added to another base": (changed(another_base), "added to another base"),
    "another adapter": (changed(another_adapter), "another adapter was merged, or none, and that into"),
    "another base, unmerged": (changed(another_unmerged), "another base, and the adapter is not in it"),
    "another base, twice": (changed(another_twice), "touches; it holds 2.00 (+- 0.0"),
    "added to an 8-bit base": (changed(eight_bit_base), "merged into another form of the base: a quantized"),
    "added to the 4-bit base": (changed(four_bit_base), "added to the base's 4-bit (NF4) form"),
    "quantized afterwards": (changed(quantized_after), "quantized to 4 bits after the merge"),
    "rounded twice": (changed(rounded_twice), "the delta was rounded to BF16 before it was added"),
    "rounded on the way": (changed(through_float16), "it was rounded to BF16 before it was stored as F32"),
    "names of another class": (changed(lost_prefix), "20 weights have other names, as language_model.model."),
    "saved unmerged": (changed(beside), "call merge_and_unload first"),
    "deltas of other layers": (changed(swapped_layers), "got what belongs to model.layers.1"),
    "rows in rope's other order": (changed(permuted), "its rows stand in another order"),
    "added transposed": (changed(transposed), f"{Q}: the delta is scrambled: the delta was added transposed"),
    "rank mixed up": (changed(mixed_rank), "rows of A meet the wrong columns of B"),
    "overflown": (changed(overflown), "holds infinite or NaN values"),
    "adapter beside it": (copy_adapter, "the adapter's files lie beside the merged weights"),
    "other token ids": (other_tokens, "gives 2 tokens other ids"),
    "vocabulary cut": (changed(fewer_rows), "has 100 rows instead of 160"),
    "retied": (config(tie_word_embeddings=True), "ties lm_head to the embeddings, but the file holds two"),
    "another rope": (config(rope_parameters={"rope_theta": 5.0}), "says rope_theta 5.0"),
    "quantization left": (config(quantization_config={"bits": 4}), "still has a quantization_config"),
}  # fmt: skip


def exact_deltas(adapter: Path) -> State:
    lora = load_file(adapter / "adapter_model.safetensors")
    modules = {name.partition(".lora_")[0] for name in lora}
    return {
        f"{m.removeprefix('base_model.model.')}.weight": ALPHA
        / RANK
        * (lora[f"{m}.lora_B.weight"] @ lora[f"{m}.lora_A.weight"])
        for m in modules
    }


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_merge_is_named_by_its_cause(made: Made, tmp_path: Path, name: str) -> None:
    base, adapter, merged = made
    breaking, said = BROKEN[name]
    folder = shutil.copytree(merged, tmp_path / "out")
    breaking(folder, tensors(base), exact_deltas(adapter))
    told = causes(base, adapter, folder, tmp_path / "report.json")
    assert said in told
    assert "no known cause" not in told
    assert "save.rounding" not in told  # which whoever has not made the merge cannot set


FAINT = ("not merged at all", "some modules not merged", "merged twice", "subtracted", "alpha forgotten")
FAINT += ("half of it", "rounded twice")


@pytest.fixture(scope="module")
def faint(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """As `made`, with deltas of 0.2 % of the weights, of which bfloat16 loses most steps."""
    folder = tmp_path_factory.mktemp("faint")
    base = write_llama(folder / "base", shard="1GB")
    adapter = write_lora(folder / "adapter", base, r=RANK, lora_alpha=ALPHA, size=0.003)
    merge(base, adapter, folder / "merged")
    (folder / "merged" / "merge.json").unlink()
    return base, adapter, folder / "merged"


@pytest.mark.parametrize("name", FAINT)
def test_a_broken_merge_of_an_adapter_that_changes_little_is_named(
    faint: Made, tmp_path: Path, name: str
) -> None:
    base, adapter, merged = faint
    breaking, said = BROKEN[name]
    folder = shutil.copytree(merged, tmp_path / "out")
    breaking(folder, tensors(base), exact_deltas(adapter))
    assert said in causes(base, adapter, folder, tmp_path / "report.json")


def test_a_merge_into_a_model_that_is_merged_is_named(faint: Made, tmp_path: Path) -> None:
    base, adapter, merged = faint
    merge(merged, adapter, tmp_path / "out")
    (tmp_path / "out" / "merge.json").unlink()
    told = causes(base, adapter, tmp_path / "out", tmp_path / "report.json")
    assert "all 14 merged weights: holds 2 times the delta: merged twice" in told


def test_adapters_that_were_added_by_other_weights_are_told_each_with_its_own(
    made: Made, tmp_path: Path
) -> None:
    base, adapter, merged = made
    other = write_lora(tmp_path / "other", base, r=2 * RANK, lora_alpha=ALPHA, size=0.03)
    asked, told = {adapter: 0.7, other: 0.3}, "of what it adds, this holds 1.43 times that of adapter 1, "
    alone = causes(base, asked, merged, tmp_path / "alone.json")
    assert told + "0 times that of adapter 2" in alone
    merge(base, {adapter: 1.0, other: 1.0}, tmp_path / "out")
    (tmp_path / "out" / "merge.json").unlink()
    both = causes(base, asked, tmp_path / "out", tmp_path / "both.json")
    assert told + "3.33 times that of adapter 2" in both


def test_a_cause_that_nothing_explains_is_said_to_be_unknown(made: Made, tmp_path: Path) -> None:
    base, adapter, merged = made
    folder = shutil.copytree(merged, tmp_path / "out")
    changed(lambda s, b, d: s[Q][:20].zero_())(folder, tensors(base), {})  # type: ignore[func-returns-value]
    assert "no known cause explains" in causes(base, adapter, folder, tmp_path / "report.json")


def test_embeddings_that_were_trained_and_lost_are_named(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", shard="1GB")
    adapter = write_lora(
        tmp_path / "adapter", base, r=RANK, target_modules=[*LINEAR, "embed_tokens", "lm_head"]
    )
    merge(base, adapter, tmp_path / "out")
    (tmp_path / "out" / "merge.json").unlink()
    path, plain = tmp_path / "out" / "model.safetensors", tensors(base)
    state = load_file(path)
    state["lm_head.weight"] = plain["lm_head.weight"]
    save_file(state, path, {"format": "pt"})
    told = causes(base, adapter, tmp_path / "out", tmp_path / "report.json")
    assert "what the adapter trained of lm_head.weight is lost" in told


def test_a_lost_head_that_the_config_ties_is_named(made: Made, tmp_path: Path) -> None:
    base, adapter, merged = made
    folder = shutil.copytree(merged, tmp_path / "out")
    changed(lambda s, b, d: s.pop("lm_head.weight"))(folder, {}, {})  # type: ignore[arg-type,return-value]
    config(tie_word_embeddings=True)(folder, {}, {})
    assert "lm_head.weight is gone and the config ties it" in causes(
        base, adapter, folder, tmp_path / "report.json"
    )


FLOATS = ("bfloat16", "float16", "float32")
SOUND = [
    *[("ours", base, dtype, {}) for base in FLOATS for dtype in FLOATS],
    *[("peft", dtype, "keep", {}) for dtype in FLOATS],
    ("ours", "bfloat16", "keep", {"use_rslora": True}),
    ("ours", "bfloat16", "keep", {"use_dora": True}),
    ("ours", "bfloat16", "keep", {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 2}}),
    ("ours", "bfloat16", "keep", {"target_modules": [*LINEAR, "embed_tokens"]}),
    ("ours", "bfloat16", "keep", {"modules_to_save": ["lm_head"]}),
    ("ours", "float32", "keep", {"bias": "none", "target_modules": "all-linear"}),
    ("peft", "float32", "keep", {"use_rslora": True}),
    ("peft", "float32", "keep", {"use_dora": True}),
    ("peft", "bfloat16", "keep", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ("peft", "float32", "keep", {"modules_to_save": ["lm_head"]}),
    ("peft", "float32", "keep", {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 2}}),
]  # fmt: skip


def test_there_are_twenty_sound_merges() -> None:
    assert len(SOUND) >= 20


@pytest.mark.parametrize("case", SOUND, ids=str)
def test_a_sound_merge_is_not_refused(tmp_path: Path, case: tuple[str, str, str, dict[str, object]]) -> None:
    by, kind, dtype, options = case
    base = write_llama(tmp_path / "base", dtype=getattr(torch, kind), shard="1GB")
    adapter = write_lora(tmp_path / "adapter", base, **{"r": RANK, "lora_alpha": ALPHA, **options})
    if by == "ours":
        merge(base, adapter, tmp_path / "out", dtype=dtype)
        (tmp_path / "out" / "merge.json").unlink()
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
        model.merge_and_unload().save_pretrained(tmp_path / "out")
    verify(base, adapter, tmp_path / "out")
