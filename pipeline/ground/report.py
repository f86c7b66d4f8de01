"""What a run tells: the plan before it, the report after it. Plain data, for JSON and the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.ground import dtypes
from pipeline.ground.codes.encoders.encoder import Encoder, Part
from pipeline.ground.errors import PipelineError
from pipeline.ground.provenance import digests, origins

if TYPE_CHECKING:
    from pipeline.ground.charts import Plot

FORMAT = 1  # of report.json, as report.schema.json describes it


@dataclass(frozen=True, slots=True)
class Finding:
    """Something the user should know that does not stop the run."""

    text: str


class Action(Enum):
    """What becomes of a weight."""

    copied = "bytes as they are"
    merged = "base + delta, rounded once"
    saved = "taken whole from the adapter"
    decoded = "quantized codes written as floats"
    cast = "another float dtype"
    encoded = "quantized anew"
    simulated = "through four bits and back"
    extracted = "low-rank factors of a difference"


@dataclass(frozen=True, slots=True)
class PlannedWeight:
    """One weight of the output; `dtype` is the name of its codes where it is held as such."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    action: Action
    source: str  # what the base holds: a safetensors dtype or a GGUF type
    deltas: tuple[str, ...] = ()  # "LoRA rank 8 scale 2", one for each that is added
    codes: tuple[Part, ...] = ()  # the tensors that hold it, if those are codes
    encoder: Encoder | None = None  # that makes such codes
    base_shift: float | None = None  # ||W16 - NF4(W16)|| / ||delta||, where training may have seen NF4

    @property
    def tensors(self) -> tuple[Part, ...]:
        """The tensors of the file that hold it."""
        return self.codes or (Part(self.name, self.dtype, self.shape),)


@dataclass(frozen=True, slots=True)
class ContentsRow:
    """Modules of an adapter that are alike: how many, and what is trained of each."""

    modules: str
    count: int
    kind: str
    shapes: str
    parameters: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class AdapterContents:
    """What is in an adapter."""

    name: str
    words: str
    rows: tuple[ContentsRow, ...]


@dataclass(frozen=True)
class Plan:
    """All that a run will do, known from headers and configs alone."""

    base: str
    adapter: str
    output: str
    dtype: str
    merge_dtype: str
    weights: tuple[PlannedWeight, ...]
    shards: Mapping[str, int]  # file name: bytes
    num_parameters: int
    peak_memory: int  # bytes beyond the libraries, at most
    disk: int  # bytes to be written
    findings: tuple[Finding, ...] = ()
    contents: tuple[AdapterContents, ...] = ()
    trained: str = ""  # parameters by kind
    quantized: str = ""  # the format that linear layers are quantized to; "" leaves them as numbers
    rounding: str = "nearest"

    @property
    def stored(self) -> str:
        """What the sums become: stored as bfloat16, linear layers as nf4."""
        how = {
            "nearest": "",
            "stochastic": ", rounded by chance",
            "auto": ", by chance where that keeps more",
        }
        codes = {"": "", "keep": ", codes as the base's"}
        quantized = codes.get(self.quantized, f", linear layers as {self.quantized}")
        return f"stored as {self.dtype}{quantized}{how.get(self.rounding, '')}"

    @property
    def merged_as(self) -> str:
        """What most of the merged weights are stored as: bfloat16, bnb nf4 block 64."""
        held = Counter(w.dtype for w in self.weights if w.action is Action.merged)
        name = held.most_common(1)[0][0] if held else self.dtype
        return dtypes.config_name(name) if dtypes.known(name) else name

    @property
    def num_bytes(self) -> int:
        return sum(w.num_bytes for w in self.weights)

    def count(self) -> Counter[Action]:
        """How many weights meet each action."""
        return Counter(w.action for w in self.weights)


class Status(Enum):
    passed = "passed"
    failed = "failed"
    skipped = "skipped"


@dataclass(frozen=True, slots=True)
class Gate:
    """One thing verification asks: what, what was seen, what would have been right."""

    name: str
    status: Status
    seen: str
    wanted: str
    lost: str = ""  # what of the adapter is gone though this passed, in words


class Rejected(PipelineError):  # noqa: N818  it reads like what happened
    """Verification refused the result; its report says more."""

    def __init__(self, sentence: str, report: Report) -> None:
        super().__init__(sentence)
        self.report = report


