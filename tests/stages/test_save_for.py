"""save.for: an adapter that vLLM or llama.cpp takes, what it means there, and what had to stay behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.command import answer, refusal
from tests.models import LINEAR, tensors, write_llama, write_lora
from tests.stages.test_extract_svd import config_of, gpt2, llama, mixtral, tuned_pair
from tests.tolerance import FLOAT32_FORWARD

MENU = {1, 8, 16, 32, 64, 128, 256, 320, 512}
PREFIX = "base_model.model."


def extracted(folder: Path, engine: str, *more: str, rank: str = "6") -> str:
    """`recipe=extract` in the folder, as a user types it; what it says."""
    arguments = ("recipe=extract", "base_model=base", "finetune=tuned", "output=out", f"rank={rank}")
    said = answer(*arguments, f"save.for={engine}", "verify=structure", *more, cwd=folder)
    assert said.status == 0, said
    return said.out


def by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight of the base; it must take every key, and miss none."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    loaded = model.load_adapter(str(adapter), "default")
    assert not loaded.missing_keys
    assert not [key for key in loaded.unexpected_keys if ".modules_to_save." not in key]
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = model.merge_and_unload().state_dict()
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


def by_one_scale(adapter: Path) -> dict[str, torch.Tensor]:
    """vLLM's reading: B @ A by module, times lora_alpha / r (or its root) whatever the patterns say."""
    config = config_of(adapter)
    root = config["r"] ** 0.5 if config["use_rslora"] else config["r"]
    return pairs(adapter, lambda rank: config["lora_alpha"] / root)


def by_one_alpha(adapter: Path) -> dict[str, torch.Tensor]:
    """llama.cpp's: times lora_alpha / the rank that the pair has."""
    return pairs(adapter, lambda rank: config_of(adapter)["lora_alpha"] / rank)


def pairs(adapter: Path, scale: Callable[[int], float]) -> dict[str, torch.Tensor]:
    held, found = tensors(adapter), {}
    for key in held:
        if key.endswith(".lora_A.weight"):
            A, B = held[key], held[key.replace("lora_A", "lora_B")]
            found[key.removeprefix(PREFIX).replace("lora_A.", "")] = scale(A.shape[0]) * (B @ A)
        if key.endswith(".lora_embedding_A"):
            A, B = held[key], held[key.replace("_A", "_B")]
            found[key.removeprefix(PREFIX).replace("lora_embedding_A", "weight")] = (
                scale(A.shape[0]) * (B @ A).T
            )
    return found


def agree(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, delta in theirs.items():
        assert float((ours[name] - delta).abs().max()) < FLOAT32_FORWARD, name


def lost(folder: Path, *parts: str) -> float:
    """The share of the difference that lies in weights whose name has one of these in it."""
    before, after = tensors(folder / "base"), tensors(folder / "tuned")
    energies = {name: float((after[name] - before[name]).double().square().sum()) for name in before}
    return sum(e for name, e in energies.items() if any(p in name for p in parts)) / sum(energies.values())


def told(text: str, of: str) -> float:
    """The share that a finding names."""
    found = re.search(rf"{of}: .*, (\d+\.\d\d)% of the difference's energy", text)
    assert found, text
    return float(found[1]) / 100


SCALES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "alpha": ("alpha=5",),
    "several ranks": ("rank_pattern={k_proj: 3, up_proj: 17}", "alpha=5"),
    "several ranks, no alpha": ("rank_pattern={k_proj: 3, up_proj: 17}",),
}


ROOTED = {f"{name}, rsLoRA": ("extract.rslora=true", *more) for name, more in SCALES.items()}


@pytest.mark.parametrize("more", [*SCALES.values(), *ROOTED.values()], ids=[*SCALES, *ROOTED])
def test_vllm_reads_what_peft_reads(tmp_path: Path, more: tuple[str, ...]) -> None:
    base, _ = tuned_pair(tmp_path, lambda: llama(attention_bias=True))
    extracted(tmp_path, "vllm", *more)
    config, keys = config_of(tmp_path / "out"), tensors(tmp_path / "out")
    assert not config["modules_to_save"]
    assert not config["target_parameters"]
    assert (config["bias"], config["use_dora"], config["lora_bias"]) == ("none", False, False)
    assert all(re.fullmatch(r".*\.(lora_[AB]\.weight|lora_embedding_[AB])", key) for key in keys)
    assert max(t.shape[0] for key, t in keys.items() if "_A" in key) == config["r"]
    agree(by_one_scale(tmp_path / "out"), by_peft(base, tmp_path / "out"))


