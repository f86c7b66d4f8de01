"""What models are asked beside logits: prompts side by side, text in stretches, figures over all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline.ground.html import report_page
from pipeline.verification import comparing
from tests.models import write_llama, write_lora
from tests.running import merge

Made = tuple[Path, Path]
CHAT = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A base whose tokenizer knows bytes, with a chat template, and an adapter."""
    folder = tmp_path_factory.mktemp("made")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base = write_llama(folder / "base", shard="1GB", vocab_size=len(alphabet), max_position_embeddings=256)
    tokenizer.save(str(base / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT}
    (base / "tokenizer_config.json").write_text(json.dumps(about))
    return base, write_lora(folder / "adapter", base)


def test_every_prompt_is_answered_by_all_three_and_shown(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"tokens": 128, "prompts": ["one <b>?", "two?"]}
    asked = {"verify": "standard", "verify_settings": settings}
    report = merge(*made, tmp_path / "out", dtype="float32", **asked)
    assert report.answers is not None
    assert [said["prompt"] for said in report.answers] == ["one <b>?", "two?"]
    for said in report.answers:
        assert set(said) == {"prompt", "base", "adapter", "merged"}
        assert said["merged"] == said["adapter"]
    written = json.loads((tmp_path / "out" / "report.json").read_text())["answers"]
    assert written == [dict(said) for said in report.answers]
    page, shown = report_page(report), capsys.readouterr().out
    for prompt in ("one &lt;b&gt;?", "two?"):
        assert prompt in page
    assert shown.count("answers\n") == 2
    assert "one <b>?" in shown


def test_one_prompt_may_stand_without_a_list_and_goes_through_the_chat_template(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    asked: list[list[int]] = []
    real = LlamaForCausalLM.generate
    tokenizer = PreTrainedTokenizerFast.from_pretrained(made[0])

    def generate(self: object, *args: object, input_ids: torch.Tensor, **named: object) -> object:
        asked.append(input_ids[0].tolist())
        return real(self, *args, input_ids=input_ids, **named)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    settings = {"tokens": 64, "prompts": "why so?"}
    report = merge(*made, tmp_path / "out", verify="standard", verify_settings=settings)
    assert report.answers is not None
    assert [said["prompt"] for said in report.answers] == ["why so?"]
    assert asked == [tokenizer("[why so?]")["input_ids"]] * 3


def test_text_in_stretches_gives_the_same_figures(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"tokens": 1024, "prompts": "a"}
    merge(*made, tmp_path / "out")
    asked = {"save": "existing", "verify": "standard", "verify_settings": settings}
    whole = merge(*made, tmp_path / "out", **asked)
    monkeypatch.setattr(comparing, "_HELD", 1)  # a sequence at a time
    parts = merge(*made, tmp_path / "out", **asked)
    assert whole.logits is not None
    assert parts.logits is not None
    assert whole.logits["tokens"] == parts.logits["tokens"] == 1024
    same = whole.logits.keys() - {"kl_floor", "peak_memory"}
    assert {key: parts.logits[key] for key in same} == {key: whole.logits[key] for key in same}
    assert parts.answers == whole.answers


def test_a_text_that_ends_early_is_compared_to_its_end_and_told(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("abcdefgh" * 100)
    monkeypatch.setattr(comparing, "_HELD", 1)
    settings = {"tokens": 1024, "text": str(tmp_path / "text")}
    report = merge(*made, tmp_path / "out", verify="standard", verify_settings=settings)
    assert report.logits is not None
    assert report.logits["tokens"] == 6 * 128 + 32
    assert "logits were compared on 800 tokens, all that the text has" in [f.text for f in report.findings]


def test_thorough_asks_several_things_and_ten_thousand_tokens_unless_told_otherwise() -> None:
    from pipeline.stages.verify.standard import Standard
    from pipeline.stages.verify.thorough import PROMPTS, Thorough

    asked = Thorough(device="cpu").asked()
    assert asked.tokens >= 10_000
    assert asked.prompts == PROMPTS
    assert len(PROMPTS) > 1
    assert Thorough(device="cpu", prompts=[]).asked().prompts == ()
    assert Thorough(device="cpu", prompts="x").asked().prompts == ("x",)
    assert Standard(device="cpu").asked().prompts == ()
