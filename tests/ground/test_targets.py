"""What a config promises: PEFT's own choice of modules, real layouts of files, and what a file can lose."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from pipeline.ground.audit import ALONG, BIASES, LORA, MAGNITUDES, SAVED, TOKENS, audit
from pipeline.ground.base_modules import by_number
from pipeline.ground.errors import Refused
from pipeline.ground.targets import expected_modules, unkept

Shapes = dict[str, tuple[int, ...]]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION, MLP, W123 = LINEAR[:4], LINEAR[4:], ["w1", "w2", "w3"]
ENDS = ["embed_tokens", "lm_head"]


def layer_of(attention: list[str], mlp: list[str], experts: int = 0) -> nn.Module:
    layer = nn.Module()
    layer.self_attn = nn.ModuleDict({name: nn.Linear(2, 2) for name in attention})
    layer.mlp = nn.ModuleDict({name: nn.Linear(2, 2) for name in mlp})
    if experts:
        layer.experts = nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(2, 2)}) for _ in range(experts)])
    return layer


def tree() -> nn.Module:
    """A model of two towers, a stack without a name before it, experts, and numbers in other places."""
    root = nn.Module()
    root.model = nn.Module()
    root.model.embed_tokens = nn.Embedding(4, 2)
    root.model.layers = nn.ModuleList(
        [layer_of(["q_proj", "k_proj"], ["up_proj"], experts=n) for n in (0, 2)]
    )
    root.vision = nn.Module()
    root.vision.blocks = nn.ModuleList([layer_of(["q_proj", "qkv"], ["fc1"]) for _ in range(2)])
    root.vision.merger = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    root.h = nn.ModuleList([layer_of(["q_proj"], ["fc1"])])
    root.lm_head = nn.Linear(2, 4)
    return root


NAMES = [name for name, _ in tree().named_modules() if name]
LEAVES = [name for name, module in tree().named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
ends = st.sampled_from(sorted({".".join(n.split(".")[-k:]) for n in LEAVES for k in (1, 2, 3, 5)}))
lists = st.lists(st.one_of(ends, st.sampled_from(["nonesuch", "proj", "roj", "0"])), min_size=1, max_size=4)
patterns = st.sampled_from(
    [
        r".*\.(q|k)_proj",
        r"model\.layers\.[01]\..*_proj",
        r".*1\.self_attn.*proj",
        r"h\.\d\.(self_attn|mlp)\.(q_proj|fc1)",
        r".*(experts|merger)\.\d(\.up_proj)?",
        r"(?i).*QKV|lm_head",
        "q_proj",
        "",
    ]
)
layers = st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 2), max_size=2))
layer_names = st.one_of(
    st.none(), st.sampled_from(["layers", "h", "", [], ["blocks", "h"], ["lay.rs"], "merger"])
)
saved = st.sampled_from(
    [None, [], ["lm_head"], ["embed_tokens", "lm_head"], ["self_attn"], ["layers.1"], ["up_proj"]]
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    config: dict[str, Any] = {
        "target_modules": draw(st.one_of(lists, patterns)),
        "exclude_modules": draw(st.one_of(st.none(), lists, patterns)),
        "modules_to_save": draw(saved),
    }
    if isinstance(config["target_modules"], list):
        config["layers_to_transform"] = draw(layers)
        if config["layers_to_transform"] is not None:
            config["layers_pattern"] = draw(layer_names)
    return config


def peft_model(model: nn.Module, **config: Any) -> PeftModel:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(**{"r": 2, **config}))


def lora_modules(model: PeftModel) -> set[str]:
    """The modules that PEFT has put LoRA on."""
    found = model.base_model.model.named_modules()
    return {name for name, module in found if isinstance(module, LoraLayer)}


def saved_config(model: PeftModel) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it."""
    table = model.peft_config["default"].to_dict()
    table = {k: sorted(v) if isinstance(v, set) else v for k, v in table.items() if k != "runtime_config"}
    return dict(json.loads(json.dumps(table)))