@pytest.mark.parametrize("more", SCALES.values(), ids=SCALES)
def test_llama_cpp_reads_what_peft_reads(tmp_path: Path, more: tuple[str, ...]) -> None:
    base, tuned = tuned_pair(tmp_path, lambda: llama(attention_bias=True))
    extracted(tmp_path, "llama.cpp", *more)
    keys = tensors(tmp_path / "out")
    whole = [key for key in keys if "lora_" not in key]
    assert all(("_layernorm" in key or ".norm" in key) and key.endswith(".weight") for key in whole)
    assert len(whole) == 5
    assert all(torch.equal(keys[key], tensors(tuned)[key.removeprefix(PREFIX)]) for key in whole)
    theirs = by_peft(base, tmp_path / "out")
    agree(by_one_alpha(tmp_path / "out"), {k: v for k, v in theirs.items() if "norm" not in k})


def test_what_stays_behind_is_told_with_its_cost(tmp_path: Path) -> None:
    tuned_pair(tmp_path, lambda: llama(attention_bias=True))
    for number, text in enumerate((extracted(tmp_path, "vllm"), (tmp_path / "out/README.md").read_text())):
        assert abs(told(text, "vLLM takes no modules saved whole") - lost(tmp_path, "norm")) < 1e-4, number
        assert abs(told(text, "vLLM takes no biases") - lost(tmp_path, "bias")) < 1e-4
        assert "rank 6 becomes 8, which vLLM allots for it anyway" in text
        assert "vLLM takes lm_head and model.embed_tokens of most models, not of all" in text
        assert "vLLM serves it with --enable-lora --max-lora-rank 8" in text
    (tmp_path / "out").rename(tmp_path / "first")
    text = extracted(tmp_path, "llama.cpp")
    assert abs(told(text, "llama.cpp takes no biases") - lost(tmp_path, "bias")) < 1e-4
    assert abs(told(text, "llama.cpp carries norms, but does not apply them") - lost(tmp_path, "norm")) < 1e-4
    assert "convert_lora_to_gguf.py, given the base by --base" in text


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_embeddings_that_are_shared_stay_behind(tmp_path: Path, engine: str) -> None:
    tuned_pair(tmp_path, lambda: llama(tie_word_embeddings=True))
    text = extracted(tmp_path, engine)
    assert abs(told(text, "takes no embeddings that lm_head shares") - lost(tmp_path, "embed_tokens")) < 1e-4
    assert not [key for key in tensors(tmp_path / "out") if "embed" in key or "lm_head" in key]


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_stacked_experts_stay_behind(tmp_path: Path, engine: str) -> None:
    base, _ = tuned_pair(tmp_path, mixtral)
    text = extracted(tmp_path, engine)
    share = lost(tmp_path, ".experts.")  # the router, too small for the rank, would be saved whole
    assert abs(told(text, "takes no stacked experts and other bare parameters") - share) < 1e-4
    assert config_of(tmp_path / "out")["target_parameters"] is None
    assert by_peft(base, tmp_path / "out")


