"""Adapters that are broken, of a kind this version does not merge, or made for another base: refused by name.

An adapter tensor or field that is skipped gives a model that talks nonsense, so nothing is skipped.
"""

import json
import re
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
EMBED = "model.embed_tokens"
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
        (
            "layer_replication",
            [[0, 2], [1, 2]],
            "replicated layers, onto which PEFT itself merges deltas that",
        ),
        ("use_qalora", True, "QALoRA"),
        ("alora_invocation_tokens", [1, 2], "aLoRA, which is active on some tokens only"),
        ("arrow_config", {"top_k": 2}, "Arrow, which routes tokens between adapters"),
        ("kasa_config", {"beta": 1}, "KaSA, which truncates the base"),
        ("corda_config", {"corda_method": "ipm"}, "CorDA, which changed the base"),
        ("loftq_config", {"loftq_bits": 4}, "LoftQ, which changed the base"),
        ("lora_ga_config", {"direction": "ArB2r"}, "LoRA-GA, which changed the base"),
        ("megatron_config", {"tp": 2}, "Megatron's parallel layers"),
    ],
)
def test_a_variant_that_is_no_sum_of_weights_is_named(here: Path, field: str, value: Any, part: str) -> None:
    sentence = adapter_refusal(here, **{field: value})
    assert f"adapter_config.json: {field} is set, which means " in sentence
    assert part in sentence
    assert sentence.endswith("; it cannot be merged")


@pytest.mark.parametrize(
    ("field", "value", "lacks"),
    [
        ("modules_to_save", ["lm_head"], "'lm_head', which adapter_config.json lists in modules_to_save"),
        ("trainable_token_indices", [1, 2], "'embeddings', which adapter_config.json lists in trainable_"),
        ("trainable_token_indices", {"embed_tokens": [1]}, "'embed_tokens', which adapter_config.json lists"),
        (
            "target_modules",
            ["q_proj", "v_proj", "o_proj"],
            "'o_proj', which adapter_config.json lists in tar",
        ),
        ("target_modules", "all-linear", "'model.layers.0.mlp.down_proj' and 9 more modules"),
        (
            "target_modules",
            r"model\.layers\..*\.[qkv]_proj",
            "'model.layers.0.self_attn.k_proj' and 1 more mod",
        ),
    ],
)
def test_what_the_config_promises_and_the_file_lacks_is_named_and_counted(
    here: Path, field: str, value: Any, lacks: str
) -> None:
    write_adapter(here / "adapter", config=lora_config(**{field: value}))
    nothing, lacking = refused(here, *UNPROVED)
    assert nothing.startswith(f"adapter: adapter has nothing for {lacks}")
    assert re.search(r"adapter holds [\d,]+ of [\d,]+ trained parameters; it lacks ", lacking)


@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
def test_every_layer_that_lacks_a_magnitude_or_a_bias_is_named(here: Path, field: str) -> None:
    write_adapter(here / "adapter", config=lora_config(**{field: True}))
    sentences = refused(here, *UNPROVED)
    lacks = {"use_dora": "magnitude", "lora_bias": "lora_B.bias"}[field]
    layers = [m for m in linear_shapes() if m.endswith(("q_proj", "v_proj"))]
    assert [s.split("adapter_model.safetensors: ")[1] for s in sentences] == [
        f"'{module}' has no {lacks}, but the config's {field} is True" for module in layers
    ]


@pytest.mark.parametrize(("bias", "lacks"), [("all", 48), ("lora_only", 32)])
def test_trained_biases_that_the_file_lacks_are_counted(here: Path, bias: str, lacks: int) -> None:
    biases = {f"{Q_PROJ}.bias": tensor(32), f"{Q_PROJ.replace('q_', 'k_')}.bias": tensor(16)}
    write_base(here / "base", base_tensors() | biases)
    sentence = adapter_refusal(here, bias=bias)
    assert sentence.endswith(f"{896 + lacks} trained parameters; it lacks {lacks} of {lacks} biases")