# A stack with nothing before it is in no layer; an entry that is a whole name is in all; experts count not.
@example(config={"target_modules": ["q_proj"], "layers_to_transform": [0]})
@example(config={"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "h"})
@example(config={"target_modules": ["model.layers.1.self_attn.q_proj", "fc1"], "layers_to_transform": 0})
@example(config={"target_modules": ["up_proj"], "layers_to_transform": [1]})
@example(
    config={"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers|experts"}
)
@example(config={"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": r"\w+"})
@given(config=configs())
def test_targets_are_pefts_own(config: dict[str, Any]) -> None:
    peft = LoraConfig(**config)
    wanted = {name for name in NAMES if check_target_module_exists(peft, name)}
    assert expected_modules(config, NAMES) == wanted


@settings(max_examples=40, deadline=None)
@given(config=configs())
def test_targets_are_what_peft_wraps(config: dict[str, Any]) -> None:
    try:
        with torch.device("meta"):
            model = peft_model(tree(), **config)
    except (ValueError, TypeError):  # nothing to wrap, or not a layer that LoRA can be on
        assume(False)
    assert expected_modules(saved_config(model), NAMES) == lora_modules(model)
    assert expected_modules(config, NAMES) == lora_modules(model)


# A real model, its files, and adapters that PEFT made for it


def llama(kind: Callable[..., nn.Module] = LlamaForCausalLM, **config: Any) -> nn.Module:
    size = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    rest = {"num_hidden_layers": 4, "vocab_size": 16, "tie_word_embeddings": False}
    with torch.device("meta"):
        return kind(LlamaConfig(**{**size, **rest, **config}))


def shapes(model: nn.Module) -> Shapes:
    """Of a checkpoint's files: a tied lm_head is not in them."""
    tied = getattr(model.config, "tie_word_embeddings", False)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {name: shape for name, shape in found.items() if not (tied and name == "lm_head.weight")}


def tensors(model: PeftModel, along: bool = False) -> Shapes:
    """Of the adapter's file, by its keys; `along` with copies of the embeddings, as save_pretrained adds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(model, save_embedding_layers=along)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def modules(keys: Iterable[str]) -> set[str]:
    """The modules that these keys of an adapter file are of."""
    inner = (
        r"lora_[AB]\.(weight|bias)|lora_embedding_[AB]|lora_magnitude_vector|token_adapter\..*|weight|bias"
    )
    return {re.sub(rf"\.({inner})$", "", key.removeprefix("base_model.model.")) for key in keys}


def num_trained(model: PeftModel) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@cache
def base() -> Shapes:
    return shapes(llama())


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"target_modules": LINEAR, "use_dora": True},
        {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"], "rank_pattern": {"layers.1.*q_proj": 5}},
        {"target_modules": r".*\.(self_attn|mlp)\..*_proj"},
        {"target_modules": r".*q_proj|lm_head|.*embed_tokens", "task_type": "CAUSAL_LM"},
        {"target_modules": LINEAR, "exclude_modules": r".*\.2\..*", "layers_to_transform": [0, 2, 3]},
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": LINEAR, "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": LINEAR, "modules_to_save": ["head", "layers.3.mlp", "input_layernorm"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2, 5]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2, 3]}},
        {"target_modules": None},
        {"target_modules": [], "target_parameters": ["mlp.gate_proj.weight"]},
        {"target_modules": ["v_proj"], "target_parameters": ["mlp.gate_proj.weight"]},
    ],
    ids=str,
)
def test_what_peft_saves_keeps_its_promise(config: dict[str, Any]) -> None:
    model = peft_model(llama(), **config)
    held = tensors(model)
    assert unkept(saved_config(model), modules(held), base()) == ([], [])
    counted = audit(saved_config(model), held, base())
    assert counted.promised == counted.held == num_trained(model)
    assert counted.sentence() is None


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1], "lm_head": [1]}},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
    ],
    ids=str,
)
def test_what_peft_saves_of_tied_models_keeps_its_promise(config: dict[str, Any]) -> None:
    files = shapes(llama(tie_word_embeddings=True))
    model = peft_model(llama(tie_word_embeddings=True), **config)
    held = tensors(model)
    assert unkept(saved_config(model), modules(held), files) == ([], [])
    counted = audit(saved_config(model), held, files)
    copies = counted.kinds.get(ALONG, (0, 0))[1]  # the embeddings' twin
    assert counted.promised == counted.held - copies and counted.sentence() is None


def test_a_tied_lm_head_that_was_trained_is_missed_though_the_base_has_none() -> None:
    whole = llama(tie_word_embeddings=True)
    for config in (
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        model = peft_model(llama(tie_word_embeddings=True), **config)
        left = {key: shape for key, shape in tensors(model).items() if "lm_head" not in key}
        [refusal], findings = unkept(saved_config(model), modules(left), shapes(whole))
        lost = audit(saved_config(model), left, shapes(whole)).sentence() or ""
        assert ("it lacks 128 of 128 embeddings and heads saved whole" in lost) == (
            "modules_to_save" in config
        )
        assert (
            refusal.startswith("has nothing for 'lm_head', which adapter_config.json lists in")
            and not findings
        )


@settings(deadline=None)
@given(data=st.data())
def test_no_module_is_lost_unnoticed(data: st.DataObject) -> None:
    config, whole = data.draw(st.sampled_from(complete()))
    lost = data.draw(st.sets(st.sampled_from(sorted(whole)), min_size=1, max_size=len(whole) - 1))
    refusals, findings = unkept(config, whole - lost, base())
    if not refusals:  # as it is right for Gemma 3n
        assert len(findings) == 1 and findings[0].endswith(
            "right if its last layers take keys of earlier ones"
        )
    elif not any("lists in" in refusal for refusal in refusals):
        first = min(lost, key=by_number)
        assert f"has nothing for '{first}'" in refusals[0] or "keys of earlier ones" in findings[0]


@cache
def complete() -> list[tuple[dict[str, Any], set[str]]]:
    """Configs, and the modules that PEFT saves for them."""
    found = []
    for config in (
        {"target_modules": LINEAR, "modules_to_save": ["lm_head"]},
        {"target_modules": r".*\.(self_attn|mlp)\..*_proj|lm_head|.*embed_tokens"},
        {"target_modules": "all-linear"},
        {"target_modules": MLP, "layers_to_transform": [0, 3], "modules_to_save": ["input_layernorm"]},
    ):
        model = peft_model(llama(), **config)
        found.append((saved_config(model), modules(tensors(model))))
    return found


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_lost_layer_is_named_and_counted(layer: int) -> None:
    config, whole = complete()[0]
    left = {m for m in whole if not m.startswith(f"model.layers.{layer}.")}
    assert unkept(config, left, base()) == (
        [
            f"has nothing for 'model.layers.{layer}.mlp.down_proj' and 6 more modules, which "
            "adapter_config.json says were trained"
        ],
        [],
    )


def test_a_lost_entry_is_said_once() -> None:
    config, whole = complete()[0]
    left = {m for m in whole if not m.endswith(("o_proj", "up_proj"))}
    assert unkept(config, left, base()) == (
        ["has nothing for 'o_proj', 'up_proj', which adapter_config.json lists in target_modules"],
        [],
    )


def test_a_head_of_a_vlms_files_is_missed_by_its_name_in_memory() -> None:
    config = {"target_modules": r".*q_proj|lm_head", "task_type": "CAUSAL_LM"}
    held, files = spelled("model.layers", names=["q_proj"]), weights(["language_model.lm_head"])
    files |= weights(spelled("language_model.model.layers", names=["q_proj"]))
    assert unkept(config, held | {"lm_head"}, files) == ([], [])
    assert unkept(config, held, files)[0] == [
        "has nothing for 'language_model.lm_head', which adapter_config.json says was trained"
    ]
    assert not unkept({**config, "task_type": "SEQ_CLS"}, held, files)[0]


def test_the_trained_embeddings_of_llama31_are_missed() -> None:
    """unsloth#1045: 1,134,559,232 parameters were trained, and what was loaded again was a plain LoRA."""
    with torch.device("meta"):
        size: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        heads: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
        whole = shapes(llama(**size, **heads))
        made = peft_model(llama(**size, **heads), r=32, target_modules=LINEAR, modules_to_save=ENDS)
    config, held = saved_config(made), tensors(made)
    assert num_trained(made) == 1_134_559_232
    assert audit(config, held, whole).kinds == {LORA: (83_886_080,) * 2, SAVED: (1_050_673_152,) * 2}
    assert unkept(config, modules(held), whole) == ([], [])

    left = {key: shape for key, shape in held.items() if "lora_" in key}
    counted = audit(config, left, whole)
    assert (counted.promised, counted.held) == (1_134_559_232, 83_886_080)
    assert counted.sentence() == (
        "holds 83,886,080 of 1,134,559,232 trained parameters; it lacks 1,050,673,152 of 1,050,673,152 "
        "embeddings and heads saved whole"
    )
    [refusal], findings = unkept(config, modules(left), whole)
    assert refusal == (
        "has nothing for 'embed_tokens', 'lm_head', which adapter_config.json lists in modules_to_save: "
        "1,050,673,152 parameters"
    )
    assert not findings


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"use_dora": True}, MAGNITUDES),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, BIASES),
        ({"bias": "all", "target_modules": ["q_proj"]}, BIASES),
        ({"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]}, BIASES),
        ({"trainable_token_indices": [3, 1]}, TOKENS),
    ],
)
def test_the_audit_counts_every_kind_as_torch_does(options: dict[str, Any], kind: str) -> None:
    biased: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
    model = peft_model(llama(**biased), **{"target_modules": LINEAR, "r": 3, **options})
    held, files = tensors(model), shapes(llama(**biased))
    counted = audit(saved_config(model), held, files)
    assert counted.promised == counted.held == num_trained(model)
    assert counted.kinds[kind][1] > 0

    left = {key: shape for key, shape in held.items() if key in lora_keys(held)}
    assert audit(saved_config(model), left, files).kinds[kind] == (counted.kinds[kind][0], 0)


