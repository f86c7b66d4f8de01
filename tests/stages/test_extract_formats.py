"""extract=svd between checkpoints stored differently: codes, GGUF, dtypes, shards, names, vocabularies.

What the files mean is told by the writers of tests/quantizing.py and by gguf-py, not by our decoders; base +
adapter, as PEFT merges them in float64, has to be what the fine-tune's files mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from tests import quantizing
from tests.beside_peft import quiet
from tests.ground.test_gguf_names import write as write_gguf
from tests.models import tensors
from tests.stages.extracting import answers_as, config_of, extract, loaded, noisy
from tests.tolerance import FLOAT32_FACTORS

TOKENS = 160
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": TOKENS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FULL = {"rank": 128, "rank_pattern": {"k_proj": 64, "v_proj": 64}}
FORMATS = {**quantizing.formats(), **dict.fromkeys(["plain", "float16", "GGUF Q8_0", "GGUF F32"])}
PAIRS = [
    ("GGUF Q8_0", "plain"),  # a fine-tune of a 4-bit model, saved in 16 bits
    ("FP8 block", "plain"),
    ("GPTQ", "plain"),
    ("plain", "FP8 block"),
    ("plain", "GGUF Q8_0"),
    ("plain", "float16"),
    ("GGUF F32", "GGUF Q8_0"),
    ("FP8 channel", "NVFP4"),
]


def model_of(tokens: int = TOKENS, tied: bool = False, seed: int = 0) -> Any:
    """A random model whose numbers have bfloat16's precision."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": tokens}, tie_word_embeddings=tied))
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.02 * torch.randn_like(parameter)).bfloat16().float()
    return model


def state_of(model: Any) -> dict[str, Tensor]:
    """What files hold of it: a tied head once."""
    tied = model.config.tie_word_embeddings
    return {
        n: t.detach().clone() for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")
    }