@pytest.mark.parametrize(
    ("bias", "keys"),
    [
        ("all", ["base_layer.bias"]),
        ("lora_only", ["base_layer.bias"]),
        ("none", ["lora_B.bias"]),
    ],
)
def test_a_bias_for_a_layer_without_one_is_refused(here: Path, bias: str, keys: list[str]) -> None:
    biases = {key(Q_PROJ, name): tensor(32) for name in keys}
    tensors = adapter_tensors([Q_PROJ]) | biases
    config = {"bias": bias, "lora_bias": bias == "none", "target_modules": ["layers.0.self_attn.q_proj"]}
    sentence = adapter_refusal(here, tensors=tensors, **config)
    wanted = f"adapter: '{Q_PROJ}' has a bias, but the base has none beside {Q_PROJ}.weight"
    assert sentence == wanted


@pytest.mark.parametrize("kind", ["UNHEARD_OF", None, "lora", 3, ["LORA"]])
def test_a_kind_that_nobody_knows_is_told_what_there_is(here: Path, kind: Any) -> None:
    sentence = adapter_refusal(here, peft_type=kind)
    assert f"adapter_config.json: peft_type is {kind!r}; this version merges LORA, " in sentence


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("PROMPT_TUNING", "it puts trained tokens before the prompt and changes no weight"),
        ("P_TUNING", "it puts trained tokens before the prompt and changes no weight"),
        ("PREFIX_TUNING", "it puts trained tokens before the prompt and changes no weight"),
        ("MULTITASK_PROMPT_TUNING", "it puts trained tokens before the prompt and changes no weight"),
        ("CPT", "it puts trained tokens before the prompt and changes no weight"),
        ("ADAPTION_PROMPT", "it puts trained tokens before the prompt and changes no weight"),
        ("XLORA", "it mixes adapters by the input"),
        ("POLY", "it mixes adapters by the input"),
    ],
)
def test_a_kind_that_is_no_change_of_weights_is_refused_with_the_reason(
    here: Path, kind: str, why: str
) -> None:
    sentence = adapter_refusal(here, peft_type=kind)
    assert sentence.endswith(f"peft_type is {kind}: {why}; it cannot be merged into weights")


@pytest.mark.parametrize("bias", ["some", 3, True, ["all"]])
def test_a_bias_that_is_no_mode_of_peft_is_refused(here: Path, bias: Any) -> None:
    assert f"bias is {bias!r}, not none, all or lora_only" in adapter_refusal(here, bias=bias)


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "something", 3, ["pissa"]]
)
def test_an_initialization_that_changed_the_base_is_refused(here: Path, init: Any) -> None:
    sentence = adapter_refusal(here, init_lora_weights=init)
    assert f"adapter_config.json: init_lora_weights is {str(init)!r}, which changed the base" in sentence
    assert "path_initial_model_for_weight_conversion" in sentence
    assert "extract.residual_base=true" in sentence
    first_helps = str(init).startswith(("pissa", "olora"))
    assert ("extract.initial takes the adapter as it was before training" in sentence) == first_helps


@pytest.mark.parametrize("init", ["loftq", "corda", "lora_ga"])
def test_the_adapter_before_training_does_not_help_where_more_was_taken_from_the_base(
    here: Path, init: str
) -> None:
    write_adapter(here / "adapter", config=lora_config(init_lora_weights=init))
    write_adapter(here / "first", config=lora_config(init_lora_weights=init))
    assert f"init_lora_weights is '{init}'" in refusal(here, *UNPROVED, "extract.initial=first")


@pytest.mark.parametrize(
    ("field", "value"),
    [("r", 2), ("lora_alpha", 3), ("rank_pattern", {"q_proj": 2}), ("alpha_pattern", {"q_proj": 2}),
     ("use_rslora", True)],
)  # fmt: skip
def test_a_first_adapter_with_another_scale_is_refused(here: Path, field: str, value: Any) -> None:
    write_adapter(here / "adapter", config=lora_config(init_lora_weights="pissa"))
    ranks = {"r": [2, 2], "rank_pattern": [2, 4]}.get(field, [4, 4])
    q, v = ([m for m in linear_shapes() if m.endswith(x)] for x in ("q_proj", "v_proj"))
    tensors = adapter_tensors(q, rank=ranks[0]) | adapter_tensors(v, rank=ranks[1])
    write_adapter(here / "first", tensors, lora_config(init_lora_weights="pissa", **{field: value}))
    sentence = refusal(here, *UNPROVED, "extract.initial=first")
    assert sentence.startswith("extract.initial: '")
    assert sentence.endswith(f"' differs from the adapter in {field}")