def lora_keys(held: Iterable[str]) -> set[str]:
    return {key for key in held if re.search(r"lora_[AB]\.weight$", key)}


def test_biases_of_a_tower_without_lora_are_counted() -> None:
    config = {"r": 2, "target_modules": ["q_proj"], "bias": "all"}
    base: Shapes = {
        "text.layers.0.q_proj.weight": (4, 4),
        "vision.layers.0.qkv.weight": (4, 4),
        "lm_head.bias": (5,),
    }
    base["vision.layers.0.qkv.bias"] = (4,)
    held: Shapes = {f"base_model.model.text.layers.0.q_proj.lora_{x}.weight": (4, 2) for x in "AB"}
    held |= {"base_model.model.lm_head.bias": (5,), "base_model.model.vision.layers.0.qkv.bias": (4,)}
    assert audit(config, held, base).kinds == {LORA: (16, 16), BIASES: (9, 9)}


def test_what_is_saved_beside_the_adapter_was_not_trained() -> None:
    model = peft_model(llama(), target_modules=["q_proj", "lm_head"])
    counted = audit(saved_config(model), tensors(model, along=True), base())
    assert counted.kinds[ALONG] == (0, 16 * 8)
    assert counted.promised == num_trained(model) and counted.sentence() is None


# A classifier's head: PEFT lists two names for it, of which a model has one