def test_modules_that_adapters_hold_whole_stay_behind(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", torch.float32)
    write_lora(tmp_path / "lora", base, modules_to_save=["lm_head"], target_modules=LINEAR)
    adapter = tensors(tmp_path / "lora")
    key = f"{PREFIX}lm_head.weight"
    adapter[key] = adapter[key] + 0.1
    from safetensors.torch import save_file

    save_file(adapter, tmp_path / "lora/adapter_model.safetensors", {"format": "pt"})
    arguments = ("recipe=shrink", "base_model=base", "adapter=lora", "output=out", "rank=4", "save.for=vllm")
    said = answer(*arguments, "verify=structure", cwd=tmp_path)
    assert said.status == 0, said
    assert told(said.out, "vLLM takes no modules saved whole") > 0.1
    assert config_of(tmp_path / "out")["modules_to_save"] is None


RANKS = {
    ("20",): 32,
    ("20", "max_rank=24"): 20,
    ("32",): 32,
    ("{energy: 0.5}",): None,
    ("{parameters: 9000}", "max_rank=9"): None,
}


@pytest.mark.parametrize("asked", RANKS)
def test_ranks_fill_what_vllm_allots(tmp_path: Path, asked: tuple[str, ...]) -> None:
    tuned_pair(tmp_path, lambda: llama(num_key_value_heads=4), lambda name: "proj" in name)
    text = extracted(tmp_path, "vllm", *asked[1:], rank=asked[0])
    rank = config_of(tmp_path / "out")["r"]
    assert rank == RANKS[asked] or RANKS[asked] is None
    step = re.findall(r"--max-lora-rank (\d+)", text)[-1]
    assert int(step) == min(n for n in MENU if n >= rank)
    assert ("becomes" in text) is (asked == ("20",))


def test_a_plan_tells_it_too_and_reads_no_weight(tmp_path: Path) -> None:
    tuned_pair(tmp_path, lambda: llama(num_key_value_heads=4))
    arguments = ("recipe=extract", "base_model=base", "finetune=tuned", "output=out", "rank=20")
    said = answer(*arguments, "save.for=vllm", "dry_run=true", cwd=tmp_path)
    assert said.status == 0, said
    assert "left out, since vLLM takes no modules saved whole: model.layers.0.input_layernorm" in said.out
    assert "--max-lora-rank 32" in said.out


def test_a_recipe_may_say_it(tmp_path: Path) -> None:
    tuned_pair(tmp_path, llama)
    page = (
        "defaults: [extract]\nbase_model: base\nfinetune: tuned\noutput: out\nrank: 4\nsave:\n  for: vllm\n"
    )
    (tmp_path / "mine.yaml").write_text(page)
    said = answer("recipe=./mine.yaml", "verify=none", cwd=tmp_path)
    assert said.status == 0, said
    assert config_of(tmp_path / "out")["modules_to_save"] is None
    request = json.loads((tmp_path / "out/merge.json").read_text())["request"]
    assert request["save"] == {"for": "vllm"}
    assert "engine" not in request["extract"]


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "saved modules": (
        ("save.for=vllm", "saved_modules=norm"),
        "saved_modules: vLLM takes no module saved whole; leave them out, or serve a merged model",
    ),
    "saved embeddings": (
        ("save.for=llama.cpp", "saved_modules=embed_tokens"),
        "saved_modules: llama.cpp takes norms alone, not model.embed_tokens; leave it out",
    ),
    "rslora": (
        ("save.for=llama.cpp", "extract.rslora=true"),
        "extract.rslora: llama.cpp scales by alpha / rank; leave it out",
    ),
    "alpha pattern": (
        ("save.for=vllm", "alpha_pattern={mlp: 3}"),
        "alpha_pattern: vLLM reads one alpha for all modules; leave it out",
    ),
    "rank": (("save.for=vllm", "rank=1024"), "rank: 1024 is more than vLLM takes; give at most 512"),
    "rank of some": (
        ("save.for=vllm", "rank_pattern={mlp: 600}"),
        "rank: 600 is more than vLLM takes; give at most 512",
    ),
    "engine": (("save.for=vlm",), "save.for: 'vlm' is none of peft, vllm, llama.cpp"),
    "where it lives": (("extract.engine=vllm",), "extract.engine: no such key"),
    "merged": (("save.for=vllm", "save=merged"), "save.for: no such key"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    tuned_pair(tmp_path, llama)
    more, sentence = REFUSED[case]
    arguments = ("recipe=extract", "base_model=base", "finetune=tuned", "output=out", "rank=4")
    assert refusal(tmp_path, *arguments, *more).startswith(sentence)


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_what_no_adapter_can_carry_there_is_refused(tmp_path: Path, engine: str) -> None:
    arguments = ("recipe=extract", "base_model=base", "finetune=tuned", "output=out", "rank=4")
    tuned_pair(tmp_path / "gpt2", gpt2, lambda name: "mlp" in name)
    said = refusal(tmp_path / "gpt2", *arguments, f"save.for={engine}")
    assert said.endswith("takes nothing of what changed; serve a merged model")
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(100, mean_resizing=False)
    model.model.layers[0].mlp.up_proj.weight.data += 0.1
    model.save_pretrained(tmp_path / "tuned")
    said = refusal(tmp_path, *arguments, f"save.for={engine}")
    assert re.search(r"takes no new tokens from an adapter, but .* has 100 rows, the base's 96", said)


def test_help_tells_it_under_its_key(tmp_path: Path) -> None:
    listed: Any = answer("--help", cwd=tmp_path).out
    assert "    save.for                 what is to load it: peft, vllm or llama.cpp;" in listed
    assert "for_" not in listed
    assert "extract.engine" not in listed
