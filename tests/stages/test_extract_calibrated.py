"""extract=svd with extract.calibration: outputs are kept, as far as text that was held out can tell."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
)

from pipeline import stage
from pipeline.door import Request, fulfil
from pipeline.extraction import outputs
from pipeline.extraction.choice import Rest
from pipeline.ground.dtypes import FloatDtype
from pipeline.ground.errors import Refused
from pipeline.ground.ranks import Budget, Energy, NoiseEdge
from pipeline.ground.report import Report, Status
from tests.bytes_model import byte_tokenizer, half, save, source, trained_pair
from tests.models import tensors
from tests.running import chosen
from tests.tolerance import FLOAT32_FORWARD, FLOAT32_SUM

LINEAR = ("self_attn", "mlp")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 256}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 66}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return trained_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """The half of it that the model saw."""
    (path := tmp_path / "calibration.txt").write_text(half(source(), 0))
    return path


def svd(base: Path, tuned: Path | None, output: Path, **settings: Any) -> Any:
    adapter = settings.pop("adapter", None)
    stages: Any = stage.STAGES
    return stages["extract"]["svd"](
        adapter=chosen(adapter) if adapter else (),
        base_model=str(base),
        finetune=str(tuned) if tuned else None,
        output=output,
        **{"rank": 4, "rest": Rest.save, "targeted_modules": LINEAR, "calibration_tokens": 2048, **settings},
    )


def extract(
    base: Path, tuned: Path | None, output: Path, *, verify: str = "structure", **settings: Any
) -> Report:
    stages: Any = stage.STAGES
    pipeline = stage.Pipeline(
        extract=svd(base, tuned, output, **settings),
        load=stages["load"]["safetensors"](base_model=str(base)),
        dequantize=stages["dequantize"]["auto"](),
        merge=stages["merge"]["exact"](merge_dtype=FloatDtype.float32, names={}),
        save=stages["save"]["adapter"](output=output, device="cpu"),
        verify=stages["verify"][verify](device="cpu"),
    )
    report = fulfil(Request(pipeline, {}))
    assert report is not None
    return report


def facts_of(output: Path) -> dict[str, dict[str, Any]]:
    return dict(json.loads((output / "merge.json").read_text())["extraction"])


def unseen() -> torch.Tensor:
    ids = byte_tokenizer()(half(source(), 1))["input_ids"]
    return torch.tensor(ids[: 64 * 48]).view(-1, 64)


def log_probabilities(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=unseen()).logits.double().log_softmax(-1)


def with_adapter(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))


def mean_kl(tuned: Path, model: Any) -> float:
    """KL(finetune||model) by torch, nats per token of text that neither training nor calibration saw."""
    wanted = log_probabilities(AutoModelForCausalLM.from_pretrained(tuned))
    found = log_probabilities(model)
    return float(
        torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="sum") / unseen().numel()
    )


def inputs_of(tuned: Path, module: str, text: str, tokens: int) -> torch.Tensor:
    """(rows, n) what a module sees of the text's sequences that are not held out, noted by a hook of ours."""
    model = AutoModelForCausalLM.from_pretrained(tuned).eval()
    seen: list[torch.Tensor] = []
    model.get_submodule(module).register_forward_hook(lambda m, args, out: seen.append(args[0]))
    ids = torch.tensor(byte_tokenizer()(text)["input_ids"][:tokens])
    length = min(256, model.config.max_position_embeddings - 2)
    sequences = ids[: len(ids) // length * length].view(-1, length)
    with torch.no_grad():
        for number, one in enumerate(sequences):
            if number % 8 != 7:
                model(input_ids=one[None])
    return torch.cat([x.flatten(0, -2) for x in seen])


def test_answers_on_unseen_text_are_nearer_than_by_weights(
    pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    base, tuned = pair
    extract(base, tuned, tmp_path / "plain")
    report = extract(base, tuned, tmp_path / "aware", calibration=str(text), verify="standard")
    passed = {gate.name for gate in report.gates if gate.status is Status.passed}
    assert passed >= {"PEFT", "held", "outputs", "nearness"}
    plain, aware = (mean_kl(tuned, with_adapter(base, tmp_path / name)) for name in ("plain", "aware"))
    assert aware < 0.8 * plain
    assert any("on text held out" in finding.text for finding in report.plan.findings)
    for name, said in facts_of(tmp_path / "aware").items():
        assert said["captured"] < facts_of(tmp_path / "plain")[name]["captured"]  # which is the price
        assert said["outputs_captured"] > said["outputs_captured_plain"], name
    (share,) = (gate.seen.split()[0] for gate in report.gates if gate.name == "outputs")
    shown = f"{float(share[:-1]):.2f}%"
    card, page = ((tmp_path / "aware" / name).read_text() for name in ("README.md", "report.html"))
    assert f"of what changed in them, and {shown} of what changed in their outputs." in card
    assert f"<dt>of the outputs&#x27; change is held</dt><dd>{shown}</dd>" in page
    assert "Share of what changes in the outputs that the adapter holds" in page
    assert re.search(r"<th[^>]*>of outputs</th><th[^>]*>by weights alone</th>", page)
    assert "outputs" not in (tmp_path / "plain" / "README.md").read_text()


def test_factors_are_the_optimum_of_float64_for_the_inputs_of_the_fine_tune(
    pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    base, tuned = pair
    extract(base, tuned, tmp_path / "out", calibration=str(text))
    before, after, factors = tensors(base), tensors(tuned), tensors(tmp_path / "out")
    for module in ("layers.0.self_attn.k_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj"):
        name = f"model.{module}"
        X = inputs_of(tuned, name, text.read_text(), 2048).double().numpy()
        C = X.T @ X / len(X)
        values, Q = np.linalg.eigh(C / np.mean(np.diag(C)) + 0.01 * np.eye(len(C)))
        half_of_C = Q * np.sqrt(values) @ Q.T
        D = (after[f"{name}.weight"] - before[f"{name}.weight"]).double().numpy()
        A, B = (factors[f"base_model.model.{name}.lora_{x}.weight"].double().numpy() for x in "AB")
        best = np.sqrt((np.linalg.svd(D @ half_of_C, compute_uv=False)[4:] ** 2).sum())
        assert np.linalg.norm((D - B @ A) @ half_of_C) < best * (1 + FLOAT32_SUM)
        said = facts_of(tmp_path / "out")[f"{name}.weight"]
        assert abs(said["captured"] - (1 - (((D - B @ A) ** 2).sum() / (D**2).sum()))) < FLOAT32_SUM
        assert abs(said["outputs_fitted"] - (1 - (best / np.linalg.norm(D @ half_of_C)) ** 2)) < FLOAT32_SUM
        assert np.abs(np.linalg.norm(A, axis=1) / np.linalg.norm(B, axis=0) - 1).max() < FLOAT32_FORWARD


def test_the_same_request_gives_the_same_bytes(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for workers in (1, 3):
        monkeypatch.setattr("pipeline.extraction.calibrating.num_workers", lambda workers=workers: workers)
        limit = {"memory_limit": 2_000_000} if workers == 1 else {}
        extract(*pair, tmp_path / str(workers), calibration=str(text), **limit)
        files.append((tmp_path / str(workers) / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_rules_of_rank_mean_outputs_but_noise_is_of_weights(
    pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    given = {"calibration": str(text), "rest": Rest.skip}
    extract(*pair, tmp_path / "energy", rank=Energy(0.9), **given)
    for name, said in facts_of(tmp_path / "energy").items():
        assert said["outputs_fitted"] >= 0.9, name
        assert said["rank"] == 1 or said["captured"] < 0.9, name
    extract(*pair, tmp_path / "budget", rank=Budget(6000, False), **given)
    spent = sum(t.numel() for t in tensors(tmp_path / "budget").values())
    assert 5700 < spent <= 6000
    extract(*pair, tmp_path / "auto", rank=NoiseEdge(), max_rank=24, **given)
    extract(*pair, tmp_path / "plain", rank=NoiseEdge(), max_rank=24, rest=Rest.skip)
    ranks = [{name: f["rank"] for name, f in facts_of(tmp_path / way).items()} for way in ("auto", "plain")]
    assert ranks[0] == ranks[1]


def test_what_has_no_inputs_is_decomposed_by_its_weights(
    pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    base, tuned = pair
    modules = ("embed_tokens", "q_proj", "lm_head")
    for name, given in (("plain", {}), ("aware", {"calibration": str(text)})):
        report = extract(base, tuned, tmp_path / name, targeted_modules=modules, rest=Rest.skip, **given)
    told = [finding.text for finding in report.plan.findings]
    assert any(t.startswith("model.embed_tokens.weight has no inputs to weigh (1") for t in told)
    plain, aware = tensors(tmp_path / "plain"), tensors(tmp_path / "aware")
    for key, tensor in plain.items():
        assert torch.equal(tensor, aware[key]) == ("embed_tokens" in key), key
    assert "outputs_captured" not in facts_of(tmp_path / "aware")["model.embed_tokens.weight"]
    assert "outputs_captured" in facts_of(tmp_path / "aware")["lm_head.weight"]


def noisy_pair(folder: Path, model: Any) -> tuple[Path, Path]:
    save(model, folder / "base")
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save(model, folder / "tuned")
    return folder / "base", folder / "tuned"


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=256, n_positions=66))


def test_kernels_whose_rows_are_inputs(tmp_path: Path, text: Path) -> None:
    torch.manual_seed(0)
    base, tuned = noisy_pair(tmp_path, gpt2())
    settings = {"targeted_modules": ("attn", "mlp"), "calibration": str(text)}
    report = extract(base, tuned, tmp_path / "out", **settings)
    assert report.passed
    before, after, factors = tensors(base), tensors(tuned), tensors(tmp_path / "out")
    module = "transformer.h.1.mlp.c_fc"
    X = inputs_of(tuned, module, text.read_text(), 2048).double()
    C = X.T @ X / (X.T @ X).diagonal().mean() + 0.01 * torch.eye(32)
    L = torch.linalg.cholesky(C)
    D = (after[f"{module}.weight"] - before[f"{module}.weight"]).double().T
    A, B = (factors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
    best = torch.linalg.svdvals(D @ L)[4:].norm()
    assert float(((D - B @ A) @ L).norm()) < float(best) * (1 + FLOAT32_SUM)
    extract(base, tuned, tmp_path / "all", **{**settings, "rank": Energy(1 - 1e-9)})
    wanted = log_probabilities(AutoModelForCausalLM.from_pretrained(tuned))
    moved = (wanted - log_probabilities(AutoModelForCausalLM.from_pretrained(base))).abs().max()
    found = log_probabilities(with_adapter(base, tmp_path / "all"))
    assert float((found - wanted).abs().max()) < FLOAT32_FORWARD * float(moved)


def test_experts_have_no_inputs_of_their_own_here(tmp_path: Path, text: Path) -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=3))
    base, tuned = noisy_pair(tmp_path, model)
    report = extract(base, tuned, tmp_path / "out", rank=3, targeted_modules=None, calibration=str(text))
    assert report.passed
    [told] = [f.text for f in report.plan.findings if "no inputs to weigh" in f.text]
    assert "bare parameter, embedding); decomposed by weights alone" in told


def test_an_adapter_is_shrunk_by_its_outputs(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    base, tuned = pair
    extract(base, tuned, tmp_path / "large", rank=12)
    report = extract(
        base, None, tmp_path / "small", adapter=tmp_path / "large", rank=3, calibration=str(text)
    )
    assert report.passed
    assert all(said["outputs_captured"] > 0 for said in facts_of(tmp_path / "small").values())


def test_a_claim_that_the_files_do_not_keep_fails(
    pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    stages: Any = stage.STAGES
    extraction = svd(*pair, tmp_path / "out", calibration=str(text))
    base = stages["dequantize"]["auto"]()(stages["load"]["safetensors"](base_model=str(pair[0]))())
    extraction.check()
    adapter = extraction()
    merged = stages["merge"]["exact"](merge_dtype=FloatDtype.float32, names={})(base, adapter)
    made = adapter.parts[0].extraction
    gate, shares = outputs.recomputed(made, merged)
    assert gate.status is Status.passed
    for name, share in shares.items():
        assert abs(share - made.facts[name][outputs.HELD]) < FLOAT32_SUM
    first = next(iter(made.facts))
    lie = {**made.facts[first], outputs.HELD: made.facts[first][outputs.HELD] + 0.01}
    gate, _ = outputs.recomputed(replace(made, facts={**made.facts, first: lie}), merged)
    assert gate.status is Status.failed
    assert first in gate.seen


def test_harm_is_told() -> None:
    facts = {
        "a": {"rank": 4, "captured": 0.5, outputs.HELD: 0.7, outputs.PLAIN: 0.6},
        "b": {"rank": 4, "captured": 0.5, outputs.HELD: 0.5, outputs.PLAIN: 0.8},
        "no inputs": {"rank": 4, "captured": 0.5},
    }
    summary, harm = (finding.text for finding in outputs.told(facts))
    assert "outputs of 2 modules, on text held out, 60.00% is kept, and 70.00% would be" in summary
    assert harm.startswith(
        "by weights alone more of the outputs of b would be kept (80.00% instead of 50.00%, 1"
    )
    assert outputs.told({"no inputs": facts["no inputs"]}) == []


def test_the_text_is_recorded_by_its_hash(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    import hashlib

    extract(*pair, tmp_path / "out", calibration=str(text))
    inputs = json.loads((tmp_path / "out/merge.json").read_text())["inputs"]
    assert hashlib.sha256(text.read_bytes()).hexdigest() in [one["sha256"] for one in inputs]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no file": ({"calibration": "nowhere.txt"}, "extract.calibration: 'nowhere.txt' cannot be read as text"),
    "shrinkage": ({"shrinkage": 0.0}, "extract.shrinkage: 0.0 is not a share above 0 and up to 1"),
    "no tokens": ({"calibration_tokens": 0}, "extract.calibration_tokens: 0 is not a number of tokens"),
    "few tokens": (
        {"calibration_tokens": 64},
        r"extract.calibration: 64 tokens of '.*' are too few for model.layers.\d.mlp.down_proj with its 96 "
        r"inputs; \d+ are needed, one of 8 to judge by: raise extract.calibration_tokens",
    ),
    "memory": (
        {"memory_limit": 1000},
        "extract.calibration: the fine-tune in float32 and what it sees take ",
    ),
    "nothing linear": (
        {"targeted_modules": ("embed_tokens",)},
        "extract.calibration: no module that gets a low rank is linear; leave it out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_requests_are_refused_before_anything_is_written(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, case: str
) -> None:
    settings, sentence = REFUSED[case]
    with pytest.raises(Refused, match=sentence):
        extract(*pair, tmp_path / "out", **{"calibration": str(text), **settings})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.txt"]


def test_a_text_that_is_too_short_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for words, sentence in (
        ("a few words " * 20, r"are too few for .*: give more text"),
        (" \n", "is empty"),
    ):
        (tmp_path / "short.txt").write_text(words)
        with pytest.raises(Refused, match=sentence):
            extract(*pair, tmp_path / "out", calibration=str(tmp_path / "short.txt"))


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, text: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    base, tuned = noisy_pair(tmp_path, model)
    for folder in (base, tuned):
        for path in folder.glob("tokenizer*"):
            path.unlink()
    with pytest.raises(Refused, match=r"extract.calibration: the fine-tune.* tokenizer"):
        extract(base, tuned, tmp_path / "out", calibration=str(text))


def test_a_dry_run_reads_no_text(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    settings = {"calibration": str(text), "calibration_tokens": 64, "dry_run": True}
    part = svd(*pair, tmp_path / "out", **settings).plan().parts[0]
    plain = svd(*pair, tmp_path / "out", dry_run=True).plan().parts[0]
    assert part.extraction.memory > plain.extraction.memory
    with pytest.raises(Refused, match="the fine-tune in float32"):
        svd(*pair, tmp_path / "out", memory_limit=1000, **settings).plan()


DRY = """
import sys
from pipeline.__main__ import main
status = main()
heavy = {"torch", "transformers", "peft", "tokenizers"} & set(sys.modules)
sys.stderr.write(f"status {status} imported {sorted(heavy)}")
"""


def test_a_dry_run_of_it_imports_nothing_heavy(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    request = [f"base_model={pair[0]}", f"finetune={pair[1]}", "output=out", "rank=4", "dry_run=true"]
    code = [sys.executable, "-c", DRY, "recipe=extract", *request, f"extract.calibration={text}"]
    said = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert said.stderr.endswith("status 0 imported []"), said