def test_one_of_the_names_of_a_classifiers_head_is_enough() -> None:
    model = peft_model(llama(LlamaForSequenceClassification), target_modules=["q_proj"], task_type="SEQ_CLS")
    config, held = saved_config(model), modules(tensors(model))
    assert config["modules_to_save"] == ["classifier", "score"] and "score" in held
    assert audit(config, tensors(model), base()).promised == num_trained(model)
    assert unkept(config, held, base()) == ([], [])
    refusals, _ = unkept(config, held - {"score"}, base())
    assert refusals == [
        "has nothing for 'classifier', 'score', which adapter_config.json lists in modules_to_save"
    ]


# Layouts: files and adapters of other eras, and modules that only files have


def spelled(*prefixes: str, layers: int = 4, names: Iterable[str] = LINEAR) -> set[str]:
    """The linear modules of these stacks of layers."""
    inside = [f"{'self_attn' if n in ATTENTION else 'mlp'}.{n}" for n in names]
    return {f"{prefix}.{i}.{name}" for prefix in prefixes for i in range(layers) for name in inside}


def weights(*modules: Iterable[str], shape: tuple[int, ...] = (4, 4)) -> Shapes:
    return {f"{module}.weight": shape for group in modules for module in group}


GEMMA3 = weights(
    spelled("language_model.model.layers"),
    spelled("vision_tower.vision_model.encoder.layers", layers=2),
    ["language_model.model.embed_tokens", "multi_modal_projector.mm_input_projection"],
)
ERAS = [
    ("model.language_model.layers", "model.vision_tower.encoder.layers"),
    ("model.language_model.layers", "model.vision_tower.vision_model.encoder.layers"),
    ("language_model.model.layers", "vision_tower.vision_model.encoder.layers"),
]