def test_a_first_adapter_that_holds_more_than_lora_is_refused(here: Path) -> None:
    write_adapter(here / "adapter", config=lora_config(init_lora_weights="pissa"))
    saved = adapter_tensors() | {key("lm_head", "weight"): tensor(64, 32)}
    config = lora_config(init_lora_weights="pissa", modules_to_save=["lm_head"])
    write_adapter(here / "first", saved, config)
    sentence = refusal(here, *UNPROVED, "extract.initial=first")
    assert sentence.endswith("holds more than LoRA, which cannot be converted")


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", None])
def test_an_initialization_that_left_the_base_alone_is_taken(here: Path, init: Any) -> None:
    write_adapter(here / "adapter", config=lora_config(init_lora_weights=init))
    assert answer(*UNPROVED, "dry_run=true", cwd=here).status == 0


def test_fan_in_fan_out_says_nothing_that_the_shapes_and_the_model_do_not(here: Path) -> None:
    """PEFT writes the flag as the last layer needed it, whatever the others are."""
    assert answer("base_model=base", "adapter=adapter", "output=plain", "verify=none", cwd=here).status == 0
    write_adapter(here / "adapter", config=lora_config(fan_in_fan_out=True))
    assert answer(*UNPROVED, cwd=here).status == 0
    assert tensors_by_bytes(here / "plain") == tensors_by_bytes(here / "out")


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
    write_adapter(here / "adapter", config=lora_config(use_qalora=True, bias="some", r=0, new_trick=1))
    sentences = refused(here, *UNPROVED)
    assert len(sentences) == 4
    for part in ("use_qalora", "bias", "r is 0", "new_trick"):
        assert any(part in sentence for sentence in sentences)


# Tensors


NOT_PEFT = "is not a tensor as PEFT names it"
NO_TENSOR = "is no tensor of LORA, and adapter_config.json does not account for it"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (key(Q_PROJ, "lora_A.other.weight"), NO_TENSOR),
        (key(Q_PROJ, "lora_A.bias"), NO_TENSOR),
        (key(Q_PROJ, "lora_C.weight"), NO_TENSOR),
        (key(Q_PROJ, "lora_diag"), NO_TENSOR),
        (key(Q_PROJ, "base_layer.bias"), NO_TENSOR),
        (key(Q_PROJ, "hada_w1_a"), NO_TENSOR),
        (key(Q_PROJ, "alpha"), NO_TENSOR),
        (key("lm_head", "modules_to_save.default.weight"), NO_TENSOR),
        (key("model.norm", "weight"), NO_TENSOR),
        (f"{Q_PROJ}.lora_A.weight", NOT_PEFT),
        (f"base.{Q_PROJ}.lora_A.weight", NOT_PEFT),
        (f"lora_unet_{Q_PROJ.replace('.', '_')}.lora_down.weight", f"{NOT_PEFT} (kohya's names)"),
        (f"lora_unet_{Q_PROJ.replace('.', '_')}.lora_up.weight", f"{NOT_PEFT} (kohya's names)"),
        (f"unet.{Q_PROJ}.processor.to_q_lora.down.weight", f"{NOT_PEFT} (diffusers' names)"),
        (f"transformer.{Q_PROJ}.lora.down.weight", NOT_PEFT),
        ("", NOT_PEFT),
    ],
)
def test_a_tensor_that_is_not_understood_is_named(here: Path, name: str, part: str) -> None:
    sentence = adapter_refusal(here, tensors=adapter_tensors() | {name: tensor(4, 32)})
    assert sentence.endswith(f"adapter_model.safetensors: '{name}' {part}")


@pytest.mark.parametrize(
    ("module", "suffix", "shape", "part"),
    [
        (Q_PROJ, "lora_B.bias", (32,), "has a lora_B.bias, but the config's lora_bias is False"),
        (Q_PROJ, "lora_magnitude_vector", (32,), "has a magnitude, but the config's use_dora is False"),
        (EMBED, "lora_embedding_A", (4, 64), "has lora_embedding_A but no lora_embedding_B"),
        (EMBED, "lora_embedding_B", (32, 4), "has lora_embedding_B but no lora_embedding_A"),
        (EMBED, "token_adapter.trainable_tokens_delta", (4, 32), "has trained token rows that trainable_"),
        ("mlp.experts.base_layer", "lora_A.weight", (4, 32), "has lora_A.weight but no lora_B.weight"),
        (f"{PREFIX}{Q_PROJ}", "lora_A.weight", (4, 32), "has lora_A.weight but no lora_B.weight"),
    ],
)
def test_a_tensor_that_says_other_than_the_config_is_named(
    here: Path, module: str, suffix: str, shape: tuple[int, ...], part: str
) -> None:
    sentence = adapter_refusal(here, tensors=adapter_tensors() | {key(module, suffix): tensor(*shape)})
    assert f"adapter_model.safetensors: '{module}' {part}" in sentence


