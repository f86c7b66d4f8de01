"""Verification says yes to what is right, and names what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.ground.errors import PipelineError
from pipeline.ground.report import Report, Status
from tests.models import LINEAR, merged_by_peft, tensors, write_llama, write_lora
from tests.running import merge
from tests.tolerance import FLOAT32_KL

# Without logits, which need half a minute of imports and models; those have tests of their own.
FILES_ONLY = {"tokens": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, an adapter, and a sound merge of them."""
    folder = tmp_path_factory.mktemp("made")
    base = write_llama(folder / "base", shard="1GB")
    adapter = write_lora(folder / "adapter", base)
    merge(base, adapter, folder / "merged")
    return base, adapter, folder / "merged"


def verify(base: Path, adapter: Path, merged: Path, **settings: object) -> Report:
    return merge(
        base, adapter, merged, save="existing", verify="standard", verify_settings={**FILES_ONLY, **settings}
    )


def gates(report: Report) -> dict[str, Status]:
    return {gate.name: gate.status for gate in report.gates}


def test_a_sound_merge_passes_every_gate(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = made
    report = merge(base, adapter, tmp_path / "out", verify="standard")
    names = ["structure", "untouched", "converted", "retraced", "rounding", "effect", "retained", "logits"]
    names += ["divergence", "tail", "same token", "probabilities"]
    assert gates(report) == dict.fromkeys(names, Status.passed)
    assert report.logits is not None
    assert 0 < report.logits["kl_mean"] < 1e-3 * report.logits["kl_adapter_base"]
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["passed"] is True
    assert written["logits"]["ratio"] == report.logits["ratio"]
    assert {g["name"]: g["status"] for g in written["gates"]} == dict.fromkeys(names, "passed")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_existing_merge_of_any_dtype_passes(
    made: tuple[Path, Path, Path], tmp_path: Path, dtype: str
) -> None:
    base, adapter, _ = made
    merge(base, adapter, tmp_path / "out", dtype=dtype)
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir())
    assert verify(base, adapter, tmp_path / "out").passed
    assert sorted(p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()) == before