@dataclass(frozen=True, repr=False)
class Report:
    """The result of a run. `passed` decides whether the output is published."""

    plan: Plan
    gates: tuple[Gate, ...]
    findings: tuple[Finding, ...] = ()
    causes: tuple[str, ...] = ()  # what likely made a gate fail
    weights: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # statistics, by name
    logits: Mapping[str, Any] | None = None
    extraction: Mapping[str, Any] | None = None  # what an extracted adapter holds, by weight; its logits
    answers: Sequence[Mapping[str, str]] | None = None  # prompt; what base, adapter and merged say to it
    save: Mapping[str, Any] = field(default_factory=dict)  # seconds, peak memory, bytes
    manifest: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  # that verification took
    stages: Mapping[str, str] = field(default_factory=dict)  # slot: the stage that filled it
    request: Mapping[str, Any] = field(default_factory=dict)  # as it may be published
    versions: Mapping[str, str] = field(default_factory=dict)  # of this tool and the libraries
    stands_at: Path | None = None  # the folder of the result, on this machine

    @property
    def passed(self) -> bool:
        return all(gate.status is not Status.failed for gate in self.gates)

    @property
    def word(self) -> str:
        """The verdict in a word."""
        if not self.passed:
            return "Refused"
        return "Verified" if self.gates else "Not verified"

    @property
    def reservation(self) -> str:
        """What a verdict of "verified" must not be read without; "" where there is nothing of the kind."""
        lost = [gate.lost for gate in self.gates if gate.lost]
        if not lost or not self.passed:
            return ""
        return f"the files are what was asked for, but {' and '.join(lost)}, stored as {self.plan.merged_as}"

    def require(self) -> Report:
        """This report, if verification passed; else raises Rejected."""
        failed = next((gate for gate in self.gates if gate.status is Status.failed), None)
        if failed is None:
            return self
        cause = f"; likely cause: {self.causes[0]}" if self.causes else ""
        aside = self.stands_at and self.stands_at.name.endswith(".rejected")
        kept = f"; the output is kept in {self.stands_at}" if aside else ""
        seen = f"{failed.name}: {failed.seen}, wanted {failed.wanted}"
        raise Rejected(f"verification refused the result: {seen}{cause}{kept}", self)

    @property
    def plots(self) -> dict[str, Plot]:
        """The charts of the page by their names; each shows itself in a notebook, `str(plot)` is its SVG."""
        from pipeline.ground.html import plots

        return plots(self)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that its style and the notebook's do not meet."""
        from pipeline.ground.html import report_frame

        return report_frame(self)

    def __repr__(self) -> str:
        number = sum(gate.status is Status.passed for gate in self.gates)
        verdict = "passed" if self.passed else "refused"
        but = f"; {self.reservation}" if self.reservation else ""
        return f"<Report: {verdict}, {number} of {len(self.gates)} gates passed{but}; {self.stands_at}>"

    def as_dict(self) -> dict[str, Any]:
        """For report.json: paths as the user gave them, no machine's own paths."""
        plan = self.plan
        return {
            "format": FORMAT,
            "passed": self.passed,
            "reservation": self.reservation,
            "stages": dict(self.stages),
            "request": dict(self.request),
            "versions": dict(self.versions),
            "base": plan.base,
            "adapter": plan.adapter,
            "dtype": plan.dtype,
            "merge_dtype": plan.merge_dtype,
            "quantized": plan.quantized,
            "rounding": plan.rounding,
            "gates": [{**asdict(gate), "status": gate.status.value} for gate in self.gates],
            "findings": [f.text for f in unique(plan.findings, self.findings)],
            "causes": list(self.causes),
            "retained": retained(self.weights),
            "logits": self.logits,
            **({"extraction": self.extraction} if self.extraction else {}),
            "answers": [dict(said) for said in self.answers] if self.answers else None,
            "counts": {action.name: n for action, n in plan.count().items()},
            "origins": origins(self.manifest),
            "inputs": digests(self.manifest.get("inputs"), owned=True),
            "outputs": digests(self.manifest.get("outputs")),
            "save": dict(self.save),
            "verify_seconds": self.seconds,
            "weights": {name: dict(facts) for name, facts in self.weights.items()},
        }


def unique(*findings: Sequence[Finding]) -> list[Finding]:
    """All findings once, in order."""
    return list(dict.fromkeys(f for some in findings for f in some))


def retained(weights: Mapping[str, Mapping[str, Any]]) -> dict[str, float] | None:
    """Least and mean share of the deltas that survived rounding, over the merged weights."""
    shares = [w["retained"] for w in weights.values() if w.get("retained") is not None]
    return {"least": min(shares), "mean": sum(shares) / len(shares)} if shares else None