def test_keys_with_pefts_default_name_are_taken_and_told(here: Path) -> None:
    assert answer("base_model=base", "adapter=adapter", "output=plain", "verify=none", cwd=here).status == 0
    named = {name.replace(".weight", ".default.weight"): t for name, t in adapter_tensors().items()}
    write_adapter(here / "adapter", named)
    said = answer(*UNPROVED, cwd=here)
    assert said.status == 0
    assert "8 of the adapter's keys are not quite as PEFT writes them" in said.out
    assert tensors_by_bytes(here / "plain") == tensors_by_bytes(here / "out")


def test_a_magnitude_with_the_suffix_of_memory_is_taken_and_told(here: Path) -> None:
    layers = [m for m in linear_shapes() if m.endswith(("q_proj", "v_proj"))]
    for number, suffix in enumerate(("", ".weight", ".default.weight")):
        magnitudes = {key(m, f"lora_magnitude_vector{suffix}"): tensor(linear_shapes()[m][0]) for m in layers}
        write_adapter(here / "adapter", adapter_tensors() | magnitudes, lora_config(use_dora=True))
        arguments = ("base_model=base", "adapter=adapter", f"output=out{number}", "verify=none")
        said = answer(*arguments, cwd=here)
        assert said.status == 0, said
        assert ("4 of the adapter's keys are not quite as PEFT writes them" in said.out) == bool(suffix)
    plain, *others = (tensors_by_bytes(here / f"out{number}") for number in range(3))
    assert all(other == plain for other in others)


def test_a_fault_of_every_module_is_told_once(here: Path) -> None:
    """A wrong rank in the config is wrong for all modules: one sentence, which says how many there are."""
    layers = list(linear_shapes())
    tensors = {key(m, f"lora_{x}.weight"): tensor(*s) for m in layers for x, s in factors(m).items()}
    sentence = adapter_refusal(here, tensors=tensors, r=9)
    assert sentence.endswith(f"has rank 4, but the config says 9 ({len(layers)} of this kind)")


def factors(module: str) -> dict[str, tuple[int, int]]:
    rows, columns = linear_shapes()[module]
    return {"A": (4, columns), "B": (rows, 4)}


def test_one_tensor_under_two_names_is_refused(here: Path) -> None:
    twice = adapter_tensors() | {key(Q_PROJ, "lora_A.default.weight"): tensor(4, 32)}
    sentence = adapter_refusal(here, tensors=twice)
    one, other = key(Q_PROJ, "lora_A.weight"), key(Q_PROJ, "lora_A.default.weight")
    assert f"both '{one}' and '{other}' mean {one}" in sentence


@pytest.mark.parametrize(("have", "lack"), [("A", "B"), ("B", "A")])
def test_half_a_pair_is_refused(here: Path, have: str, lack: str) -> None:
    tensors = adapter_tensors()
    del tensors[key(Q_PROJ, f"lora_{lack}.weight")]
    wanted = f"'{Q_PROJ}' has lora_{have}.weight but no lora_{lack}.weight"
    assert wanted in adapter_refusal(here, tensors=tensors)


def test_a_file_without_lora_tensors_is_refused(here: Path) -> None:
    sentence = adapter_refusal(here, tensors={}, target_modules="all-linear")
    assert "adapter_model.safetensors: holds no tensors of LORA" in sentence


def test_a_rank_that_differs_from_the_configs_is_refused(here: Path) -> None:
    write_adapter(here / "adapter", adapter_tensors([Q_PROJ], rank=6))
    write_json(here / "adapter" / "adapter_config.json", lora_config(target_modules=["q_proj"]))
    assert f"'{Q_PROJ}' has rank 6, but the config says 4" in refusal(here, *UNPROVED)