@pytest.mark.parametrize("text, vision", ERAS)
def test_every_eras_spelling_is_held_against_the_files(text: str, vision: str) -> None:
    config = {"target_modules": LINEAR}
    whole = spelled(text) | spelled(vision, layers=2)
    assert unkept(config, whole, GEMMA3) == ([], [])
    for lost in (f"{text}.3.mlp.up_proj", f"{vision}.1.self_attn.q_proj"):
        [refusal], findings = unkept(config, whole - {lost}, GEMMA3)
        assert refusal == f"has nothing for '{lost}', which adapter_config.json says was trained"
        assert not findings


@pytest.mark.parametrize("text, vision", ERAS)
def test_a_pattern_speaks_the_adapters_spelling(text: str, vision: str) -> None:
    config = {"target_modules": re.escape(text) + r"\.\d+\.(self_attn|mlp)\..*"}
    whole = spelled(text)
    assert unkept(config, whole, GEMMA3) == ([], [])
    assert unkept(config, whole - spelled(text, names=["v_proj"]), GEMMA3)[0] == [
        f"has nothing for '{text}.0.self_attn.v_proj' and 3 more modules, which adapter_config.json says "
        "were trained"
    ]


@pytest.mark.parametrize(
    "text", ["model.layers", "model.language_model.layers", "language_model.model.layers"]
)
def test_a_tower_without_any_module_is_a_finding(text: str) -> None:
    refusals, findings = unkept({"target_modules": LINEAR}, spelled(text), GEMMA3)
    assert not refusals
    assert findings == [
        "has none of the 14 modules under 'vision_tower.vision_model.encoder.layers' that "
        "adapter_config.json means; right if its model lacked them"
    ]


def test_no_layer_of_any_tower_is_no_finding_but_a_refusal() -> None:
    config = {"target_modules": r".*(q_proj|embed_tokens)"}
    [refusal], _ = unkept(config, {"model.embed_tokens"}, GEMMA3)
    assert "'language_model.model.layers.0.self_attn.q_proj' and 5 more modules" in refusal


def test_files_that_name_what_is_in_a_layer_otherwise_are_not_held_against_it() -> None:
    """One wqkv on disk, three projections in memory."""
    files = weights({f"model.layers.{i}.self_attn.{n}" for i in range(4) for n in ("wqkv", "o_proj")})
    config, held = {"target_modules": r".*self_attn\..*"}, spelled("model.layers", names=ATTENTION)
    refusals, findings = unkept(config, held, files)
    assert not refusals and "'model.layers.0.self_attn.wqkv' and 3 more modules" in findings[0]
    assert unkept(config, held - {"model.layers.1.self_attn.o_proj"}, files)[0]


def test_layers_beyond_the_models_are_not_missed() -> None:
    ahead = {f"model.layers.4.self_attn.{n}" for n in ATTENTION}
    files = weights(spelled("model.layers"), ahead, spelled("model.mtp.layers", "mtp_layers", layers=1))
    config, held = {"target_modules": LINEAR}, spelled("model.layers")
    assert unkept(config, held, files, num_layers=4) == ([], [])
    assert unkept(config, held, files | weights(["model.layers.4.eh_proj"])) == ([], [])
    assert unkept(config, held, files)[0]  # nothing tells that there are four


