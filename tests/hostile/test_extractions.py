"""Fine-tunes that are none of their base, and requests of an extraction that cannot be met.

All of it is refused with exit status 2 and one sentence before anything is written: what differs is found by
a first pass that compares, before any matrix is decomposed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.command import refusal
from tests.making import (
    PREFIX,
    Tensor,
    adapter_tensors,
    base_tensors,
    floats,
    linear_shapes,
    llama_config,
    safetensors_bytes,
    write_adapter,
    write_base,
    write_json,
)

EXTRACT = ("recipe=extract", "base_model=base", "finetune=tuned", "output=out")
UP = "model.layers.0.mlp.up_proj.weight"
Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"
BASE = base_tensors("F32")


def values(tensor: Tensor) -> np.ndarray:
    return np.frombuffer(tensor.data, np.float32).reshape(tensor.shape).copy()


def changed(*names: str, by: float = 0.01) -> dict[str, Tensor]:
    """The base with noise on the weights whose names have one of these in them."""
    random = np.random.default_rng(5)
    noise = {n: random.standard_normal(t.shape) for n, t in BASE.items() if any(part in n for part in names)}
    return {n: floats("F32", values(t) + by * noise[n]) if n in noise else t for n, t in BASE.items()}


def altered(name: str, value: float, tensors: Mapping[str, Tensor] = BASE) -> dict[str, Tensor]:
    """The same with one element set."""
    found = values(tensors[name])
    found.flat[7] = value
    return {**tensors, name: floats("F32", found)}


def without(name: str, tensors: Mapping[str, Tensor] = BASE) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if n != name}


MLP = changed("mlp")


def write(
    here: Path,
    tuned: Mapping[str, Tensor] = MLP,
    base: Mapping[str, Tensor] = BASE,
    **config: Any,
) -> None:
    """base, and tuned with changes in its config."""
    write_base(here / "base", base)
    write_base(here / "tuned", tuned, config=llama_config(**config))


# Another model


def test_identical_checkpoints_have_nothing_to_extract(tmp_path: Path) -> None:
    write(tmp_path, BASE)
    sentence = refusal(tmp_path, *EXTRACT)
    assert sentence == "finetune: is the same as the base in every weight; there is nothing to extract"


def test_a_base_given_as_its_own_fine_tune_has_nothing_to_extract(tmp_path: Path) -> None:
    write(tmp_path)
    arguments = ("recipe=extract", "base_model=tuned", "finetune=tuned", "output=out")
    assert "the same as the base in every weight" in refusal(tmp_path, *arguments)


def test_a_fine_tune_of_another_architecture_is_named(tmp_path: Path) -> None:
    write(tmp_path, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    sentence = refusal(tmp_path, *EXTRACT)
    assert sentence == "finetune: is a model of type 'qwen2', but the base is one of type 'llama'"


def test_a_fine_tune_of_another_width_is_refused_with_both_shapes(tmp_path: Path) -> None:
    write(tmp_path, base_tensors("F32", hidden=64), hidden_size=64, intermediate_size=96)
    assert refusal(tmp_path, *EXTRACT).startswith(
        "finetune: model.embed_tokens.weight is [64, 64], the base's [64, 32] (21 shapes differ)"
    )


@pytest.mark.parametrize(
    ("tuned", "base", "sentence"),
    [
        (3, 2, "finetune: has model.layers.2.self_attn.q_proj.weight, which the base lacks (9 weights"),
        (1, 2, "finetune: has no model.layers.1.self_attn.q_proj.weight, which the base has (9 weights"),
    ],
)
def test_a_fine_tune_of_another_depth_is_refused(
    tmp_path: Path, tuned: int, base: int, sentence: str
) -> None:
    write_base(tmp_path / "base", base_tensors("F32", layers=base), config=llama_config(base))
    write_base(tmp_path / "tuned", base_tensors("F32", layers=tuned), config=llama_config(tuned))
    assert refusal(tmp_path, *EXTRACT).startswith(sentence)


@pytest.mark.parametrize("name", [UP, NORM, "model.embed_tokens.weight"])
def test_a_weight_that_one_side_lacks_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, without(name, MLP))
    assert refusal(tmp_path, *EXTRACT) == f"finetune: has no {name}, which the base has"
    write(tmp_path, MLP, without(name))
    assert refusal(tmp_path, *EXTRACT) == f"finetune: has {name}, which the base lacks"


def test_a_weight_that_no_model_in_memory_has_is_not_passed_over(tmp_path: Path) -> None:
    write(
        tmp_path,
        {**MLP, "model.mtp.weight": BASE[UP]},
        {**BASE, "model.mtp.weight": MLP[UP]},
    )
    sentence = refusal(tmp_path, *EXTRACT, "rank=4", "extract.rest=refuse")
    assert sentence.startswith(
        "finetune: model.mtp.weight changed, but transformers' model has no such weight"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused_on_either_side(tmp_path: Path, value: float) -> None:
    write(tmp_path, altered(Q, value, MLP))
    assert refusal(tmp_path, *EXTRACT) == (
        f"finetune: {Q} holds values that are not finite; it cannot be compared"
    )
    write(tmp_path, MLP, altered(Q, value))
    assert refusal(tmp_path, *EXTRACT).startswith(f"base_model: {Q} holds values that are not finite")
    write(tmp_path, altered(Q, value, MLP), altered(Q, value))
    assert f"{Q} holds values that are not finite" in refusal(tmp_path, *EXTRACT)


# Folders


def test_an_adapter_given_as_fine_tune_or_base_points_to_its_key(here: Path) -> None:
    write(here)
    for arguments in (("finetune=adapter", "base_model=base"), ("finetune=tuned", "base_model=adapter")):
        sentence = refusal(here, "recipe=extract", *arguments, "output=out")
        assert sentence.endswith("adapter: holds an adapter, not a model; give it as adapter=")


@pytest.mark.parametrize("key", ["base_model", "finetune"])
def test_a_checkpoint_that_is_not_there_is_named_by_its_key(tmp_path: Path, key: str) -> None:
    write(tmp_path)
    sentence = refusal(tmp_path, *(a for a in EXTRACT if not a.startswith(key)), f"{key}=nowhere")
    assert sentence.startswith(f"{key}: 'nowhere' does not exist; give a folder, a GGUF file or a hub id")


@pytest.mark.parametrize("key", ["base_model", "finetune", "output"])
def test_a_key_that_is_not_set_is_named(tmp_path: Path, key: str) -> None:
    write(tmp_path)
    arguments = [argument for argument in EXTRACT if not argument.startswith(key)]
    assert refusal(tmp_path, *arguments).startswith(f"{key}: is not set; give ")


def test_a_fine_tune_and_an_adapter_are_one_too_many(here: Path) -> None:
    write(here)
    sentence = refusal(here, *EXTRACT, "adapter=adapter")
    assert sentence == "finetune: an adapter is given too; give one of them"


def test_an_output_that_exists_is_not_written_over(tmp_path: Path) -> None:
    write(tmp_path)
    sentence = refusal(tmp_path, *EXTRACT[:-1], "output=tuned")
    assert sentence.startswith("output: 'tuned' exists already")


def test_a_setting_of_merged_output_is_none_of_an_adapters(tmp_path: Path) -> None:
    write(tmp_path)
    sentence = refusal(tmp_path, *EXTRACT, "save.dtype=bfloat16")
    assert sentence == "save.dtype: no such key of the stage that is chosen here"


# Which modules


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            "targeted_modules=[q_prj]",
            "targeted_modules: 'q_prj' matches no module; did you mean q_proj",
        ),
        ("targeted_modules={filter: 'mlp, nothing'}", "targeted_modules: 'nothing' matches no module"),
        ("targeted_modules=['re:.*q_prj']", "targeted_modules: 're:.*q_prj' matches no module"),
        ("saved_modules=[nrm]", "saved_modules: 'nrm' matches no module; did you mean norm"),
        (
            "rank_pattern={q_prj: 8}",
            "rank_pattern: 'q_prj' matches no module with a matrix; did you mean q_proj",
        ),
        ("rank_pattern={norm: 8}", "rank_pattern: 'norm' matches no module with a matrix"),
        (
            "alpha_pattern={up_prj: 8}",
            "alpha_pattern: 'up_prj' matches no module with a matrix; did you mean up_proj",
        ),
        ("targeted_modules=['re:(']", "targeted_modules: 're:(' is not a regular expression"),
        ("targeted_modules={flter: mlp}", "targeted_modules: {'flter': 'mlp'} is not a list of module names"),
        ("targeted_modules=[]", "targeted_modules: [] is not a list of module names"),
        ("saved_modules=''", "saved_modules: [''] is not a list of module names"),
        ("rank_pattern=[8]", "rank_pattern: [8] is not a table; write {q_proj: 8}"),
        ("rank_pattern={up_proj: 2.5}", "rank_pattern: 'up_proj': 2.5 is not a module and a rank"),
        ("rank_pattern={up_proj: auto}", "rank_pattern: 'up_proj': 'auto' is not a module and a rank"),
        ("alpha_pattern={up_proj: 0}", "alpha_pattern: 'up_proj': 0 is not a module and a number"),
        (
            "targeted_modules=[self_attn]",
            "targeted_modules: none of what is meant changed; there is nothing to extract",
        ),
    ],
)
def test_names_and_patterns_that_mean_nothing_are_refused(
    tmp_path: Path, setting: str, sentence: str
) -> None:
    write(tmp_path)
    assert refusal(tmp_path, *EXTRACT, "rank=4", "extract.rest=skip", setting).startswith(sentence)


def test_a_change_that_nothing_means_is_named_with_how_much_it_is(tmp_path: Path) -> None:
    tuned = changed("mlp", "norm.weight", "embed_tokens", by=0.02)
    write(tmp_path, tuned)
    before, after = (values(t[NORM]) for t in (BASE, tuned))
    relative = np.linalg.norm(after - before) / np.linalg.norm(before)
    settings = ("targeted_modules=[mlp]", "saved_modules={filter: 'embed_tokens, input_layernorm'}")
    settings = (*settings, "extract.rest=refuse")
    tuned = {n: t for n, t in tuned.items() if "post_attention" not in n}
    write(tmp_path, {**tuned, **{n: t for n, t in BASE.items() if "post_attention" in n}})
    assert refusal(tmp_path, *EXTRACT, "rank=4", *settings) == (
        f"finetune: {NORM} changed by {relative:.2g} of its norm, but neither targeted_modules nor "
        "saved_modules means it; name it in one of them, or set extract.rest=save or skip"
    )


def test_modules_that_are_meant_twice_are_told_once(tmp_path: Path) -> None:
    write(tmp_path)
    settings = ("targeted_modules=[mlp]", "saved_modules=[layers]")
    assert refusal(tmp_path, *EXTRACT, "rank=4", *settings) == (
        "saved_modules: model.layers.0.mlp.gate_proj is meant by targeted_modules too (6 such modules); "
        "leave it in one"
    )


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_no_regular_expression_is_told(tmp_path: Path, key: str) -> None:
    write(tmp_path)
    (tmp_path / "mine.yaml").write_text(f"rank: 4\n{key}: {{'re:(': 8}}\nextract: {{rest: save}}\n")
    sentence = refusal(tmp_path, "recipe=./mine.yaml", *EXTRACT[1:])
    assert sentence.startswith(f"{key}: 're:(' is not a regular expression (")


def test_the_default_leaves_nothing_out(tmp_path: Path) -> None:
    write(tmp_path, changed("mlp", "norm.weight"))
    sentence = refusal(tmp_path, *EXTRACT[1:], "rank=4")  # extract=auto, extract.rest=refuse
    assert "changed by 0.0" in sentence
    assert "(5 such weights)" in sentence


def test_norms_alone_are_no_adapter(tmp_path: Path) -> None:
    write(tmp_path, changed("norm.weight"))
    sentence = refusal(tmp_path, *EXTRACT, "rank=4")
    assert sentence.startswith("targeted_modules: only model.layers.0.input_layernorm.weight and the like")


# Ranks


@pytest.mark.parametrize(
    "rank",
    [
        *("0", "-3", "1.5", "true", "many", "[4]", "nan", "'4'"),  # tests/ground/test_ranks.py has all
        *("{energy: 1}", "{energy: 0.9, size: 1MB}", "{parameters: 0}", "{size: lots}", "{share: 0.5}"),
    ],
)
def test_what_is_no_rank_is_refused_with_the_choices(tmp_path: Path, rank: str) -> None:
    write(tmp_path)
    sentence = refusal(tmp_path, *EXTRACT, f"rank={rank}")
    assert sentence.startswith(("rank: ", "rank.parameters: ", "rank.size: "))
    assert "write " in sentence


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("rank=null", "rank: is not set; give a number, auto, {energy: 0.95} or {parameters: 40M}"),
        ("rank=64", f"rank: 64 is more than {UP.replace('up', 'gate')} (48 x 32) has; give at most 32, or"),
        ("rank_pattern={up_proj: 64}", f"rank_pattern: 64 is more than {UP} (48 x 32) has; give at most 32"),
        ("rank={parameters: 79}", "rank: a budget of 79 leaves nothing for any module; give a larger one"),
        ("rank={size: 319}", "rank: a budget of 319 leaves nothing for any module; give a larger one"),
        ("max_rank=0", "max_rank: 0 is not a whole number of at least 1"),
        ("multiple_of=0", "multiple_of: 0 is not a whole number of at least 1"),
        (["max_rank=6", "multiple_of=4"], "max_rank: 6 is not a multiple_of 4"),
        ("multiple_of=1.5", "multiple_of: '1.5' is not a whole number"),
        ("alpha=0", "alpha: 0.0 is not a number above 0"),
        ("alpha=nan", "alpha: nan is not a number above 0"),
        ("alpha=much", "alpha: 'much' is not a number"),
        ("extract.rest=all", "extract.rest: 'all' is none of refuse, skip, save"),
        ("extract.method=power", "extract.method: 'power' is none of auto, gram, krylov, exact"),
        ("extract.factors=int8", "extract.factors: 'int8' is none of float64, float32, bfloat16, float16"),
        ("extract.ranks=4", "extract.ranks: no such key; did you mean extract.rest"),
        ("device=cuda:9", "device: cuda:9 is not there"),
    ],
)
def test_settings_that_cannot_be_met_are_refused_by_their_key(
    tmp_path: Path, setting: str | list[str], sentence: str
) -> None:
    write(tmp_path)
    settings = [setting] if isinstance(setting, str) else setting
    rank = ["rank=4"] if not any(s.startswith("rank=") for s in settings) else []
    assert refusal(tmp_path, *EXTRACT, *rank, *settings).startswith(sentence)


def test_a_budget_that_saved_modules_use_up_says_so(tmp_path: Path) -> None:
    write(tmp_path, changed("mlp", "embed_tokens"))
    sentence = refusal(tmp_path, *EXTRACT, "rank={parameters: 2100}", "saved_modules=[embed_tokens]")
    assert "after what is saved whole or has its rank by rank_pattern; give a larger one" in sentence


def test_noise_that_is_not_known_cannot_decide_a_rank(tmp_path: Path) -> None:
    scales = np.ones(1, np.float32)
    tuned = {n: t for n, t in MLP.items() if n != UP}
    codes = np.frombuffer(b"\x38" * (48 * 32), np.uint8)
    tuned[UP] = Tensor("F8_E4M3", (48, 32), codes.tobytes())
    tuned[UP.replace("weight", "weight_scale_inv")] = floats("F32", scales.reshape(1, 1))
    write_base(tmp_path / "base", BASE)
    config = llama_config(
        quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    )
    write_base(tmp_path / "tuned", tuned, config=config)
    sentence = refusal(tmp_path, *EXTRACT, "rank=auto")
    assert sentence.startswith(f"rank: auto needs the rounding noise of the fine-tune, but {UP} is stored as")
    assert "give a number or {energy: 0.95}" in sentence


# Adapters


def zeros(here: Path, suffixes: Collection[str]) -> None:
    """An adapter whose lora_B are zero: training never began."""
    held = adapter_tensors()
    none = {n: floats("F32", np.zeros(t.shape)) for n, t in held.items() if n.endswith(tuple(suffixes))}
    write_adapter(here / "adapter", {**held, **none})


def test_an_adapter_that_changes_nothing_has_nothing_to_shrink(here: Path) -> None:
    zeros(here, ["lora_B.weight"])
    sentence = refusal(here, "recipe=shrink", "base_model=base", "adapter=adapter", "output=out", "rank=2")
    assert sentence == "adapter: changes no weight; there is nothing to extract"


def test_an_adapter_with_values_that_are_no_numbers_is_not_shrunk(here: Path) -> None:
    path = here / "adapter/adapter_model.safetensors"
    held = adapter_tensors()
    name = next(iter(held))
    broken = values(held[name])
    broken.flat[3] = np.nan
    path.write_bytes(safetensors_bytes({**held, name: floats("F32", broken)}))
    sentence = refusal(here, "recipe=shrink", "base_model=base", "adapter=adapter", "output=out", "rank=2")
    assert sentence.startswith("adapter: model.layers.0.self_attn.q_proj.weight holds values that are not")


def test_a_kind_whose_change_depends_on_the_base_is_refused_with_the_way_out(here: Path) -> None:
    config = json.loads((here / "adapter/adapter_config.json").read_text())
    held = adapter_tensors()
    for module, shape in linear_shapes().items():
        if module.endswith(("q_proj", "v_proj")):
            held[f"{PREFIX}{module}.lora_magnitude_vector"] = floats("F32", np.ones(shape[0]))
    write_adapter(here / "adapter", held, {**config, "use_dora": True})
    write_json(here / "adapter/adapter_config.json", {**config, "use_dora": True})
    sentence = refusal(here, "recipe=shrink", "base_model=base", "adapter=adapter", "output=out", "rank=2")
    assert "whose change depends on the base and is no sum; merge it, and extract from the result" in sentence