def written(folder: Path, model: Any, form: str) -> tuple[Path, dict[str, Tensor]]:
    """The model in this format, and what its files mean."""
    state, config = state_of(model), {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    if form.startswith("GGUF"):
        kind = GGMLQuantizationType[form.split()[1]]
        folder.mkdir()
        write_gguf(folder / "model.gguf", "llama", model, kind)
        for name, weight in state.items():
            if weight.ndim > 1:
                packed = quants.quantize(weight.numpy(), kind)
                state[name] = torch.from_numpy(quants.dequantize(packed, kind).copy())
        return folder / "model.gguf", state
    dtype = torch.float16 if form == "float16" else torch.bfloat16
    chosen = FORMATS[form]
    if chosen:
        config["quantization_config"] = dict(chosen.config)
    dense = {n: t.to(dtype) for n, t in state.items()}
    base = quantizing.write_base(
        folder, dense, config, lambda n: chosen if quantizing.is_linear(n) else None, lambda n: "q_proj" in n
    )
    return folder, {n: t.float() for n, t in base.weights.items()}


def given_back(base: dict[str, Tensor], adapter: Path, wanted: dict[str, Tensor], **config: Any) -> None:
    """Asserts that PEFT's merge of base + adapter in float64 is what is wanted."""
    told = LlamaConfig(**{**SIZES, **config})
    model = LlamaForCausalLM(told).double()
    missing = model.load_state_dict(base, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    tokens = len(wanted["model.embed_tokens.weight"])
    with quiet():
        if tokens != told.vocab_size:
            model.resize_token_embeddings(tokens, mean_resizing=False)
        found = loaded(model, adapter).merge_and_unload().state_dict()
    for name, value in wanted.items():
        before = base.get(name, base["model.embed_tokens.weight"])
        size = value - before if before.shape == value.shape else value
        far = float((found[name] - value).norm() / size.double().norm())
        assert far < FLOAT32_FACTORS, (name, far)


@pytest.mark.parametrize(("base", "tuned"), PAIRS)
def test_what_codes_mean_is_what_is_compared(tmp_path: Path, base: str, tuned: str) -> None:
    model = model_of()
    base_at, before = written(tmp_path / "base", model, base)
    noisy(model, size=0.01)
    tuned_at, after = written(tmp_path / "tuned", model, tuned)
    with quiet():
        assert extract(base_at, tuned_at, tmp_path / "out", **FULL).passed
    given_back(before, tmp_path / "out", after)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_bitsandbytes_base_is_what_bitsandbytes_decodes(tmp_path: Path, name: str) -> None:
    model = model_of()
    with quiet():
        model.bfloat16().save_pretrained(tmp_path / "dense")
        base = quantizing.write_bitsandbytes(tmp_path / "base", tmp_path / "dense", quantizing.BNB[name])
        noisy(model, size=0.01)
        model.save_pretrained(tmp_path / "tuned")
        assert extract(base.folder, tmp_path / "tuned", tmp_path / "out", **FULL).passed
    before = {n: t.float() for n, t in base.weights.items()}
    given_back(before, tmp_path / "out", {n: t.float() for n, t in tensors(tmp_path / "tuned").items()})


@pytest.mark.parametrize(
    ("base", "tuned"),
    [("plain", "plain"), ("GGUF Q8_0", "plain"), ("FP8 block", "plain"), ("plain", "GGUF Q8_0")],
)
@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_are_saved_with_their_tokenizer(tmp_path: Path, base: str, tuned: str, tied: bool) -> None:
    model = model_of(tied=tied)
    base_at, before = written(tmp_path / "base", model, base)
    model.resize_token_embeddings(TOKENS + 8, mean_resizing=False)
    noisy(model, size=0.01)
    tuned_at, after = written(tmp_path / "tuned", model, tuned)
    if tuned == "plain":
        (tmp_path / "tuned/tokenizer.json").write_text('{"version": "1.0"}')
    with quiet():
        assert extract(base_at, tuned_at, tmp_path / "out", **FULL).passed
        assert extract(base_at, tuned_at, tmp_path / "both", **FULL, save="both", verify="structure").passed
    assert "model.embed_tokens" in config_of(tmp_path / "out")["modules_to_save"]
    if tuned == "plain":
        for folder in ("out", "both"):
            assert (tmp_path / folder / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert json.loads((tmp_path / "both/config.json").read_text())["vocab_size"] == TOKENS + 8
    merged = tensors(tmp_path / "both")
    assert merged.keys() == after.keys()
    assert merged["model.embed_tokens.weight"].shape == (TOKENS + 8, 128)
    given_back(before, tmp_path / "out", after, tie_word_embeddings=tied)


@pytest.mark.parametrize("change", [-8, 8])
def test_a_vocabulary_of_which_only_one_side_changed_is_refused(tmp_path: Path, change: int) -> None:
    from pipeline.ground.errors import Refused

    model = model_of()
    base_at, _ = written(tmp_path / "base", model, "plain")
    noisy(model)
    tuned_at, after = written(tmp_path / "tuned", model, "plain")
    rows = torch.ones(TOKENS + change, 128, dtype=torch.bfloat16)
    after = {n: t.bfloat16() for n, t in after.items()} | {"lm_head.weight": rows}
    for path in tuned_at.glob("*.safetensors*"):
        path.unlink()
    save_file(after, tuned_at / "model.safetensors")
    with (
        quiet(),
        pytest.raises(Refused, match=r"resizes lm_head\.weight to \d+ tokens, but model\.embed_tok"),
    ):
        extract(base_at, tuned_at, tmp_path / "out", **FULL)


TIES = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(("base", "tuned"), TIES)
def test_embeddings_are_the_fine_tunes_whoever_ties_them(
    tmp_path: Path, base: bool, tuned: bool, saved: bool
) -> None:
    before, after = model_of(tied=base), model_of(tied=tuned)
    after.load_state_dict(before.state_dict())
    noisy(after)
    with quiet():
        before.save_pretrained(tmp_path / "base")
        after.save_pretrained(tmp_path / "tuned")
        modules = ("embed_tokens", "lm_head") if saved and not (base and tuned) else ("embed_tokens",)
        told = {"saved_modules": modules} if saved else {}
        folders = (tmp_path / "base", tmp_path / "tuned")
        report = extract(*folders, tmp_path / "out", **FULL, **told)
        assert report.passed
        assert extract(*folders, tmp_path / "both", **FULL, save="both", verify="structure", **told).passed
    warned = any("merge_and_unload adds it twice" in f.text for f in report.plan.findings)
    assert warned == (base and tuned and not saved)
    plain = {name: value.clone() for name, value in before.state_dict().items()}
    answers_as(before, tmp_path / "out", after)
    merged, wanted = tensors(tmp_path / "both"), after.state_dict()
    assert ("lm_head.weight" in merged) == (not (base and tuned))
    for name, value in merged.items():
        change = (wanted[name] - plain[name]).norm()
        assert float((value - wanted[name]).norm() / change) < FLOAT32_FACTORS, name
    config = json.loads((tmp_path / "both/config.json").read_text())
    assert config["tie_word_embeddings"] is (base and tuned)


def test_a_fine_tune_may_lack_the_prefix_of_its_base_and_have_it_more(tmp_path: Path) -> None:
    model = model_of(tied=True)
    with quiet():
        model.save_pretrained(tmp_path / "base")
        model.model.save_pretrained(tmp_path / "bare base")
        noisy(model)
        model.save_pretrained(tmp_path / "tuned")
        model.model.save_pretrained(tmp_path / "bare tuned")
        assert "layers.0.self_attn.q_proj.weight" in tensors(tmp_path / "bare tuned")
        assert extract(tmp_path / "base", tmp_path / "bare tuned", tmp_path / "out", **FULL).passed
        assert extract(tmp_path / "bare base", tmp_path / "tuned", tmp_path / "bare out", **FULL).passed
        bases = (
            LlamaForCausalLM.from_pretrained(tmp_path / "base"),
            LlamaModel.from_pretrained(tmp_path / "bare base"),
        )
    answers_as(bases[0], tmp_path / "out", model)
    answers_as(bases[1], tmp_path / "bare out", model.model)
