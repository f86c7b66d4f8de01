"""report.html: what it must show, that it needs nothing else, and that no text becomes markup."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.ground import charts, markup
from pipeline.ground.html import report_page
from pipeline.ground.html_record import as_yaml
from pipeline.ground.html_weights import grid, place
from pipeline.ground.report import Action, Finding, Gate, Plan, PlannedWeight, Report, Status
from tests.browser import opened

pytestmark = pytest.mark.draws

EVIL = "<script>alert(1)</script>\"'&$x$"
SHA = "0123456789abcdef" * 4


def facts(retained: float) -> dict[str, Any]:
    spread = {"min": -1.0, "max": 1.5, "mean": 0.0, "std": 0.2}
    return {
        "retained": retained,
        "relative_norm": 0.01 * retained,
        "changed_fraction": 0.7,
        "worst_ulp": 0.49,
        "ulps": [9] * 10 + [1, 0],
        "before": spread,
        "after": spread,
    }


def report(status: Status = Status.passed, extra: str = "") -> Report:
    names = [f"model.layers.{n}.self_attn.{m}{extra}.weight" for n in range(3) for m in ("q_proj", "v_proj")]
    weights = tuple(PlannedWeight(n, (4, 4), "BF16", 32, Action.merged, "BF16", ("LoRA",)) for n in names)
    plan = Plan(f"base{extra}", f"adapter{extra}", "out", "bfloat16", "float32", weights, {"m": 9}, 9, 9, 9)
    logits = {
        "ratio": 0.002,
        "ratio_interval": [0.001, 0.003],
        "top1_agreement": 0.995,
        "kl_mean": 1e-5,
        "kl_adapter_base": 5e-3,
        "kl_along": [1e-5, 2e-5, 1e-6],
        "tokens": 512,
    }
    origin = {"name": f"base{extra}", "repo": None, "commit": None}
    file = {"name": f"model{extra}.safetensors", "num_bytes": 2048, "sha256": SHA}
    return Report(
        plan,
        (Gate("rounding", status, f"worst 0.5{extra}", "half a unit"),),
        findings=(Finding(f"something to know{extra}"),),
        weights={name: facts(0.9 + 0.01 * n) for n, name in enumerate(names)},
        logits=logits,
        answers=[{"prompt": f"why{extra}?", "base": f"so{extra}", "adapter": "arr", "merged": f"arr{extra}"}],
        save={"seconds": 1.0, "peak_memory": 10**9, "bytes": 2048},
        manifest={
            "base": origin,
            "adapters": [{**origin, "weight": 1.0}],
            "inputs": [{**file, "of": "base"}],
            "outputs": [file],
        },
        seconds=2.0,
        stages={"merge": "exact"},
        request={"merge": {"weight": 1.0}, f"names{extra}": {"from": f"to{extra}"}},
        versions={"lora-pipeline": "0.1", "torch": "2.13"},
        stands_at=Path("out"),
    )


class Reading(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attributes if k.endswith(("href", "src")) or k.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_verdict_charts_answers_hashes_recipe_and_versions() -> None:
    page = Reading(report_page(report()))
    assert page.text.index("adapter merged into base") < page.text.index("Gates")
    for shown in ("Verified", "0.002", SHA, "weight: 1.0", "2.13", "something to know", "why?", "arr"):
        assert shown in page.text
    assert page.tags.count("svg") == 5


def test_the_page_needs_no_other_file_and_runs_nothing() -> None:
    page = Reading(report_page(report()))
    assert not {"script", "link", "iframe", "object", "form", "a"} & set(page.tags)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)


def test_a_refused_merge_says_why_before_anything_else() -> None:
    page = Reading(report_page(report(Status.failed)))
    assert page.text.index("Refused") < page.text.index("worst 0.5; wanted half a unit")
    assert page.text.index("worst 0.5; wanted half a unit") < page.text.index("Gates")


def test_no_text_of_models_and_adapters_becomes_markup() -> None:
    shown = report_page(report(extra=EVIL))
    page, plain = Reading(shown), Reading(report_page(report()))
    assert "script" not in page.tags
    assert [t for t in page.tags if t != "path"].count("svg") == plain.tags.count("svg")
    assert set(page.tags) <= set(plain.tags)
    assert page.text.count("<script>alert(1)</script>") > 15
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)


def test_what_went_in_stands_before_the_gates_with_its_hashes() -> None:
    page = Reading(report_page(report())).text
    assert page.index("What went in") < page.index(SHA) < page.index("Gates")
    assert "org/base at 0123abc" in Reading(report_page(of_the_hub())).text


def of_the_hub() -> Report:
    base = {"name": "base", "repo": "org/base", "commit": "0123abc"}
    return replace(report(), manifest={**report().manifest, "base": base})


def test_an_extraction_shows_what_is_held_and_is_called_one() -> None:
    weights = tuple(replace(w, action=Action.extracted) for w in report().plan.weights)
    held = {"rank": 4, "residual": 0.1, "noise_share": 0.0, "largest": 1.0, "noise_edge": 0.1, "energy": 2.0}
    logits = {
        "kl_finetune_extracted": 1e-5,
        "kl_finetune_base": 1e-2,
        "ratio": 0.001,
        "ratio_interval": [0.0009, 0.0011],
        "top1_agreement": 0.975,
        "tokens": 512,
    }
    facts = {w.name: {**held, "captured": 0.9, "rank": 4 + n % 2} for n, w in enumerate(weights)}
    made = replace(
        report(),
        plan=replace(report().plan, weights=weights),
        weights={},
        logits=None,
        extraction={"weights": facts, "logits": logits},
    )
    page = Reading(report_page(made))
    assert "adapter as an adapter for base" in page.text
    assert "merged into" not in page.text
    for shown in ("of the difference is held90.00%", "97.50%", "What the adapter holds of the fine-tune"):
        assert shown in page.text
    assert page.tags.count("svg") == 3  # held, size, ranks
    assert list(made.plots) == ["captured", "energy", "rank"]


def test_twice_the_delta_does_not_look_like_all_of_it() -> None:
    def cells(value: float) -> set[str]:
        drawing = charts.drawn("x", partial(charts.shares, ["0"], ["q"], [[value]], "")) or ""
        [mesh] = re.findall(r'<g id="x-QuadMesh_1">(.*?)</g>', drawing, re.DOTALL)
        return set(re.findall(r"fill: (#\w+)", mesh))

    assert cells(1.0) == cells(1.01) == {"#fde725"}
    reddest, [twice] = (0x80, 0x00, 0x26), cells(2.0)
    assert tuple(bytes.fromhex(twice[1:])) == reddest
    assert cells(0.0) == {"#440154"}


def test_the_caption_says_from_where_to_where_shares_go() -> None:
    assert "by layer and module: 0.9 to 0.95" in Reading(report_page(report())).text


def test_points_that_cover_each_other_share_a_label() -> None:
    named = [("a", 1.0, 0.1), ("b", 1.0, 0.1), ("c", 2.0, 0.2)]
    shown = charts.drawn("x", partial(charts.points, named, "", "")) or ""
    assert ">1, 2</text>" in shown
    assert ">3</text>" in shown


def test_a_manifest_that_somebody_else_wrote_breaks_no_page() -> None:
    for manifest in ({"inputs": "x", "base": [], "adapters": {}}, {"outputs": [1, {}], "tool": 3}):
        assert "<h1>" in report_page(replace(report(), manifest=manifest))


def test_what_cannot_be_drawn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> str:
        raise RuntimeError

    monkeypatch.setattr(charts, "_cells", broken)
    assert Reading(report_page(report())).text.count("this chart could not be drawn") == 2


def test_experts_of_a_layer_are_one_cell_which_shows_the_least() -> None:
    weights = {
        f"model.layers.1.mlp.experts.{n}.up_proj.weight": {"retained": 0.9 + n / 100} for n in (1, 0, 2)
    }
    weights |= {
        "model.layers.0.self_attn.q_proj.weight": {"retained": 1.0},
        "lm_head.weight": {"retained": 0.5},
    }
    layers, modules, values = grid(weights, "retained")
    assert (layers, modules) == (["0", "1", "other"], ["up_proj", "q_proj", "lm_head"])
    assert values == [[None, 1.0, None], [0.9, None, None], [None, None, 0.5]]
    assert place("transformer.h.3.attn.c_attn.weight") == ("3", "attn.c_attn")


def test_modules_of_the_same_last_name_stay_apart() -> None:
    weights = {f"m.0.{part}.q_proj.weight": {"retained": 1.0} for part in ("self_attn", "cross_attn")}
    assert grid(weights, "retained")[1] == ["self_attn.q_proj", "cross_attn.q_proj"]


def test_control_characters_are_shown_as_escapes() -> None:
    assert markup.text("a\x00\x1b[31m<") == "a\\x00\\x1b[31m&lt;"


def test_a_recipe_is_written_as_people_write_it() -> None:
    assert as_yaml({"merge": {"weight": 1.0}, "rank": 8}) == "merge:\n  weight: 1.0\nrank: 8"
    several = {"adapter": [{"path": "a", "weight": 0.5}, "b"], "extract": {"rslora": False, "initial": None}}
    assert (
        as_yaml(several) == "adapter: [{path: a, weight: 0.5}, b]\nextract:\n  rslora: false\n  initial: null"
    )


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_verdict_and_charts_without_network_or_errors(
    tmp_path: Path, width: int, dark: bool
) -> None:
    page = tmp_path / "report.html"
    page.write_text(report_page(report(extra=EVIL)), "utf-8")
    found, console = opened(page, width, dark)
    assert console == []
    assert found["across"] <= width
    assert found["foreign"] == 0
    [verdict] = found["verdict"]
    assert verdict[0] > 0.8 * min(width, 1100)
    assert verdict[1] > 40
    assert len(found["charts"]) == 5
    for w, h, left, right in found["charts"]:
        assert w > 250
        assert h > 80
        assert left >= 0
        assert right <= width
    assert "Verified" in found["text"]
    shades = [int(n) for n in re.findall(r"\d+", found["paper"])]
    assert max(shades) < 60 if dark else min(shades) > 200