def test_a_vision_tower_may_be_deeper_than_the_language_model() -> None:
    held = spelled("model.language_model.layers", layers=1) | spelled("model.vision_tower.layers")
    [refusal], _ = unkept(
        {"target_modules": LINEAR},
        held - spelled("model.vision_tower.layers", names=["q_proj"])
        | {f"model.vision_tower.layers.{i}.self_attn.q_proj" for i in range(3)},
        weights(held),
        num_layers=1,
    )
    assert "model.vision_tower.layers.3.self_attn.q_proj" in refusal


def test_keys_of_the_last_layers_may_be_those_of_earlier_ones() -> None:
    files, config = weights(spelled("model.layers")), {"target_modules": LINEAR}
    shared = {f"model.layers.{i}.self_attn.{n}" for i in (2, 3) for n in ("k_proj", "v_proj")}
    refusals, findings = unkept(config, spelled("model.layers") - shared, files)
    assert not refusals
    assert findings == [
        "has nothing for 'model.layers.2.self_attn.k_proj' and 3 more modules; right if its last layers take "
        "keys of earlier ones"
    ]
    pattern = {"target_modules": r".*\.(self_attn|mlp)\..*"}
    assert unkept(pattern, spelled("model.layers", names=["q_proj"]), files)[0]
    assert unkept(pattern, spelled("model.layers", names=["q_proj", "o_proj", *MLP]), files)[0]
    for more in ("model.layers.0.self_attn.k_proj", "model.layers.3.self_attn.q_proj"):
        assert unkept(config, spelled("model.layers") - shared - {more}, files)[0]


# Mixtures of experts


def experts(prefix: str, names: Iterable[str], layers: int = 3, num: int = 2) -> set[str]:
    return {f"model.layers.{i}.{prefix}.{e}.{n}" for i in range(layers) for e in range(num) for n in names}


def test_experts_one_by_one_are_held_against_experts_one_by_one() -> None:
    files = weights(
        spelled("model.layers", layers=3, names=ATTENTION), experts("block_sparse_moe.experts", W123)
    )
    config = {"target_modules": ["q_proj", *W123]}
    held = spelled("model.layers", layers=3, names=["q_proj"]) | experts("block_sparse_moe.experts", W123)
    assert unkept(config, held, files) == ([], [])
    lost = "model.layers.1.block_sparse_moe.experts.1.w3"
    assert unkept(config, held - {lost}, files)[0] == [
        f"has nothing for '{lost}', which adapter_config.json says was trained"
    ]


def test_routed_experts_that_memory_keeps_fused_need_not_be_in_the_file() -> None:
    dense = {f"model.layers.0.mlp.{n}" for n in MLP}
    shared = {f"model.layers.{i}.mlp.shared_experts.{n}" for i in (1, 2) for n in MLP}
    files = weights(
        dense, shared, experts("mlp.experts", MLP), spelled("model.layers", layers=3, names=ATTENTION)
    )
    held = dense | shared | spelled("model.layers", layers=3, names=ATTENTION)
    refusals, findings = unkept({"target_modules": LINEAR}, held, files)
    assert not refusals
    assert findings == [
        "has nothing for 'model.layers.0.mlp.experts.0.down_proj' and 17 more modules, which "
        "adapter_config.json means; right if its model lacked them"
    ]
    [refusal], _ = unkept({"target_modules": LINEAR}, held - dense, files)
    assert "'model.layers.0.mlp.down_proj' and 2 more modules" in refusal


