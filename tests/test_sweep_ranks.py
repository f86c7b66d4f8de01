"""Sweeps over ranks of an extraction, and the search for the smallest adapter that is near enough."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.plugins import Plugins
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline import recipe_source
from pipeline.bisection import axis, bisect
from pipeline.ground import finetune_logits
from pipeline.ground.leaderboard import Row, best, verdict
from tests.command import answer

LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and `tuned`: its linear layers moved by matrices of rank 6 whose later directions are weak."""
    folder, before = tmp_path_factory.mktemp("pair"), torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    model.save_pretrained(folder / "base")
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            rows, columns = parameter.shape
            fading = 0.5 ** torch.arange(6.0)
            parameter.data += 0.2 * (torch.randn(rows, 6) * fading) @ torch.randn(6, columns) / columns**0.5
    model.save_pretrained(folder / "tuned")
    yield folder
    torch.set_num_threads(before)


def swept(pair: Path, output: Path, *more: str) -> dict[str, dict[str, str]]:
    """The leaderboard's lines of a sweep over ranks, by the runs' names."""
    request = ("recipe=extract", "base_model=base", "finetune=tuned", "verify.tokens=64")
    said = answer("-m", *request, f"output={output}", *more, cwd=pair)
    assert said.status == 0, said
    return {line["run"]: line for line in csv.DictReader((output / "sweep.csv").open())}


@pytest.mark.parametrize("form", ["never", "always"])
def test_ranks_are_compared_by_what_they_hold_and_how_near_they_come(
    form: str, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: Counter[str] = Counter()
    real, text = finetune_logits.outputs, tmp_path / "text.txt"
    text.write_text("one two three " * 50)

    def spied(*told: Any) -> torch.Tensor:
        loaded.update([told[-1]])
        return real(*told)

    monkeypatch.setattr(finetune_logits, "outputs", spied)
    lines = swept(pair, tmp_path / "out", "rank=1,2,4", f"verify.text={text}", f"verify.layerwise={form}")
    assert loaded == {"extracted model": 3, "base": 1, "fine-tune": 1}
    assert set(lines) == {"rank=1", "rank=2", "rank=4"}
    for key, order in (("captured", 1), ("size", 1), ("ratio", -1), ("kl", -1)):
        values = [order * float(lines[f"rank={rank}"][key]) for rank in (1, 2, 4)]
        assert values == sorted(set(values)), key
    assert 0.9 < float(lines["rank=4"]["captured"]) < 1
    for rank in (1, 2, 4):
        file = tmp_path / "out" / f"rank={rank}" / "adapter_model.safetensors"
        assert float(lines[f"rank={rank}"]["size"]) == file.stat().st_size
        assert float(lines[f"rank={rank}"]["loss"]) > 0
        assert float(lines[f"rank={rank}"]["memory"]) > 0
    assert {"ratio", "kl", "captured"} <= set(lines["rank=4"]["best_by"].split())
    assert "size" in lines["rank=1"]["best_by"].split()
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert "Best: rank=4, by its KL ratio." in page
    assert ">captured<" in page


def test_bisection_finds_the_smallest_adapter_that_is_near_enough(pair: Path, tmp_path: Path) -> None:
    ranks = [1, 2, 3, 4, 6]
    every = swept(pair, tmp_path / "all", f"rank={','.join(map(str, ranks))}")
    ratios = {rank: float(every[f"rank={rank}"]["ratio"]) for rank in ranks}
    under = ratios[3]
    assert next(rank for rank in ranks if ratios[rank] <= under) == 3
    found = swept(
        pair, tmp_path / "few", f"rank={','.join(map(str, ranks))}", f"sweep.under={under}", "sweep.keep=best"
    )
    assert {"rank=2", "rank=3"} <= set(found)
    assert len(found) <= 3
    assert [p.parent.name for p in (tmp_path / "few").glob("*/adapter_model.safetensors")] == ["rank=3"]
    assert {run: line["ratio"] for run, line in found.items()} == {run: every[run]["ratio"] for run in found}
    assert "the smallest whose KL ratio is at most" in (tmp_path / "few" / "sweep.html").read_text()


@given(st.integers(1, 40), st.data())
def test_bisection_tries_the_first_that_is_near_enough_and_the_one_before(
    count: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, count))
    broken = data.draw(st.sets(st.integers(0, count - 1)))
    tried: list[int] = []

    def near_enough(value: str) -> bool | None:
        tried.append(int(value))
        return None if int(value) in broken else int(value) >= first

    bisect([str(n) for n in range(count)], near_enough)
    whole = [n for n in range(count) if n not in broken]
    assert len(tried) == len(set(tried))
    assert len(set(tried) - broken) <= count.bit_length()
    above = [n for n in whole if n >= first]
    assert not above or above[0] in tried
    below = [n for n in whole if n < first]
    assert not below or below[-1] in tried


def test_one_key_with_numbers_is_searched_and_nothing_else() -> None:
    assert axis({"rank": ["8", "16", "2"], "save.dtype": ["float16"]}) == ("rank", ["2", "8", "16"])
    assert axis({"rank": ["8", "16"], "alpha": ["1", "2"]}) is None
    assert axis({"rank": ["8", "{energy:0.9}"]}) is None
    assert axis({}) is None


def test_the_best_is_the_smallest_that_is_near_enough() -> None:
    rows = [
        Row("a", "verified", "", {"ratio": 0.2, "size": 1.0}),
        Row("b", "verified", "", {"ratio": 0.009, "size": 2.0}),
        Row("c", "verified", "", {"ratio": 0.001, "size": 4.0}),
        Row("d", "refused", "why", {"ratio": 0.001, "size": 0.5}),
    ]
    chosen = [getattr(best(rows, under), "run", None) for under in (None, 0.01, 0.005, 1e-9)]
    assert chosen == ["c", "b", "c", "c"]
    assert verdict(rows, 1e-9) == ["No run has a KL ratio of at most 1e-09; c comes nearest."]
    assert verdict(rows[3:], None) == []


def test_a_run_tells_the_sweeper_what_to_make_small(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    launcher: Any = Plugins.instance().class_name_to_class[LAUNCHER]
    real = launcher.launch

    def launch(self, *arguments, **named):  # type: ignore[no-untyped-def]
        returns = real(self, *arguments, **named)
        told.extend(r.return_value for r in returns)
        return returns

    monkeypatch.setattr(launcher, "launch", launch)
    lines = swept(pair, tmp_path / "ratios", "rank=2,4,2")
    assert told[:2] == [float(lines[f"rank={rank}"]["ratio"]) for rank in (2, 4)]
    assert told[2] == told[0]  # asked for again, and not run again
    told.clear()
    under = f"sweep.under={(float(lines['rank=2']['ratio']) + float(lines['rank=4']['ratio'])) / 2}"
    chosen = "hydra/sweeper=basic"  # a sweeper that is asked for does the choosing: no bisection
    lines = swept(pair, tmp_path / "sizes", "rank=2,4", under, chosen)
    assert told == [float("inf"), float(lines["rank=4"]["size"])]


def test_the_bundled_sweep_over_ranks_is_a_search() -> None:
    [(key, ranks)] = recipe_source.axes("sweep-ranks").items()
    assert key == "rank"
    assert axis({key: [str(rank) for rank in ranks]}) is not None
    assert recipe_source.under("sweep-ranks") is not None
