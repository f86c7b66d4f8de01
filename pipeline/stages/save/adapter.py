"""save=adapter: the adapter itself, as PEFT and serving engines load it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.extraction import outputs
from pipeline.extraction.engines import Engine, serving
from pipeline.ground import dtypes, workplace
from pipeline.ground.adapter_format import CONFIG, WEIGHTS
from pipeline.ground.device import check_device
from pipeline.ground.digests import Digest, Digests, sha256
from pipeline.ground.errors import Refused
from pipeline.ground.files import File
from pipeline.ground.hub import is_hub_id
from pipeline.ground.manifest import is_hidden, own_version, owned, peak_memory, published, versions
from pipeline.ground.report import Action, Finding, Plan, PlannedWeight, unique
from pipeline.ground.sidefiles import Group, SideFile, write_side_files
from pipeline.ground.units import show_bytes
from pipeline.merging.contents import contents
from pipeline.stage import Save, stage
from pipeline.weight import Adapter, Checkpoint, Output, Part, Weight


@stage("adapter")
@dataclass(frozen=True, kw_only=True)
class SaveAdapter(Save):
    """A PEFT folder with what extract=svd made; the merge is planned, to see that it fits, and not done."""

    for_: Engine = Engine.peft
    """what is to load it: peft, vllm or llama.cpp; what that does not take is left out, and its cost told"""

    def check(self) -> None:
        super().check()
        check_device(self.device)

    def plan(self, merged: Checkpoint[Weight], adapter: Adapter) -> Plan:
        part = _only(adapter)
        assert part.extraction is not None
        disk, needed = part.extraction.disk, part.extraction.needed
        if needed > (free := workplace.free_for(self.output)):
            raise Refused(
                f"output: '{self.output}' needs {show_bytes(needed)} while it is made, but its disk has "
                f"{show_bytes(free)} free"
            )
        return Plan(
            base=published(merged.origin).name,
            adapter=published(part.extraction.tuned.origin).name,
            output=self.output.name,
            dtype=", ".join(sorted({dtypes.config_name(w.dtype) for w in _weights(part)})),
            merge_dtype="float32",
            weights=tuple(_weights(part)),
            shards={WEIGHTS: disk},
            num_parameters=sum(w.num_bytes for w in _weights(part)),
            peak_memory=part.extraction.memory,
            disk=disk,
            findings=tuple(unique(merged.findings, adapter.findings, self._served(part))),
            contents=contents(adapter),
        )

    def _served(self, part: Part) -> tuple[Finding, ...]:
        told = serving(self.for_, part.config["r"])
        return (Finding(told),) if told else ()

    def __call__(self, merged: Checkpoint[Weight], adapter: Adapter) -> Output:
        plan, part, begun = self.plan(merged, adapter), _only(adapter), time.monotonic()
        assert part.extraction is not None
        folder = workplace.partial(self.output)
        read = (*merged.files, *part.extraction.tuned.files, *part.extraction.texts)
        with Digests(read, {}) as inputs:
            for name in (WEIGHTS, CONFIG):
                _take(part.origin.folder / name, folder / name)
            side_files = write_side_files(folder, _tokenizer(part.side_files))
            hashed = inputs.result()
        owners = ["base" for _ in merged.files] + ["finetune" for _ in part.extraction.tuned.files]
        owners += ["calibration" for _ in part.extraction.texts]
        (folder / "README.md").write_text(_card(plan, part, self._served(part)), "utf-8")
        written = [p for p in sorted(folder.rglob("*")) if p.is_file() and not is_hidden(p, folder)]
        base, tuned = published(merged.origin), published(part.extraction.tuned.origin)
        manifest = {
            "format": 1,
            **versions(),
            "base": asdict(base),
            "finetune": asdict(tuned),
            "inputs": owned(hashed, owners),
            "outputs": [asdict(_hashed(path, folder)) for path in written],
            "side_files": side_files,
            "extraction": {name: dict(facts) for name, facts in part.extraction.facts.items()},
            "save": {
                "seconds": time.monotonic() - begun + part.extraction.seconds,
                "peak_memory": peak_memory(),
                "bytes": (folder / WEIGHTS).stat().st_size,
            },
        }
        return Output(folder, plan, merged, adapter, manifest=manifest, is_adapter=True)


def _only(adapter: Adapter) -> Part:
    if len(adapter.parts) == 1 and adapter.parts[0].extraction is not None:
        return adapter.parts[0]
    raise Refused(
        "save: adapter writes what extract=svd makes; an adapter that exists needs no saving "
        "(extract=svd shrinks or converts it, or makes one of several)"
    )


def _weights(part: Part) -> list[PlannedWeight]:
    """A line for each parameter that the adapter changes."""
    found = []
    for delta in part.deltas:
        elements = [(e.dtype, e.shape) for e in delta.entries]
        dtype = elements[0][0] if elements else "F32"
        found.append(
            PlannedWeight(
                name=f"{delta.module}.{delta.parameter}",
                shape=delta.shape,
                dtype=dtype,
                num_bytes=sum(dtypes.num_bytes(d, s) or 0 for d, s in elements),
                action=Action.saved if delta.replaces else Action.extracted,
                source=dtype,
                deltas=(delta.describe(1.0),),
            )
        )
    return found


def _tokenizer(files: tuple[SideFile, ...]) -> list[SideFile]:
    return [file for file in files if file.group in (Group.tokenizer, Group.template)]


def _take(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _hashed(path: Path, folder: Path) -> Digest:
    file = File.at(path)
    return Digest(path.relative_to(folder).as_posix(), file.size, sha256(file))


def _answered(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """What is held of outputs, where those decided."""
    share = outputs.held_on_average(facts)
    return "" if share is None else f", and {share:.2%} of what changed in their outputs"


def _card(plan: Plan, part: Part, served: Sequence[Finding]) -> str:
    """README.md with the Hub's metadata: what was extracted from what, and how much of it this holds."""
    assert part.extraction is not None
    facts = part.extraction.facts.values()
    energy = sum(f["energy"] for f in facts)
    held = sum(f["captured"] * f["energy"] for f in facts) / energy if energy else 1.0
    ranks = sorted({f["rank"] for f in facts})
    trained_on = part.config.get("base_model_name_or_path")
    hub_id = trained_on if isinstance(trained_on, str) and is_hub_id(trained_on) else None
    lines = [
        "---",
        *([f"base_model: {hub_id}"] if hub_id else []),
        "library_name: peft",
        "tags:",
        "- lora",
        "---",
        "",
        f"# {plan.adapter} as an adapter for {plan.base}",
        "",
        f"Extracted from the difference of their weights: {len(part.extraction.facts)} matrices at rank "
        f"{ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''},",
        f"which hold {held:.2%} of the energy of what changed in them{_answered(part.extraction.facts)}.",
        "",
        *(f"- {finding.text}" for finding in (*part.findings, *served)),
        *([""] if part.findings or served else []),
        "`merge.json` holds the hashes of everything that went in and came out, `report.json` the figures.",
        "",
        f"Made with lora-pipeline {own_version()}.",
        "",
    ]
    return "\n".join(lines)