@pytest.mark.parametrize("fused", [True, False])
def test_fused_experts_of_a_lost_layer_are_missed_in_either_layout(fused: bool) -> None:
    one_by_one = weights(experts("mlp.experts", MLP))
    together = {
        f"model.layers.{i}.mlp.experts.{n}": (2, 4, 4)
        for i in range(3)
        for n in ("gate_up_proj", "down_proj")
    }
    files = weights(spelled("model.layers", layers=3, names=ATTENTION)) | (together if fused else one_by_one)
    config = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "down_proj"]}
    held = spelled("model.layers", layers=3, names=["q_proj"])
    whole = held | {f"model.layers.{i}.mlp.experts{end}" for i in range(3) for end in ("", ".base_layer")}
    assert unkept(config, whole, files) == ([], [])
    left = {m for m in whole if "layers.1.mlp" not in m}
    assert unkept(config, left, files)[0] == [
        "has nothing for 'model.layers.1.mlp.experts', which adapter_config.json says was trained"
    ]
    assert unkept(config, held, files)[0] == [
        "has nothing for 'mlp.experts.gate_up_proj', which adapter_config.json lists in target_parameters"
    ]


def test_experts_of_the_other_layout_are_compared_with_nothing() -> None:
    files = weights(spelled("model.layers", layers=3, names=ATTENTION))
    files |= {
        f"model.layers.{i}.mlp.experts.{n}": (2, 4, 4)
        for i in range(3)
        for n in ("gate_up_proj", "down_proj")
    }
    held = experts("mlp.experts", MLP, layers=2) | spelled("model.layers", layers=3, names=ATTENTION)
    assert unkept({"target_modules": LINEAR}, held, files) == ([], [])


# Entries that mean nothing, and fields that cannot be


def test_a_name_that_the_model_never_had_is_a_finding() -> None:
    """Phi-3 has qkv_proj and gate_up_proj: lists made for Llama name half of its modules."""
    names = [f"model.layers.{i}.self_attn.{n}" for i in range(2) for n in ("qkv_proj", "o_proj")]
    refusals, findings = unkept(
        {"target_modules": LINEAR[:4]}, {n for n in names if "o_" in n}, weights(names)
    )
    assert not refusals
    assert findings == [
        "has nothing for 'q_proj', 'k_proj', 'v_proj', which adapter_config.json lists in target_modules; "
        "nor has the base"
    ]


def test_without_a_base_every_entry_must_be_answered() -> None:
    refusals, findings = unkept({"target_modules": ["q_proj", "o_proj"]}, {"a.0.q_proj"}, {})
    assert refusals == ["has nothing for 'o_proj', which adapter_config.json lists in target_modules"]
    assert not findings


def test_an_entry_that_other_fields_rule_out_is_not_missed() -> None:
    config = {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [1]}
    files = base()
    assert unkept(config, {"model.layers.1.self_attn.q_proj"}, files) == ([], [])
    config = {
        "target_modules": LINEAR,
        "exclude_modules": [f"model.layers.{i}.mlp.up_proj" for i in range(4)],
    }
    held = {m for m in spelled("model.layers") if "up_proj" not in m}
    assert unkept(config, held, files) == ([], [])


def test_renamed_modules_are_found_under_their_new_names() -> None:
    config, held = {"target_modules": LINEAR}, spelled("inner.stack")
    assert unkept(config, held, base(), renames={"inner.stack": "model.layers"}) == ([], [])
    [refusal], _ = unkept(
        config, held - {"inner.stack.2.mlp.up_proj"}, base(), renames={"inner.stack": "model.layers"}
    )
    assert "'inner.stack.2.mlp.up_proj'" in refusal


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", 3),
        ("target_modules", ["q_proj", None]),
        ("target_modules", "(q_proj"),
        ("exclude_modules", {"q_proj": 1}),
        ("exclude_modules", "*"),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", ["lm_head("]),
        ("layers_to_transform", "1"),
        ("layers_to_transform", True),
        ("layers_to_transform", [1.0]),
        ("layers_pattern", ["(?P<idx>x)"]),
        ("target_parameters", "experts.down_proj"),
        ("trainable_token_indices", [None]),
        ("trainable_token_indices", {"embed_tokens": 1}),
    ],
)
def test_fields_that_cannot_be_are_refused(field: str, value: Any) -> None:
    config = {"target_modules": ["q_proj"], "layers_to_transform": [0], field: value}
    [refusal], findings = unkept(config, spelled("model.layers"), base())
    assert refusal.startswith(f"adapter_config.json: {field} ") and not findings
    with pytest.raises(Refused, match=f"^adapter_config.json: {field} "):
        expected_modules(config, NAMES)
