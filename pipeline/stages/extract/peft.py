"""extract=peft: an adapter that PEFT has written, from its folder or the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pipeline.ground import hub
from pipeline.ground.adapter_format import AdapterFile, read_adapter
from pipeline.ground.deltas.kind import Told
from pipeline.ground.deltas.saved import Saved
from pipeline.ground.errors import Refused
from pipeline.ground.files import File
from pipeline.ground.names import matches, unmatched
from pipeline.ground.sidefiles import side_files
from pipeline.stage import Chosen, Extract, stage
from pipeline.weight import Adapter, Part


class Packing(Enum):
    """How lora_B of stacked experts lies in the file."""

    rank = "rank"
    expert = "expert"


@stage("peft")
@dataclass(frozen=True, kw_only=True)
class Peft(Extract):
    """An adapter folder with adapter_config.json and adapter_model.safetensors."""

    initial: str | None = None
    """the adapter as it was before training, for inits that took it out of the base (pissa, olora)"""
    residual_base: bool = False
    """base_model is what such an init left of the base, not the original"""
    expert_packing: Packing = Packing.rank
    """how lora_B of stacked experts is packed: rank (PEFT) or expert (Unsloth)"""
    out_proj_times: int | None = None
    """how often the delta of a MultiheadAttention's out_proj is applied: 1, or 2 as PEFT 0.21.2 does"""

    def check(self) -> None:
        rule = not isinstance(self.rank, int | None)
        own = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern, "rank": rule}
        own |= {"max_rank": self.max_rank is not None, "multiple_of": self.multiple_of != 1}
        if meant := [key for key, is_set in own.items() if is_set]:
            raise Refused(f"{meant[0]}: is for an adapter to be extracted; extract=peft takes one as it is")
        self()

    def __call__(self) -> Adapter:
        return Adapter(tuple(self._part(chosen) for chosen in self.adapter))

    def _part(self, chosen: Chosen) -> Part:
        origin = hub.locate("adapter", chosen.path, hub.ADAPTER, download=not self.dry_run)
        told = Told(self.residual_base, self.expert_packing is Packing.expert, self.out_proj_times)
        initial = self.initial and hub.locate(
            "extract.initial", self.initial, hub.ADAPTER, download=not self.dry_run
        )
        file = read_adapter(origin.folder, told, initial.folder if initial else None)
        if differences := self._differences(file):
            raise Refused(*differences)
        return Part(
            weight=chosen.weight,
            deltas=file.deltas,
            findings=file.findings,
            config=file.config,
            origin=origin,
            files=(file.shard.file, File.at(file.config_path)),
            side_files=side_files(origin.folder, "adapter"),
            told=told,
            initial=initial.folder if initial else None,
        )

    def _differences(self, file: AdapterFile) -> list[str]:
        """How the adapter differs from what the recipe says of it."""
        differences = []
        ranks = sorted({delta.rank for delta in file.deltas if delta.rank is not None})
        if self.rank is not None and ranks != [self.rank]:
            differences.append(f"rank: the recipe says {self.rank}, the adapter has {_listed(ranks)}")
        alphas = sorted(
            {
                file.config.get("lora_alpha", file.config.get("alpha")),
                *(file.config.get("alpha_pattern") or {}).values(),
            }
        )
        if self.alpha is not None and alphas != [self.alpha]:
            differences.append(f"alpha: the recipe says {self.alpha:g}, the adapter has {_listed(alphas)}")
        if self.targeted_modules is not None:
            beyond = unmatched(dict.fromkeys(delta.module for delta in file.deltas), self.targeted_modules)
            if beyond:
                differences.append(
                    f"targeted_modules: the recipe covers {_listed(self.targeted_modules)}, but the adapter "
                    f"also changes {beyond[0]} ({len(beyond)} modules not covered)"
                )
        if self.saved_modules is not None:
            whole = dict.fromkeys(delta.module for delta in file.deltas if isinstance(delta, Saved))
            if beyond := unmatched(whole, self.saved_modules):
                differences.append(
                    f"saved_modules: the recipe covers {_listed(self.saved_modules)}, but the adapter also "
                    f"holds {beyond[0]} ({len(beyond)} modules not covered)"
                )
            if unmet := [p for p in self.saved_modules if not any(matches(m, p) for m in whole)]:
                differences.append(f"saved_modules: the adapter holds no '{unmet[0]}' whole")
        return differences


def _listed(values: object) -> str:
    return ", ".join(str(v) for v in values)  # type: ignore[attr-defined]