def test_what_peft_merged_passes(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = made
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    assert verify(base, adapter, tmp_path / "peft").passed


def spoil(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoiled(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return spoiled


Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a weight is gone": (spoil(lambda s: s.pop(NORM)), "structure", f"{NORM} is missing"),
    "a foreign weight": (spoil(lambda s: s.update(x=torch.ones(1))), "structure", "x is not the base's"),
    "another shape": (spoil(lambda s: s.update({NORM: torch.ones(3)})), "structure", NORM),
    "no config": (lambda folder: (folder / "config.json").unlink(), "structure", "config.json is missing"),
    "an untouched weight changed": (spoil(lambda s: s[NORM].add_(0.01)), "untouched", f"{NORM} differs"),
    "one element off": (spoil(lambda s: s[Q][3, 5].add_(0.01)), "rounding", f"too far off, the worst in {Q}"),
    "twice the adapter": (spoil(lambda s: s[Q].add_(0.05)), "rounding", Q),
    "a weight is not finite": (spoil(lambda s: s[Q][0, 0].fill_(torch.nan)), "rounding", Q),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(made: tuple[Path, Path, Path], tmp_path: Path, name: str) -> None:
    base, adapter, merged = made
    damage, gate, said = DAMAGE[name]
    folder = shutil.copytree(merged, tmp_path / "out")
    damage(folder)
    with pytest.raises(PipelineError) as refused:
        verify(base, adapter, folder)
    assert f": {gate}: " in str(refused.value)
    assert said in str(refused.value)


def test_a_merge_without_effect_is_refused(made: tuple[Path, Path, Path]) -> None:
    base, adapter, _ = made
    with pytest.raises(PipelineError, match="rounding"):
        verify(base, adapter, base)


def test_doubly_rounded_weights_are_refused(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """PEFT's safe_merge rounds the delta to bfloat16 first."""
    base, adapter, merged = made
    folder = shutil.copytree(merged, tmp_path / "out")
    state = merged_by_peft(base, adapter, safe_merge=True)
    assert any(not torch.equal(state[n], t) for n, t in tensors(merged).items())
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PipelineError, match="rounding"):
        verify(base, adapter, folder)


def test_a_swallowed_adapter_is_refused_and_set_aside(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    adapter = write_lora(tmp_path / "adapter", base, size=5e-4)  # below half a unit almost everywhere
    with pytest.raises(PipelineError, match=r"retained: 0\.\d+ of the delta; save.dtype=float16 or float32"):
        merge(base, adapter, tmp_path / "out", verify="standard", verify_settings=FILES_ONLY)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    report = json.loads((tmp_path / "out.rejected" / "report.json").read_text())
    assert report["passed"] is False
    merge(
        base, adapter, tmp_path / "out", verify="standard", verify_settings={**FILES_ONLY, "min_retained": 0}
    )


def test_a_target_that_does_not_change_fails(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    adapter = write_lora(tmp_path / "adapter", base, size=1e-5)
    with pytest.raises(PipelineError, match="effect: 0 of 14 merged weights changed"):
        merge(base, adapter, tmp_path / "out", verify="structure")


def test_a_delta_of_zero_is_a_finding(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    adapter = write_lora(tmp_path / "adapter", base)
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    state["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].zero_()
    save_file(state, path, {"format": "pt"})
    report = merge(base, adapter, tmp_path / "out", verify="standard", verify_settings=FILES_ONLY)
    assert any("the delta of model.layers.0.mlp.up_proj.weight is zero" in f.text for f in report.findings)


def test_logits_tell_another_base(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Merged exactly, but verified against another base: only the forward pass is asked here."""
    from pipeline.ground.logits import compare
    from pipeline.ground.merge_logits import Merge
    from pipeline.ground.predicting import InMemory

    base, adapter, merged = made
    other = write_llama(tmp_path / "other", shard="1GB")
    state = load_file(other / "model.safetensors")
    for name in state:
        state[name] += 0.003 * torch.randn_like(state[name])
    save_file(state, other / "model.safetensors", {"format": "pt"})

    def load(folder: Path) -> Callable[[type], torch.nn.Module]:
        return lambda cls: cls.from_pretrained(folder, dtype=torch.float32)  # type: ignore[attr-defined,no-any-return]

    def ratio(base: Path, factor: float = 1.0) -> list[float]:
        models = Merge(merged, [(adapter, factor)], load(base), load(merged))
        found: list[float] = compare(models, "", 256, (), InMemory("cpu")).figures["ratio_interval"]
        return found

    assert ratio(base)[1] < 0.01 < ratio(other)[0]
    assert ratio(base, 0.5)[0] > 0.01  # the factor reaches the unmerged adapter


def test_divergence_is_torchs_own() -> None:
    from pipeline.ground.divergence import compared

    torch.manual_seed(0)
    p, q, r = (torch.randn(100, 11).log_softmax(-1) for _ in range(3))
    found = compared(p, q, r)
    kl = torch.nn.functional.kl_div(r.double(), p.double(), log_target=True, reduction="none").sum(-1)
    assert found["kl_mean"] == pytest.approx(float(kl.mean()), rel=FLOAT32_KL)
    assert found["kl_max"] == pytest.approx(float(kl.max()), rel=FLOAT32_KL)
    low, high = found["ratio_interval"]
    assert low < found["ratio"] < high
    assert found["top1_agreement"] == float((p.argmax(-1) == r.argmax(-1)).double().mean())


def test_a_text_of_ones_own_is_what_logits_are_compared_on(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, merged = made
    from pipeline.ground.errors import Refused

    for text, said in (
        (tmp_path / "none.txt", "cannot be read as text"),
        (tmp_path / "empty.txt", "is empty"),
    ):
        (tmp_path / "empty.txt").write_text(" \n")
        with pytest.raises(Refused, match=said):
            verify(base, adapter, merged, text=str(text))
    (tmp_path / "own.txt").write_text("words of mine")
    from pipeline.verification.comparing import read_text

    assert read_text(str(tmp_path / "own.txt")) == "words of mine"


def test_logits_that_do_not_fit_are_skipped_with_a_finding(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, _ = made
    settings = {"tokens": 128, "memory_limit": 1000}
    report = merge(base, adapter, tmp_path / "out", verify="standard", verify_settings=settings)
    assert gates(report)["logits"] is Status.skipped
    assert any("logits were not compared: that takes" in f.text for f in report.findings)


def test_a_classifier_compares_its_class_logits(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        num_labels=3, pad_token_id=0,
    )  # fmt: skip
    base = LlamaForSequenceClassification(config)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=LINEAR, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify="standard")
    assert gates(report)["logits"] is Status.passed
    assert report.logits is not None and report.logits["kl_adapter_base"] > 0


def test_a_model_without_a_head_compares_hidden_states(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    base = BertModel(config)
    base.save_pretrained(tmp_path / "base")
    options = {"r": 2, "target_modules": ["query", "value"], "init_lora_weights": False}
    get_peft_model(base, LoraConfig(**options)).save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify="standard")
    assert gates(report)["logits"] is Status.passed


def test_a_merged_model_that_does_not_load_fails(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, merged = made
    folder = shutil.copytree(merged, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_type": "nonsense"}}))
    with pytest.raises(PipelineError, match="logits: the merged model does not run"):
        verify(base, adapter, folder, tokens=64)


def test_files_changed_since_they_were_published_are_told(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, merged = made
    folder = shutil.copytree(merged, tmp_path / "out")
    assert gates(verify(base, adapter, folder))["hashes"] is Status.passed
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(PipelineError, match=r"hashes: generation_config.json is another file"):
        verify(base, adapter, folder)


def test_stray_shards_do_not_stand_in_for_those_of_the_index(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    adapter = write_lora(tmp_path / "adapter", base)
    merge(base, adapter, tmp_path / "out")
    (tmp_path / "out" / "merge.json").unlink()
    for shard in sorted((tmp_path / "out").glob("*.safetensors")):
        shutil.copyfile(shard, shard.with_name(f"z_{shard.name}"))
        state = load_file(shard)
        save_file({n: t + 1 for n, t in state.items()}, shard, {"format": "pt"})
    with pytest.raises(PipelineError, match="untouched"):
        verify(base, adapter, tmp_path / "out")


def test_code_of_a_model_is_never_run(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """transformers would ask on the terminal, and take a yes."""
    import subprocess
    import sys

    base, adapter, _ = made
    folder, mark = shutil.copytree(base, tmp_path / "base"), tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass EvilTok: pass\n")
    auto = {"tokenizer_class": "EvilTok", "auto_map": {"AutoTokenizer": ["evil.EvilTok", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(auto))
    request = [f"base_model={folder}", f"adapter={adapter}", f"output={tmp_path / 'out'}", "verify.tokens=64"]
    command = [sys.executable, "-m", "pipeline", *request]
    done = subprocess.run(command, input="y\ny\ny\n", capture_output=True, text=True, check=False)
    assert not mark.exists()
    assert done.returncode == 0, done.stderr


def test_no_memory_for_the_merged_model_is_not_its_fault(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.ground.predicting import InMemory, View

    base, adapter, _ = made
    calls: list[int] = []
    real = InMemory.predictions

    def second_fails(form: InMemory, model: object, views: Sequence[View], what: str) -> list[torch.Tensor]:
        calls.append(1)
        if len(calls) == 2:  # after base and adapter
            raise torch.OutOfMemoryError("no memory")
        return real(form, model, views, what)

    monkeypatch.setattr(InMemory, "predictions", second_fails)
    report = merge(base, adapter, tmp_path / "out", verify="standard", verify_settings={"tokens": 64})
    assert gates(report)["logits"] is Status.skipped