def test_factors_whose_ranks_differ_are_refused(here: Path) -> None:
    tensors = adapter_tensors() | {key(Q_PROJ, "lora_B.weight"): tensor(32, 5)}
    sentence = adapter_refusal(here, tensors=tensors)
    assert f"'{Q_PROJ}' has lora_A [4, 32] and lora_B [32, 5], whose ranks differ" in sentence


def test_a_convolutions_factors_do_not_fit_a_linear_layer(here: Path) -> None:
    pair = {key(Q_PROJ, "lora_A.weight"): tensor(4, 32, 3), key(Q_PROJ, "lora_B.weight"): tensor(32, 4, 1)}
    sentence = adapter_refusal(here, tensors=adapter_tensors() | pair)
    wanted = f"'{Q_PROJ}' was made for a weight [32, 32, 3], but {Q_PROJ}.weight is [32, 32]"
    assert sentence == f"adapter: {wanted}"


def test_lora_on_a_grouped_convolution_is_refused_as_peft_refuses_it(here: Path) -> None:
    """Its lora_B is grouped too: (out, rank / groups), as PEFT 0.21.2 writes it."""
    pair = {key(Q_PROJ, "lora_A.weight"): tensor(4, 32, 3), key(Q_PROJ, "lora_B.weight"): tensor(32, 2, 1)}
    sentence = adapter_refusal(here, tensors=adapter_tensors() | pair)
    assert f"'{Q_PROJ}' is LoRA on a convolution of 2 groups" in sentence


def test_quantized_factors_are_refused(here: Path) -> None:
    codes = Tensor("I8", (4, 32), bytes(128))
    sentence = adapter_refusal(here, tensors=adapter_tensors() | {key(Q_PROJ, "lora_A.weight"): codes})
    assert f"'{Q_PROJ}' holds I8 values; an adapter's are F64, F32, F16 or BF16" in sentence


O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("config", "module"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, O_PROJ),
        ({"target_modules": r".*\.[qv]_proj"}, O_PROJ),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"], "exclude_modules": ["o_proj"]}, O_PROJ),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"], "layers_to_transform": [1]}, Q_PROJ),
    ],
)
def test_lora_that_peft_would_pass_over_is_refused(here: Path, config: dict[str, Any], module: str) -> None:
    tensors = adapter_tensors() | adapter_tensors([O_PROJ])
    sentence = adapter_refusal(here, tensors=tensors, **config)
    assert f"'{module}' has LoRA, but adapter_config.json targets no such module, so PEFT passes" in sentence


# Adapter and base


def test_an_adapter_made_for_other_shapes_is_refused(here: Path) -> None:
    write_adapter(here / "adapter", adapter_tensors(shapes=linear_shapes(hidden=64)))
    sentences = refused(here, *UNPROVED)
    wanted = f"adapter: '{Q_PROJ}' was made for a weight [64, 64], but {Q_PROJ}.weight is [32, 32]"
    assert wanted in sentences


def test_an_adapter_of_a_model_of_another_size_is_told_once(here: Path) -> None:
    shapes = linear_shapes(hidden=64)
    leaves = sorted({module.rpartition(".")[2] for module in shapes})
    write_adapter(
        here / "adapter", adapter_tensors(shapes, shapes=shapes), lora_config(target_modules=leaves)
    )
    sentence = refusal(here, *UNPROVED)
    assert f"{Q_PROJ}' was made for a weight [64, 64], but {Q_PROJ}.weight is [32, 32]" in sentence
    assert sentence.endswith(f" ({len(shapes)} of this kind)")


def test_a_module_that_matches_no_weight_is_refused(here: Path) -> None:
    write_adapter(here / "adapter", adapter_tensors(shapes=linear_shapes(layers=3)))
    sentence = refusal(here, *UNPROVED)
    assert "adapter: no weight model.layers.2.self_attn.q_proj.weight in base" in sentence
    assert "did you mean model.layers." in sentence
    assert "2 of its modules match nothing" in sentence


