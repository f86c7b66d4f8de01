"""Adapters that are broken, of a kind this version does not merge, or made for another base: refused by name.

An adapter tensor or field that is skipped gives a model that talks nonsense, so nothing is skipped.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.command import ARGUMENTS, answer, refusal, refused
from tests.making import (
    PREFIX,
    Tensor,
    adapter_tensors,
    base_tensors,
    floats,
    linear_shapes,
    llama_config,
    lora_config,
    safetensors_bytes,
    shard_name,
    write_adapter,
    write_base,
    write_json,
    write_shards,
)

Q_PROJ = "model.layers.0.self_attn.q_proj"
UNPROVED = (*ARGUMENTS, "verify=none")


def adapter_refusal(here: Path, *, tensors: Any = None, **config: Any) -> str:
    """The sentence about an adapter with these tensors and changes to its config."""
    write_adapter(here / "adapter", tensors, lora_config(**config))
    return refusal(here, *UNPROVED)


def key(module: str, part: str) -> str:
    return f"{PREFIX}{module}.{part}"


def tensor(*shape: int) -> Tensor:
    return floats("F32", np.ones(shape))


# Folders


def test_a_folder_that_is_not_there_is_named(here: Path) -> None:
    sentence = refusal(here, "base_model=base", "adapter=nowhere", "output=out")
    assert sentence == "adapter: 'nowhere' does not exist; give a folder or a hub id org/name[@revision]"


def test_an_empty_folder_is_refused(here: Path) -> None:
    (here / "empty").mkdir()
    sentence = refusal(here, "base_model=base", "adapter=empty", "output=out")
    assert "empty' holds no adapter_config.json" in sentence


def test_a_folder_without_config_is_refused(here: Path) -> None:
    (here / "adapter" / "adapter_config.json").unlink()
    assert "adapter' holds no adapter_config.json" in refusal(here, *UNPROVED)


def test_a_folder_without_weights_is_refused(here: Path) -> None:
    (here / "adapter" / "adapter_model.safetensors").unlink()
    sentence = refusal(here, *UNPROVED)
    assert "adapter: holds adapter_config.json but not adapter_model.safetensors" in sentence


def test_a_pickled_adapter_is_never_read(here: Path) -> None:
    weights = here / "adapter" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    sentence = refusal(here, *UNPROVED)
    assert "adapter: holds adapter_model.bin, a pickle, which can run code" in sentence
    assert "save it again as adapter_model.safetensors" in sentence


def test_a_folder_of_training_checkpoints_lists_them(here: Path) -> None:
    for step in (500, 1000):
        write_adapter(here / "run" / f"checkpoint-{step}")
    sentence = refusal(here, "base_model=base", "adapter=run", "output=out")
    assert "is not an adapter but holds some: " in sentence
    assert "checkpoint-500" in sentence
    assert "checkpoint-1000" in sentence
    assert "give one of them" in sentence


def test_training_checkpoints_are_listed_in_the_order_of_their_steps(here: Path) -> None:
    for step in (500, 1000, 90):
        write_adapter(here / "run" / f"checkpoint-{step}")
    sentence = refusal(here, "base_model=base", "adapter=run", "output=out")
    assert "checkpoint-90, checkpoint-500, checkpoint-1000" in sentence


def test_a_full_model_given_as_adapter_points_to_finetune(here: Path) -> None:
    sentence = refusal(here, "base_model=base", "adapter=base", "output=out")
    assert "holds a full model, not an adapter; a fine-tuned model goes to finetune=" in sentence


def test_a_file_given_as_adapter_says_to_give_its_folder(here: Path) -> None:
    path = "adapter/adapter_model.safetensors"
    sentence = refusal(here, "base_model=base", f"adapter={path}", "output=out")
    assert f"{path}' is a file; give the folder that holds adapter_config.json and" in sentence


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[]", "is not a table of fields"),
        ("[" * 100_000, "is not JSON"),
        ('{"peft_type": "LORA", "r": 4, "r": 8, "lora_alpha": 8}', "twice"),
    ],
    ids=["cut", "empty", "list", "deep", "twice"],
)
def test_a_config_that_cannot_be_read_is_named(here: Path, text: str, part: str) -> None:
    (here / "adapter" / "adapter_config.json").write_text(text)
    sentence = refusal(here, *UNPROVED)
    assert "adapter_config.json: " in sentence
    assert part in sentence


def test_a_truncated_adapter_is_refused(here: Path) -> None:
    weights = here / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "adapter_model.safetensors: is truncated: 10 bytes are missing" in refusal(here, *UNPROVED)


def test_a_git_lfs_pointer_says_how_to_get_the_weights(here: Path) -> None:
    weights = here / "adapter" / "adapter_model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4680\n")
    assert "is a git-lfs pointer, not the weights; run `git lfs pull`" in refusal(here, *UNPROVED)


# Config fields


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("use_dora", True, "DoRA"),
        ("lora_bias", True, "biases in lora_B"),
        ("modules_to_save", ["lm_head"], "whole modules saved beside the LoRA"),
        ("trainable_token_indices", [1, 2], "trained token rows"),
        ("trainable_token_indices", {"embed_tokens": [1]}, "trained token rows"),
        ("target_parameters", ["mlp.experts.gate_up_proj"], "LoRA on bare parameters"),
        ("layer_replication", [[0, 2], [1, 2]], "replicated layers"),
        ("use_qalora", True, "QALoRA"),
        ("use_bdlora", {"target_modules_bd_a": ["q_proj"]}, "BD-LoRA"),
        ("alora_invocation_tokens", [1, 2], "aLoRA"),
        ("arrow_config", {"top_k": 2}, "Arrow routing"),
        ("kasa_config", {"beta": 1}, "KaSA"),
        ("corda_config", {"corda_method": "ipm"}, "CorDA"),
        ("loftq_config", {"loftq_bits": 4}, "LoftQ"),
        ("lora_ga_config", {"direction": "ArB2r"}, "LoRA-GA"),
        ("monteclora_config", {"n": 1}, "MonteCLoRA"),
        ("velora_config", {"n": 1}, "VeLoRA"),
        ("megatron_config", {"tp": 2}, "Megatron"),
    ],
)
def test_a_field_that_this_version_does_not_merge_is_named(
    here: Path, field: str, value: Any, part: str
) -> None:
    sentence = adapter_refusal(here, **{field: value})
    assert f"adapter_config.json: {field} is set, which means " in sentence
    assert part in sentence


@pytest.mark.parametrize("kind", ["LOHA", "IA3", "ADALORA", "OFT", "VERA", "PREFIX_TUNING", None, "lora"])
def test_another_kind_of_adapter_is_named(here: Path, kind: str | None) -> None:
    sentence = adapter_refusal(here, peft_type=kind)
    assert f"adapter_config.json: peft_type is {kind!r}; this version merges LORA" in sentence


@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_trained_biases_are_refused(here: Path, kind: str) -> None:
    assert f"adapter_config.json: bias is '{kind}'" in adapter_refusal(here, bias=kind)


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "something", 3, ["pissa"]]
)
def test_an_initialization_that_changed_the_base_is_refused(here: Path, init: Any) -> None:
    sentence = adapter_refusal(here, init_lora_weights=init)
    assert f"adapter_config.json: init_lora_weights is {init!r}, which changed the base" in sentence
    assert "path_initial_model_for_weight_conversion" in sentence


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", None])
def test_an_initialization_that_left_the_base_alone_is_taken(here: Path, init: Any) -> None:
    write_adapter(here / "adapter", config=lora_config(init_lora_weights=init))
    assert answer(*UNPROVED, "dry_run=true", cwd=here).status == 0


def test_fan_in_fan_out_is_refused(here: Path) -> None:
    assert "adapter_config.json: fan_in_fan_out is set (Conv1D" in adapter_refusal(here, fan_in_fan_out=True)


@pytest.mark.parametrize("value", [True, 1, 0.5, "yes", {"a": 1}, ["x"]])
def test_an_unknown_field_is_refused_if_it_says_anything(here: Path, value: Any) -> None:
    sentence = adapter_refusal(here, some_new_trick=value)
    assert f"field 'some_new_trick' ({value!r}) is not known and may change the result" in sentence


@pytest.mark.parametrize("value", [None, False, {}, [], ""])
def test_an_unknown_field_that_says_nothing_is_no_matter(here: Path, value: Any) -> None:
    write_adapter(here / "adapter", config=lora_config(some_new_trick=value))
    assert answer(*UNPROVED, "dry_run=true", cwd=here).status == 0


@pytest.mark.parametrize("rank", [0, -4, 4.0, "4", None, True, [4]])
def test_a_rank_that_is_none_is_refused(here: Path, rank: Any) -> None:
    assert f"adapter_config.json: r is {rank!r}, not a rank" in adapter_refusal(here, r=rank)


@pytest.mark.parametrize("alpha", ["8", None, True, [8]])
def test_an_alpha_that_is_no_number_is_refused(here: Path, alpha: Any) -> None:
    sentence = adapter_refusal(here, lora_alpha=alpha)
    assert f"adapter_config.json: lora_alpha is {alpha!r}, not a finite number" in sentence


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_an_alpha_that_is_not_finite_is_refused(here: Path, text: str) -> None:
    path = here / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', f'"lora_alpha": {text}'))
    assert "lora_alpha is " in refusal(here, *UNPROVED)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", "q_proj"),
        ("rank_pattern", {"q_proj": "four"}),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": None}),
        ("alpha_pattern", {"q_proj": "lots"}),
        ("alpha_pattern", {"q_proj": [1]}),
        ("rank_pattern", {"q_proj(": 4}),
        ("alpha_pattern", {"(": 4}),
    ],
)
def test_a_pattern_that_makes_no_sense_is_refused_by_name(here: Path, field: str, value: Any) -> None:
    write_adapter(here / "adapter", config=lora_config(**{field: value}))
    sentences = refused(here, *UNPROVED)
    assert any("adapter_config.json" in s and ("pattern" in s or "rank" in s) for s in sentences), sentences


@pytest.mark.parametrize("value", ["false", 3, [1]])
def test_a_switch_that_is_neither_on_nor_off_is_refused(here: Path, value: Any) -> None:
    assert "use_rslora" in adapter_refusal(here, use_rslora=value)


def test_every_fault_of_a_config_is_told_at_once(here: Path) -> None:
    write_adapter(here / "adapter", config=lora_config(use_dora=True, bias="all", r=0, new_trick=1))
    sentences = refused(here, *UNPROVED)
    assert len(sentences) == 4
    for part in ("use_dora", "bias", "r is 0", "new_trick"):
        assert any(part in sentence for sentence in sentences)


# Tensors


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (key(Q_PROJ, "lora_A.default.weight"), "is not a LoRA tensor as PEFT names it"),
        (key(Q_PROJ, "lora_A.other.weight"), "is not a LoRA tensor as PEFT names it"),
        (f"{Q_PROJ}.lora_A.weight", "is not a LoRA tensor as PEFT names it"),
        (f"base.{Q_PROJ}.lora_A.weight", "is not a LoRA tensor as PEFT names it"),
        (f"lora_unet_{Q_PROJ.replace('.', '_')}.lora_down.weight", "kohya's names"),
        (f"transformer.{Q_PROJ}.lora.down.weight", "is not a LoRA tensor as PEFT names it"),
        (key(Q_PROJ, "lora_A.bias"), "is not a LoRA tensor as PEFT names it"),
        (key(Q_PROJ, "lora_B.bias"), "biases in lora_B"),
        (key(Q_PROJ, "lora_C.weight"), "is not a LoRA tensor as PEFT names it"),
        (key(Q_PROJ, "lora_magnitude_vector"), "DoRA magnitudes"),
        (key(Q_PROJ, "lora_magnitude_vector.weight"), "DoRA magnitudes"),
        (key("model.embed_tokens", "lora_embedding_A"), "LoRA on an embedding"),
        (key("model.embed_tokens", "lora_embedding_B"), "LoRA on an embedding"),
        (key("model.embed_tokens", "base_layer.weight"), "saved or nested base weights"),
        (key("model.layers.0.mlp.experts.base_layer", "lora_A.weight"), "saved or nested base weights"),
        (key("model.embed_tokens", "token_adapter.trainable_tokens_delta"), "trained token rows"),
        (key("lm_head", "weight"), "is not a LoRA tensor as PEFT names it"),
        (key("lm_head", "modules_to_save.default.weight"), "is not a LoRA tensor as PEFT names it"),
        (key(Q_PROJ, "hada_w1_a"), "is not a LoRA tensor as PEFT names it"),
        (key(Q_PROJ, "alpha"), "is not a LoRA tensor as PEFT names it"),
        ("", "is not a LoRA tensor as PEFT names it"),
    ],
)
def test_a_tensor_that_is_not_understood_is_named(here: Path, name: str, part: str) -> None:
    sentence = adapter_refusal(here, tensors=adapter_tensors() | {name: tensor(4, 32)})
    assert "adapter_model.safetensors: " in sentence
    assert f"'{name}'" in sentence
    assert part in sentence


@pytest.mark.parametrize(("have", "lack"), [("A", "B"), ("B", "A")])
def test_half_a_pair_is_refused(here: Path, have: str, lack: str) -> None:
    tensors = adapter_tensors()
    del tensors[key(Q_PROJ, f"lora_{lack}.weight")]
    assert f"'{Q_PROJ}' has lora_{have} but no lora_{lack}" in adapter_refusal(here, tensors=tensors)


def test_a_file_without_lora_tensors_is_refused(here: Path) -> None:
    sentence = adapter_refusal(here, tensors={}, target_modules="all-linear")
    assert "adapter_model.safetensors: holds no LoRA tensors" in sentence


def test_a_rank_that_differs_from_the_configs_is_refused(here: Path) -> None:
    write_adapter(here / "adapter", adapter_tensors(["model.layers.0.self_attn.q_proj"], rank=6))
    write_json(here / "adapter" / "adapter_config.json", lora_config(target_modules=["q_proj"]))
    sentence = refusal(here, *UNPROVED)
    assert f"'{Q_PROJ}' has rank 6, but adapter_config.json says 4" in sentence


def test_factors_whose_ranks_differ_are_refused(here: Path) -> None:
    tensors = adapter_tensors() | {key(Q_PROJ, "lora_B.weight"): tensor(32, 5)}
    sentence = adapter_refusal(here, tensors=tensors)
    assert f"'{Q_PROJ}' has lora_A [4, 32] and lora_B [32, 5], whose ranks differ" in sentence


def test_a_convolutions_factors_are_refused(here: Path) -> None:
    pair = {key(Q_PROJ, "lora_A.weight"): tensor(4, 32, 3), key(Q_PROJ, "lora_B.weight"): tensor(32, 4, 1)}
    sentence = adapter_refusal(here, tensors=adapter_tensors() | pair)
    assert f"'{Q_PROJ}' has lora_A [4, 32, 3] and lora_B [32, 4, 1]; this version merges linear" in sentence


def test_quantized_factors_are_refused(here: Path) -> None:
    codes = Tensor("I8", (4, 32), bytes(128))
    sentence = adapter_refusal(here, tensors=adapter_tensors() | {key(Q_PROJ, "lora_A.weight"): codes})
    assert f"'{Q_PROJ}' has dtypes I8 and F32; LoRA tensors are F64, F32, F16 or BF16" in sentence


def test_a_listed_target_without_tensors_is_refused(here: Path) -> None:
    sentence = adapter_refusal(here, target_modules=["q_proj", "v_proj", "o_proj"])
    assert "has nothing for 'o_proj', which adapter_config.json lists in target_modules" in sentence


# Adapter and base


def test_an_adapter_made_for_other_shapes_is_refused(here: Path) -> None:
    write_adapter(here / "adapter", adapter_tensors(shapes=linear_shapes(hidden=64)))
    sentences = refused(here, *UNPROVED)
    wanted = f"adapter: '{Q_PROJ}' was made for a weight [64, 64], but {Q_PROJ}.weight is [32, 32]"
    assert wanted in sentences


def test_a_module_that_matches_no_weight_is_refused(here: Path) -> None:
    write_adapter(here / "adapter", adapter_tensors(shapes=linear_shapes(layers=3)))
    sentence = refusal(here, *UNPROVED)
    assert "adapter: no weight model.layers.2.self_attn.q_proj.weight in base" in sentence
    assert "did you mean model.layers." in sentence
    assert "2 of its modules match nothing" in sentence


def test_an_adapter_for_a_wrapped_model_needs_renames_and_says_how(here: Path) -> None:
    shapes = {name.replace("model.", "model.language_model.", 1): s for name, s in linear_shapes().items()}
    write_adapter(here / "adapter", adapter_tensors(shapes=shapes))
    sentence = refusal(here, *UNPROVED)
    assert "adapter: no weight model.language_model.layers.0.self_attn.q_proj.weight in base" in sentence
    assert "names={from: to} renames modules" in sentence
    (here / "mine.yaml").write_text("names: {model.language_model: model}")
    assert answer("recipe=./mine.yaml", *UNPROVED, cwd=here).status == 0
    assert changed_weights(here) == {
        f"{m}.weight" for m in linear_shapes() if m.endswith(("q_proj", "v_proj"))
    }


def test_the_remedy_of_a_rename_works_on_the_command_line_too(here: Path) -> None:
    shapes = {name.replace("model.", "inner.", 1): s for name, s in linear_shapes().items()}
    write_adapter(here / "adapter", adapter_tensors(shapes=shapes))
    assert answer("names={inner: model}", *UNPROVED, "dry_run=true", cwd=here).status == 0


def test_a_rename_that_renames_nothing_is_refused(here: Path) -> None:
    (here / "mine.yaml").write_text("names: {model.languge_model: model}")
    assert "model.languge_model" in refusal(here, "recipe=./mine.yaml", *UNPROVED)


def test_two_modules_on_one_weight_are_refused(here: Path) -> None:
    other = "model.layers.1.self_attn.q_proj"
    (here / "mine.yaml").write_text(f"names: {{{other}: {Q_PROJ}}}")
    sentence = refusal(here, "recipe=./mine.yaml", *UNPROVED)
    assert f"both '{Q_PROJ}' and '{other}' mean {Q_PROJ}.weight; check names=" in sentence


def lm_head_adapter(here: Path) -> None:
    shapes = {**linear_shapes(), "lm_head": (64, 32)}
    config = lora_config(target_modules=["q_proj", "lm_head"])
    write_adapter(here / "adapter", adapter_tensors([Q_PROJ, "lm_head"], shapes=shapes), config)


@pytest.mark.parametrize("tie", [{"tie_word_embeddings": True}, {}])
def test_a_tied_lm_head_is_not_merged_in_silence(here: Path, tie: dict[str, bool]) -> None:
    config = {k: v for k, v in llama_config().items() if k != "tie_word_embeddings"}
    write_base(here / "base", base_tensors(tied=True), config={**config, **tie})
    lm_head_adapter(here)
    sentence = refusal(here, *UNPROVED)
    assert sentence.startswith("adapter: changes lm_head, but the base shares lm_head with its embeddings")
    assert "tie_word_embeddings" in sentence


def test_a_tied_lm_head_that_is_stored_all_the_same_is_not_merged_in_silence(here: Path) -> None:
    write_base(here / "base", config=llama_config(tie_word_embeddings=True))
    lm_head_adapter(here)
    sentence = refusal(here, *UNPROVED)
    assert sentence.startswith("adapter: changes lm_head, which the base's config ties to its embeddings")


def test_an_untied_lm_head_is_merged(here: Path) -> None:
    lm_head_adapter(here)
    assert answer(*UNPROVED, cwd=here).status == 0
    assert changed_weights(here) == {f"{Q_PROJ}.weight", "lm_head.weight"}


@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt", "imagegpt"])
def test_conv1d_models_are_refused(here: Path, kind: str) -> None:
    # q_proj is square here: only the model type tells that the weight lies transposed.
    write_base(here / "base", config=llama_config(model_type=kind))
    sentence = refusal(here, *UNPROVED)
    assert sentence.startswith(f"base_model: is a {kind}, whose Conv1D weights lie transposed")


def test_a_base_stored_in_codes_is_not_merged_as_numbers(here: Path) -> None:
    codes = Tensor("I8", (32, 32), bytes(1024))
    write_base(here / "base", base_tensors() | {f"{Q_PROJ}.weight": codes})
    sentence = refusal(here, *UNPROVED)
    assert f"adapter: '{Q_PROJ}' means {Q_PROJ}.weight, which is stored as I8" in sentence


# What must not be refused


def changed_weights(here: Path) -> set[str]:
    before, after = tensors_by_bytes(here / "base"), tensors_by_bytes(here / "out")
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def tensors_by_bytes(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes, cut from the file by hand."""
    whole = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    table = json.loads(whole[8:start])
    table.pop("__metadata__", None)
    return {n: whole[start + e["data_offsets"][0] : start + e["data_offsets"][1]] for n, e in table.items()}


