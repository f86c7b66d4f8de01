"""extract=svd: what comes out is what PEFT loads, and base + adapter is the fine-tune."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipeline.extraction.choice import Rest
from pipeline.ground import workplace
from pipeline.ground.dtypes import FloatDtype
from pipeline.ground.errors import Refused
from pipeline.ground.ranks import Budget, NoiseEdge
from tests.models import LINEAR, tensors, write_llama, write_lora
from tests.running import merge
from tests.stages.extracting import ALL, config_of, extract, extraction
from tests.tolerance import FLOAT32_FORWARD

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


pytestmark = pytest.mark.usefixtures("one_thread")


def llama(**config: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "tie_word_embeddings": False, **config}))


def gpt2(**config: Any) -> Any:
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64, **config)
    )


def qwen2() -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=False))


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=3, tie_word_embeddings=False))


def is_layer(name: str) -> bool:
    return "proj" in name


def always(name: str) -> bool:
    return True


def tuned_pair(
    folder: Path, make: Callable[[], Any], changes: Callable[[str], bool] = always, size: float = 0.05
) -> tuple[Path, Path]:
    """A float32 model, and the same with noise on the parameters that `changes` names."""
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(folder / "base")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if changes(name):
            parameter.data += size * torch.randn_like(parameter)
    model.save_pretrained(folder / "tuned", max_shard_size="20KB")
    return folder / "base", folder / "tuned"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(1, 25)[None]).logits
    return found


def is_the_fine_tune(base: Path, tuned: Path, adapter: Path, tokens: int | None = None) -> bool:
    """Whether base + adapter, as PEFT runs them, answer as the fine-tune does; PEFT must take every key."""
    model = AutoModelForCausalLM.from_pretrained(base)
    before = logits(model)
    if tokens:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    model = PeftModel.from_pretrained(model, str(adapter))
    loaded = model.load_adapter(str(adapter), "default")
    assert not loaded.missing_keys
    assert not [key for key in loaded.unexpected_keys if ".modules_to_save." not in key]
    wanted, found = logits(AutoModelForCausalLM.from_pretrained(tuned)), logits(model)
    moved = (wanted[..., : before.shape[-1]] - before).abs().max()
    return bool((found - wanted).abs().max() < FLOAT32_FORWARD * moved)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "biased llama": lambda: llama(attention_bias=True, mlp_bias=True),
    "qwen2": qwen2,
    "gpt2": gpt2,
    "mixtral": mixtral,
}


@pytest.mark.parametrize("model", MODELS)
def test_at_full_rank_base_and_adapter_are_the_fine_tune(tmp_path: Path, model: str) -> None:
    base, tuned = tuned_pair(tmp_path, MODELS[model])
    report = extract(base, tuned, tmp_path / "out", rank=ALL)
    assert report.passed
    assert is_the_fine_tune(base, tuned, tmp_path / "out")


@pytest.mark.parametrize("model", MODELS)
def test_merged_back_it_is_the_fine_tune(tmp_path: Path, model: str) -> None:
    base, tuned = tuned_pair(tmp_path, MODELS[model])
    report = extract(base, tuned, tmp_path / "out", rank=ALL, save="both", verify="standard")
    assert report.passed
    wanted, found = tensors(tuned), tensors(tmp_path / "out")
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        assert float((found[name] - weight).abs().max()) < FLOAT32_FORWARD * 0.05, name
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()
    assert not list((tmp_path / "out").glob(".*"))


def test_embeddings_and_head_can_be_saved_or_low_rank(tmp_path: Path) -> None:
    base, tuned = tuned_pair(tmp_path, llama)
    saved = ("embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm")
    settings = {"rank": ALL, "targeted_modules": ("self_attn", "mlp"), "saved_modules": saved}
    extract(base, tuned, tmp_path / "out", rest=Rest.refuse, **settings)
    assert "lm_head" in config_of(tmp_path / "out")["modules_to_save"]
    assert is_the_fine_tune(base, tuned, tmp_path / "out")


def test_tied_embeddings_can_be_saved(tmp_path: Path) -> None:
    base, tuned = tuned_pair(tmp_path, MODELS["tied llama"])
    extract(
        base, tuned, tmp_path / "out", rank=ALL, saved_modules=("embed_tokens",), targeted_modules=("mlp",)
    )
    assert config_of(tmp_path / "out")["ensure_weight_tying"] is True
    assert is_the_fine_tune(base, tuned, tmp_path / "out")
    assert "self_attn" in str(config_of(tmp_path / "out")["modules_to_save"])


def test_a_larger_vocabulary_is_saved_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(100, mean_resizing=False)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=ALL)
    assert {"model.embed_tokens", "lm_head"} <= set(config_of(tmp_path / "out")["modules_to_save"])
    assert is_the_fine_tune(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", tokens=100)


def test_unchanged_weights_are_left_out(tmp_path: Path) -> None:
    base, tuned = tuned_pair(tmp_path, llama, lambda name: "layers.1.mlp.up_proj" in name)
    extract(base, tuned, tmp_path / "out", saved_modules=("norm",))
    found = config_of(tmp_path / "out")
    assert found["target_modules"] == ["model.layers.1.mlp.up_proj"]
    assert found["modules_to_save"] is None
    assert len(tensors(tmp_path / "out")) == 2


def test_what_is_captured_is_what_a_full_svd_captures(tmp_path: Path) -> None:
    base, tuned = tuned_pair(tmp_path, llama, lambda name: "layers" in name and "norm" not in name)
    extract(base, tuned, tmp_path / "out", rank=6)
    facts = json.loads((tmp_path / "out/merge.json").read_text())["extraction"]
    before, after, factors = tensors(base), tensors(tuned), tensors(tmp_path / "out")
    for name, said in facts.items():
        D = (after[name] - before[name]).double()
        key = f"base_model.model.{name.removesuffix('.weight')}"
        A, B = (factors[f"{key}.lora_{x}.weight"].double() for x in "AB")
        best = torch.linalg.svdvals(D)[6:].square().sum()
        assert float((D - B @ A).square().sum() / best) < 1.001
        assert said["rank"] == 6
        assert abs(said["captured"] - float(1 - best / D.square().sum())) < 1e-4
        assert float((A.norm(dim=1) / B.norm(dim=0) - 1).abs().max()) < 1e-3  # a balanced split


@pytest.mark.parametrize("size", [0.02, 0.1])
def test_merged_in_bfloat16_auto_gives_back_the_rank(tmp_path: Path, size: float) -> None:
    base = write_llama(tmp_path / "base", hidden_size=128, intermediate_size=192, vocab_size=64)
    adapter = write_lora(tmp_path / "lora", base, size=size)
    merge(base, adapter, tmp_path / "tuned")
    report = extract(base, tmp_path / "tuned", tmp_path / "out", rank=NoiseEdge())
    found = config_of(tmp_path / "out")
    assert (found["r"], found["rank_pattern"], found["lora_alpha"]) == (4, {}, 4)
    assert report.passed
    true, extracted = (tensors(folder) for folder in (adapter, tmp_path / "out"))
    before, after = tensors(base), tensors(tmp_path / "tuned")
    for key in [key for key in true if key.endswith("lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        B = key.replace("lora_A", "lora_B")
        D = 1.5 * true[B].double() @ true[key].double()
        raw = after[f"{module}.weight"].double() - before[f"{module}.weight"].double()
        near = (extracted[B].double() @ extracted[key].double() - D).norm()
        assert float(near) < float((raw - D).norm())  # nearer to the truth than the checkpoints' difference


def test_a_budget_is_kept_and_spent(tmp_path: Path) -> None:
    base, tuned = tuned_pair(tmp_path, llama, lambda name: "proj" in name)
    extract(base, tuned, tmp_path / "out", rank=Budget(4000, False))
    spent = sum(t.numel() for t in tensors(tmp_path / "out").values())
    assert 3900 < spent <= 4000
    extract(base, tuned, tmp_path / "small", rank=Budget(8000, True), factors=FloatDtype.bfloat16)
    assert sum(t.numel() * 2 for t in tensors(tmp_path / "small").values()) <= 8000


def test_ranks_and_alphas_of_modules_are_what_peft_reads(tmp_path: Path) -> None:
    base, tuned = tuned_pair(tmp_path, llama, lambda name: "proj" in name)
    patterns = {"rank_pattern": {"k_proj": 16, "v_proj": 16}, "alpha_pattern": {"up_proj": 7}}
    extract(base, tuned, tmp_path / "out", rank=32, alpha=5.0, **patterns)
    assert is_the_fine_tune(base, tuned, tmp_path / "out")
    shapes = {key: tuple(t.shape) for key, t in tensors(tmp_path / "out").items()}
    assert shapes["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"] == (16, 32)


def test_rslora_scales_by_the_root(tmp_path: Path) -> None:
    base, tuned = tuned_pair(tmp_path, llama, lambda name: "mlp" in name)
    extract(base, tuned, tmp_path / "out", rank=32, alpha=9.0, rslora=True)
    assert config_of(tmp_path / "out")["use_rslora"] is True
    assert is_the_fine_tune(base, tuned, tmp_path / "out")


def test_the_same_request_gives_the_same_bytes(tmp_path: Path) -> None:
    base, tuned = tuned_pair(tmp_path, llama)
    files = []
    for name in ("one", "two"):
        extract(base, tuned, tmp_path / name, memory_limit=1 if name == "one" else None)
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_several_adapters_become_one_and_one_becomes_smaller(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", torch.float32)
    one = write_lora(tmp_path / "one", base, target_modules=["q_proj", "up_proj"])
    two = write_lora(tmp_path / "two", base, r=3, target_modules=["q_proj"])
    extract(base, None, tmp_path / "out", adapter={one: 1.0, two: -0.5}, rank=NoiseEdge())
    found = config_of(tmp_path / "out")
    assert {found["r"], *found["rank_pattern"].values()} <= {4, 7}  # two's A and B begin as one's do
    merge(base, {one: 1.0, two: -0.5}, tmp_path / "merged")
    merge(base, tmp_path / "out", tmp_path / "again")
    wanted, again = tensors(tmp_path / "merged"), tensors(tmp_path / "again")
    for name, weight in wanted.items():
        assert float((again[name] - weight).abs().max()) < 1e-6, name
    extract(base, None, tmp_path / "small", adapter=one, rank=2)
    assert config_of(tmp_path / "small")["r"] == 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rest": ({"rest": Rest.refuse}, r"norm.weight changed by .* of its norm, but neither .* extract.rest"),
    "no such module": (
        {"targeted_modules": ("q_prj",)},
        "targeted_modules: 'q_prj' matches no module; did you",
    ),
    "in both": (
        {"targeted_modules": ("mlp",), "saved_modules": ("up_proj",)},
        "saved_modules: model.layers.0.mlp.up_proj is meant by targeted_modules too",
    ),
    "too large a rank": ({"rank": 64}, r"rank: 64 is more than .* \(.*32\) has; give at most"),
    "no rank": ({"rank": None}, "rank: is not set"),
    "alpha": ({"alpha": -1.0}, "alpha: -1.0 is not a number above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_requests_are_refused_before_anything_is_written(tmp_path: Path, case: str) -> None:
    base, tuned = tuned_pair(tmp_path, llama)
    settings, sentence = REFUSED[case]
    with pytest.raises(Refused, match=sentence):
        extract(base, tuned, tmp_path / "out", **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_identical_checkpoints_have_nothing_to_extract(tmp_path: Path) -> None:
    base, tuned = tuned_pair(tmp_path, llama, lambda name: False)
    with pytest.raises(Refused, match="finetune: is the same as the base in every weight"):
        extract(base, tuned, tmp_path / "out")


def test_another_model_is_refused(tmp_path: Path) -> None:
    base, _ = tuned_pair(tmp_path / "a", llama)
    other, _ = tuned_pair(tmp_path / "b", qwen2)
    with pytest.raises(
        Refused, match="finetune: is a model of type 'qwen2', but the base is one of type 'llama'"
    ):
        extract(base, other, tmp_path / "out")
    wider, _ = tuned_pair(tmp_path / "c", lambda: llama(intermediate_size=64))
    with pytest.raises(Refused, match=r"finetune: model.layers.0.mlp.* is \[.*64.*\], the base's \[.*48"):
        extract(base, wider, tmp_path / "out")
    longer, _ = tuned_pair(tmp_path / "d", lambda: llama(num_hidden_layers=3))
    with pytest.raises(Refused, match=r"finetune: has model.layers.2.*, which the base lacks \(9 weights"):
        extract(base, longer, tmp_path / "out")
    with pytest.raises(Refused, match=r"finetune: has no model.layers.2.*, which the base has \(9 weights"):
        extract(longer, base, tmp_path / "out")


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    def make() -> Any:
        model = llama()
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
        return model

    base, _ = tuned_pair(tmp_path / "a", llama)
    broken, _ = tuned_pair(tmp_path / "b", make)
    with pytest.raises(Refused, match=r"finetune: model.layers.1.mlp.up_proj.weight holds values"):
        extract(base, broken, tmp_path / "out")
    with pytest.raises(Refused, match=r"base_model: model.layers.1.mlp.up_proj.weight holds values"):
        extract(broken, base, tmp_path / "out")


def test_rest_may_be_skipped(tmp_path: Path) -> None:
    base, tuned = tuned_pair(tmp_path, llama)
    report = extract(base, tuned, tmp_path / "out", targeted_modules=("mlp",), rest=Rest.skip)
    assert config_of(tmp_path / "out")["modules_to_save"] is None
    assert any("left out by extract.rest=skip" in f.text for f in report.plan.findings)


def test_what_is_no_sum_is_not_decomposed(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    dora = write_lora(tmp_path / "dora", base, use_dora=True, target_modules=LINEAR[:1])
    with pytest.raises(Refused, match=r"adapter: .*DoRA.*depends on the base"):
        extract(base, None, tmp_path / "out", adapter=dora)


def test_a_dry_run_tells_bounds_and_reads_no_weight(tmp_path: Path) -> None:
    base, tuned = tuned_pair(tmp_path, llama)
    plan = extraction(base, tuned, tmp_path / "out", dry_run=True, rank=NoiseEdge()).plan()
    assert any("rank at most 32" in delta for w in plan.weights for delta in w.deltas)
    assert not (tmp_path / "out.partial").exists()


def test_an_adapter_that_exists_is_not_saved_again(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    adapter = write_lora(tmp_path / "lora", base)
    with pytest.raises(Refused, match="save: adapter writes what extract=svd makes"):
        merge(base, adapter, tmp_path / "out", save="adapter")


@pytest.mark.parametrize("rank", [8, Budget(40_000, in_bytes=False)])
@pytest.mark.parametrize("factors", [FloatDtype.float32, FloatDtype.bfloat16])
def test_the_plan_knows_what_the_disk_must_hold_while_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factors: FloatDtype, rank: Any
) -> None:
    """The float32 factors of all modules beside the adapter; headers and spectra are a few kilobytes."""
    base, tuned = tuned_pair(tmp_path, partial(llama, hidden_size=256, intermediate_size=512), is_layer)
    made = extraction(base, tuned, tmp_path / "out", rank=rank, factors=factors, max_rank=32)
    (planned,) = (part.extraction for part in made.extract.plan().parts)
    assert planned
    made.extract()
    written = [path.stat().st_size for path in (tmp_path / "out.partial").rglob("*") if path.is_file()]
    assert 0.9 * planned.needed < sum(written) < planned.needed + 4096 * (len(planned.chosen.lora) + 1)
    other = extraction(base, tuned, tmp_path / "other", rank=rank, factors=factors, max_rank=32)
    monkeypatch.setattr(workplace, "free_bytes", lambda output: planned.needed)
    assert other.plan().disk == planned.disk
    monkeypatch.setattr(workplace, "free_bytes", lambda output: planned.needed - 1)
    with pytest.raises(
        Refused, match=r"^output: '.*other' needs .* while it is made, but its disk has .* free$"
    ):
        other.plan()