def test_an_adapter_for_a_model_in_another_needs_renames_and_says_how(here: Path) -> None:
    shapes = {name.replace("model.", "inner.model.", 1): s for name, s in linear_shapes().items()}
    write_adapter(here / "adapter", adapter_tensors(shapes=shapes))
    sentence = refusal(here, *UNPROVED)
    assert "adapter: no weight inner.model.layers.0.self_attn.q_proj.weight in base" in sentence
    assert "names={from: to} renames modules" in sentence
    (here / "mine.yaml").write_text("names: {inner.model: model}")
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
    config = lora_config(target_modules=["layers.0.self_attn.q_proj", "lm_head"])
    write_adapter(here / "adapter", adapter_tensors([Q_PROJ, "lm_head"], shapes=shapes), config)


@pytest.mark.parametrize("tie", [{"tie_word_embeddings": True}, {}])
def test_a_tied_lm_head_is_not_merged_in_silence(here: Path, tie: dict[str, bool]) -> None:
    config = {k: v for k, v in llama_config().items() if k != "tie_word_embeddings"}
    write_base(here / "base", base_tensors(tied=True), config={**config, **tie})
    lm_head_adapter(here)
    assert refusal(here, *UNPROVED, "tied=refuse") == (
        "tied: the adapter changes lm_head, but the base shares its embeddings with lm_head "
        "(tie_word_embeddings) and tied=refuse; tied=untie writes both, tied=shared changes both"
    )
    said = answer(*UNPROVED, cwd=here)
    assert said.status == 0
    assert "lm_head.weight is written and tie_word_embeddings becomes false" in said.out
    assert json.loads((here / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert changed_weights(here) == {f"{Q_PROJ}.weight"}
    own = load_bytes(here / "out", "lm_head.weight")
    assert own != load_bytes(here / "base", "model.embed_tokens.weight")


def test_a_tied_lm_head_that_is_stored_all_the_same_is_not_merged_in_silence(here: Path) -> None:
    write_base(here / "base", config=llama_config(tie_word_embeddings=True))
    lm_head_adapter(here)
    said = answer(*UNPROVED, cwd=here)
    assert said.status == 0
    assert "lm_head.weight is written and tie_word_embeddings becomes false" in said.out
    assert changed_weights(here) == {f"{Q_PROJ}.weight", "lm_head.weight"}


def test_an_untied_lm_head_is_merged(here: Path) -> None:
    lm_head_adapter(here)
    assert answer(*UNPROVED, cwd=here).status == 0
    assert changed_weights(here) == {f"{Q_PROJ}.weight", "lm_head.weight"}


C_PROJ = "h.0.attn.c_proj"


def whole_numbers(*shape: int) -> Tensor:
    """Numbers whose products and sums are exact in float32."""
    return floats("F32", np.arange(np.prod(shape)).reshape(shape))


def conv1d_base(here: Path, **config: Any) -> None:
    """A square Conv1D, of which only the model type tells that it lies transposed."""
    write_base(here / "base", {f"{C_PROJ}.weight": tensor(32, 32)}, config=config)
    tensors = {
        key(C_PROJ, "lora_A.weight"): whole_numbers(4, 32),
        key(C_PROJ, "lora_B.weight"): whole_numbers(32, 4),
    }
    write_adapter(here / "adapter", tensors, lora_config(target_modules=["c_proj"]))


@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt", "imagegpt", "decision_transformer"])
def test_a_square_conv1d_is_merged_as_its_model_type_has_it(here: Path, kind: str) -> None:
    conv1d_base(here, model_type=kind)
    assert answer(*UNPROVED, cwd=here).status == 0
    A, B = np.arange(128).reshape(4, 32), np.arange(128).reshape(32, 4)
    merged = load_file(here / "out" / "model.safetensors")[f"{C_PROJ}.weight"]
    assert np.array_equal(merged, 1 + 2 * (B @ A).T)


def test_a_square_conv1d_of_an_unknown_model_is_refused(here: Path) -> None:
    conv1d_base(here)
    assert refusal(here, *UNPROVED) == (
        f"adapter: '{C_PROJ}' could lie in {C_PROJ}.weight either way; config.json has no model_type"
    )


def experts(here: Path, version: Any) -> None:
    """Square stacked experts: no shape tells which way their LoRA lies."""
    weights = {"mlp.experts.down_proj": tensor(2, 32, 32)}
    write_base(here / "base", weights, config={"model_type": "qwen3_moe"})
    tensors = {
        key("mlp.experts", "lora_A.weight"): whole_numbers(8, 32),
        key("mlp.experts", "lora_B.weight"): whole_numbers(32, 8),
    }
    told = {"target_modules": None, "target_parameters": ["mlp.experts.down_proj"], "peft_version": version}
    write_adapter(here / "adapter", tensors, lora_config(**told))


@pytest.mark.parametrize("version", ["0.19.0.dev0", "0.20.1.dev0@abc", "nightly", 3])
def test_square_experts_of_an_unknown_writer_are_refused(here: Path, version: Any) -> None:
    experts(here, version)
    assert refusal(here, *UNPROVED) == (
        f"adapter: 'mlp.experts' is square, and peft_version {version!r} does not tell which way its experts "
        "lie"
    )


def test_an_out_proj_of_attention_needs_to_be_told_how_often_it_was_applied(here: Path) -> None:
    weights = {"attn.in_proj_weight": tensor(96, 32), "attn.out_proj.weight": tensor(32, 32)}
    write_base(here / "base", weights, config={})
    shapes = {"attn": (96, 32), "attn.base_layer.out_proj": (32, 32)}
    config = lora_config(target_modules=["attn"])
    write_adapter(here / "adapter", adapter_tensors(shapes, shapes=shapes), config)
    assert refusal(here, *UNPROVED).endswith(
        "adapter_model.safetensors: 'attn.base_layer.out_proj' is the out_proj of a MultiheadAttention, "
        "whose delta some versions of PEFT apply twice (0.21.2 does); say extract.out_proj_times=1 or 2"
    )
    assert answer(*UNPROVED, "extract.out_proj_times=1", cwd=here).status == 0


def test_nesting_that_the_config_does_not_explain_is_refused(here: Path) -> None:
    shapes = {**linear_shapes(), f"{Q_PROJ}.base_layer.inner": (32, 32)}
    tensors = adapter_tensors() | adapter_tensors([f"{Q_PROJ}.base_layer.inner"], shapes=shapes)
    sentence = adapter_refusal(here, tensors=tensors)
    assert "lies inside a wrapper that the config does not explain" in sentence


def test_resized_embeddings_without_their_head_are_refused(here: Path) -> None:
    tensors = adapter_tensors() | {key(EMBED, "weight"): tensor(70, 32)}
    sentence = adapter_refusal(here, tensors=tensors)
    assert sentence == (
        "adapter: resizes model.embed_tokens.weight to 70 tokens, but lm_head.weight has 64; the adapter "
        "should hold both"
    )


@pytest.mark.parametrize(
    ("indices", "part"),
    [
        ([1, 1], "has a token index twice"),
        ([1, -2], "has the token index -2, which is none"),
        ([1, 64], "has a row for token 64, beyond a vocabulary of 64"),
        ([1], "has trained token rows that trainable_token_indices does not list"),
    ],
)
def test_token_rows_that_fit_no_token_are_refused(here: Path, indices: list[int], part: str) -> None:
    rows = {key(EMBED, "token_adapter.trainable_tokens_delta"): tensor(2, 32)}
    sentence = adapter_refusal(here, tensors=adapter_tensors() | rows, trainable_token_indices=indices)
    assert f"'model.embed_tokens' {part}" in sentence


def test_a_base_stored_in_codes_is_not_merged_as_numbers(here: Path) -> None:
    codes = Tensor("I8", (32, 32), bytes(1024))
    write_base(here / "base", base_tensors() | {f"{Q_PROJ}.weight": codes})
    sentence = refusal(here, *UNPROVED)
    assert f"adapter: '{Q_PROJ}' means {Q_PROJ}.weight, which is stored as I8" in sentence


# What must not be refused


def changed_weights(here: Path) -> set[str]:
    before, after = tensors_by_bytes(here / "base"), tensors_by_bytes(here / "out")
    assert before.keys() <= after.keys()
    return {name for name in before if before[name] != after[name]}


def tensors_by_bytes(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes, cut from the file by hand."""
    whole = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    table = json.loads(whole[8:start])
    table.pop("__metadata__", None)
    return {n: whole[start + e["data_offsets"][0] : start + e["data_offsets"][1]] for n, e in table.items()}


def load_bytes(folder: Path, name: str) -> bytes:
    return tensors_by_bytes(folder)[name]


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
    config = {"target_modules": "model.layers.0.*[qv]_proj", "rank_pattern": {"v_proj": 2}}
    write_adapter(here / "adapter", mixed, lora_config(**config))
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