def zero_base(here: Path) -> None:
    tensors = {n: floats("F32", np.zeros(t.shape)) for n, t in base_tensors().items()}
    write_base(here / "base", tensors)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 8 / 4),
        ({"use_rslora": True}, 8 / 2),
        ({"lora_alpha": 3}, 3 / 4),
        ({"lora_alpha": -8}, -8 / 4),
        ({"alpha_pattern": {"q_proj": 16}}, 16 / 4),
        ({"alpha_pattern": {"v_proj": 16}}, 8 / 4),
        ({"alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "q_proj": 16}}, 2 / 4),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 2}}, 2 / 4),
        ({"alpha_pattern": {"proj": 2}}, 8 / 4),
        ({"r": 99, "rank_pattern": {"q_proj": 4, "v_proj": 4}, "use_rslora": True}, 8 / 2),
    ],
)
def test_scales_and_patterns_are_applied_as_peft_has_them(
    here: Path, config: dict[str, Any], scale: float
) -> None:
    check_delta(here, "F32", config, scale)


@pytest.mark.parametrize("dtype", ["F64", "F16", "BF16"])
def test_every_float_dtype_is_taken(here: Path, dtype: str) -> None:
    check_delta(here, dtype, {}, 2)


def check_delta(here: Path, dtype: str, config: dict[str, Any], scale: float) -> None:
    zero_base(here)
    ones = {  # exact in every dtype: 4 x 0.5 x 0.25
        name: floats(dtype, np.full(t.shape, 0.5 if "lora_A" in name else 0.25))
        for name, t in adapter_tensors().items()
    }
    write_adapter(here / "adapter", ones, lora_config(**config))
    assert answer(*UNPROVED, cwd=here).status == 0
    delta = load_file(here / "out" / "model.safetensors")[f"{Q_PROJ}.weight"]
    assert np.array_equal(delta, np.full((32, 32), 4 * 0.5 * 0.25 * scale, np.float32))


