"""extract=svd on all of tests/architectures.py: PEFT takes every key, and answers as the fine-tune.

All parameters of the fine-tune differ, norms, biases, routers and embeddings too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from pipeline.extraction.choice import Rest
from pipeline.ground.errors import Refused
from tests.architectures import CASES
from tests.beside_peft import quiet
from tests.models import tensors
from tests.stages.extracting import ALL, answers_as, config_of, extract, noisy

BERT = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT |= {"vocab_size": 96, "max_position_embeddings": 64}


def bert(kind: str, family: str = "Bert", **options: Any) -> Callable[[], Any]:
    return lambda: getattr(hf, f"{family}{kind}")(getattr(hf, f"{family}Config")(**{**BERT, **options}))


def bart() -> Any:
    sizes = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in _BART.items()}
    told = {"d_model": 32, "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": 2}
    return hf.BartForConditionalGeneration(hf.BartConfig(**sizes, **told, **ends))


_BART = {"layers": 1, "attention_heads": 4, "ffn_dim": 40}


def wav2vec2() -> Any:
    """Convolutions in groups, of which one is parametrized."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    around = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True}
    told = {"num_feat_extract_layers": 2, "feat_extract_norm": "layer", "vocab_size": 30, "pad_token_id": 0}
    return hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**sizes, **convolutions, **around, **told))


# Those that differ in what PEFT makes of them; tests/stages/test_extract_svd.py has the plain ones.
NAMED = (
    *("BERT classifier", "Llama classifier", "Qwen2-MoE", "DeepSeek-V3", "gpt-oss", "Llama 4", "Gemma 3"),
    *("Qwen2.5-VL", "ERNIE 4.5 MoE", "Jamba", "Qwen3-Next", "Qwen3-VL-MoE", "LLaVA", "PaliGemma", "OPT"),
    *("Whisper", "ViT"),
)
MODELS: dict[str, Callable[[], Any]] = {
    **{name: CASES[name].make for name in NAMED},
    "RoBERTa classifier": bert("ForSequenceClassification", "Roberta", pad_token_id=1),
    "BERT for tokens": bert("ForTokenClassification"),
    "BERT for questions": bert("ForQuestionAnswering"),
    "BERT without a head": bert("Model"),
    "Wav2Vec2": wav2vec2,
}
# Their embeddings are three modules' or more, and PEFT keeps no adapter of all of them.
SHARED = {"T5": CASES["T5"].make, "BART": bart}
SETTINGS: dict[str, dict[str, Any]] = {
    "Whisper": {"saved_modules": ("conv1", "conv2", "embed_positions")},  # it reads what PEFT hides
}


def pair(folder: Path, make: Callable[[], Any], changes: Callable[[str], bool] = lambda name: True) -> Any:
    """base and tuned as transformers writes them; the class of both."""
    with quiet():
        torch.manual_seed(0)
        model = make()
        model.save_pretrained(folder / "base")
        noisy(model, changes)
        model.save_pretrained(folder / "tuned")
    return type(model)


def both(folder: Path, cls: Any) -> tuple[Any, Any]:
    with quiet():
        return cls.from_pretrained(folder / "base"), cls.from_pretrained(folder / "tuned")


@pytest.mark.parametrize("name", MODELS)
def test_at_full_rank_base_and_adapter_answer_as_the_fine_tune(name: str, tmp_path: Path) -> None:
    cls = pair(tmp_path, MODELS[name])
    with quiet():
        report = extract(
            tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=ALL, **SETTINGS.get(name, {})
        )
    assert report.passed
    assert {gate.name: gate.status.value for gate in report.gates} == {"PEFT": "passed", "held": "passed"}
    base, tuned = both(tmp_path, cls)
    answers_as(base, tmp_path / "out", tuned)


@pytest.mark.parametrize("name", SHARED)
def test_a_change_of_what_many_modules_share_is_refused_or_left_out(name: str, tmp_path: Path) -> None:
    cls = pair(tmp_path, SHARED[name])
    folders = (tmp_path / "base", tmp_path / "tuned")
    with (
        quiet(),
        pytest.raises(Refused, match=r"shared\.weight changed, which is also .* and lm_head\.weight"),
    ):
        extract(*folders, tmp_path / "out", rank=ALL)
    with quiet():
        report = extract(*folders, tmp_path / "out", rank=ALL, rest=Rest.skip)
    assert report.passed
    assert not [key for key in tensors(tmp_path / "out") if "shared" in key]
    pair(tmp_path, SHARED[name], lambda parameter: "shared" not in parameter)
    with quiet():
        extract(*folders, tmp_path / "unshared", rank=ALL)
    base, tuned = both(tmp_path, cls)
    answers_as(base, tmp_path / "unshared", tuned)


def test_a_module_whose_parts_are_shared_cannot_be_saved_for_what_else_is_in_it(tmp_path: Path) -> None:
    pair(tmp_path, bert("ForMaskedLM"), lambda name: name == "cls.predictions.bias")
    with quiet(), pytest.raises(Refused, match=r"cls\.predictions\.bias changed, which is also cls\.pred"):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")


def test_dense_layers_beside_stacked_experts_are_taken_though_peft_converts_such_names(
    tmp_path: Path,
) -> None:
    """PEFT #3711: it takes gate_proj and the like for single experts, and drops LoRA on dense layers."""
    cls = pair(tmp_path, MODELS["DeepSeek-V3"], lambda name: ".mlp." in name and "experts." not in name)
    with quiet():
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=ALL)
    assert "model.layers.0.mlp.gate_proj.weight" in config_of(tmp_path / "out")["target_parameters"]
    base, tuned = both(tmp_path, cls)
    answers_as(base, tmp_path / "out", tuned)


@pytest.mark.parametrize(
    ("name", "head", "task"),
    [
        ("Llama classifier", "score", "SEQ_CLS"),
        ("RoBERTa classifier", "classifier", "SEQ_CLS"),
        ("BERT for questions", "qa_outputs", "QUESTION_ANS"),
    ],
)
def test_a_changed_head_is_saved_whole_for_its_task_and_one_that_did_not_change_asks_for_none(
    tmp_path: Path, name: str, head: str, task: str
) -> None:
    cls = pair(tmp_path, MODELS[name])
    with quiet():
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=ALL)
    found = config_of(tmp_path / "out")
    assert (found["task_type"], head in found["modules_to_save"]) == (task, True)
    pair(tmp_path, MODELS[name], lambda parameter: head not in parameter)
    with quiet():
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "bare", rank=ALL)
    found = config_of(tmp_path / "bare")
    assert (found["task_type"], head in (found["modules_to_save"] or [])) == (None, False)
    base, tuned = both(tmp_path, cls)
    answers_as(base, tmp_path / "bare", tuned)


def test_a_bare_vector_is_saved_with_all_that_is_in_its_module_and_told(tmp_path: Path) -> None:
    pair(tmp_path, MODELS["Jamba"], lambda name: ".mamba." in name or "q_proj" in name)
    with quiet():
        report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=ALL)
    assert config_of(tmp_path / "out")["modules_to_save"] == ["model.layers.0.mamba"]
    assert any("saved whole, as part of model.layers.0.mamba" in f.text for f in report.plan.findings)