def test_an_adapter_of_several_ranks_is_taken_as_its_patterns_say(here: Path) -> None:
    zero_base(here)
    mixed = {
        **adapter_tensors([Q_PROJ], rank=4),
        **adapter_tensors([Q_PROJ.replace("q_proj", "v_proj")], rank=2),
    }
    write_adapter(here / "adapter", mixed, lora_config(rank_pattern={"v_proj": 2}))
    assert answer(*UNPROVED, cwd=here).status == 0


def test_tokenizer_files_of_an_adapter_come_as_one_set(here: Path) -> None:
    for folder, text in (("base", "base"), ("adapter", "adapter")):
        (here / folder / "tokenizer.json").write_text(f'{{"from": "{text}"}}')
        (here / folder / "tokenizer_config.json").write_text(f'{{"from": "{text}"}}')
    (here / "base" / "added_tokens.json").write_text("{}")
    (here / "base" / "LICENSE").write_text("licence")
    assert answer(*UNPROVED, cwd=here).status == 0
    assert "adapter" in (here / "out" / "tokenizer.json").read_text()
    assert "adapter" in (here / "out" / "tokenizer_config.json").read_text()
    assert not (here / "out" / "added_tokens.json").exists()
    assert (here / "out" / "LICENSE").read_text() == "licence"
    assert not (here / "out" / "adapter_config.json").exists()


def test_sharded_and_single_bases_take_the_same_adapter(here: Path) -> None:
    assert answer(*UNPROVED, cwd=here).status == 0
    one = tensors_by_bytes(here / "out")
    (here / "base" / "model.safetensors").unlink()
    write_shards(here / "base", base_tensors(), 3)
    assert answer("base_model=base", "adapter=adapter", "output=out3", "verify=none", cwd=here).status == 0
    several: dict[str, bytes] = {}
    for number in (1, 2, 3):
        part = here / "part"
        part.mkdir(exist_ok=True)
        (part / "model.safetensors").write_bytes((here / "out3" / shard_name(number, 3)).read_bytes())
        several |= tensors_by_bytes(part)
    assert one == several


def test_an_adapter_in_shards_is_refused_by_name(here: Path) -> None:
    weights = here / "adapter" / "adapter_model.safetensors"
    weights.unlink()
    (here / "adapter" / "adapter_model-00001-of-00002.safetensors").write_bytes(
        safetensors_bytes(adapter_tensors())
    )
    assert "adapter_model.safetensors" in refusal(here, *UNPROVED)
