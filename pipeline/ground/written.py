"""A written checkpoint whose weights may be held as codes: rows of them, decoded, and what they should be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.ground.codes.code import Code, Found, Quantization
from pipeline.ground.codes.encoders.encoder import Encode, Encoder
from pipeline.ground.codes.encoders.same import over_its_scales
from pipeline.ground.codes.formats import detect
from pipeline.ground.folder import Folder, Rows
from pipeline.ground.model_config import ConfigFile
from pipeline.ground.reference import SLACK, Facts, gather
from pipeline.ground.shards import read_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

_SCALES = 4  # a scale is that of the largest value of its block, whose own slack moves all the others


@dataclass
class Written(Folder):
    """A folder's tensors, its codes found by the decoders as in any base."""

    codes: Mapping[str, Code] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.codes = {found.name: found.code for found in codes_in(self.path)}

    @contextmanager
    def opened(self, name: str) -> Iterator[Rows]:
        """As `Folder.opened`; codes decoded, float32."""
        code = self.codes.get(name)
        with code.open("cpu") if code else super().opened(name) as rows:
            yield rows


def codes_in(folder: Path) -> list[Found]:
    """The weights that a checkpoint folder holds as codes."""
    shards = read_checkpoint(folder)
    tensors = {entry.name: entry for shard in shards for entry in shard.entries}
    metadata = {key: text for shard in shards for key, text in shard.metadata.items()}
    said = said_of_codes(folder)
    return detect(tensors, Quantization(said, metadata=metadata))[0]


def said_of_codes(folder: Path) -> Mapping[str, Any]:
    """quantization_config of a folder; {} where there is none, or no config."""
    path = folder / "config.json"
    return ConfigFile(path).quantization_config if path.is_file() else {}


@dataclass(frozen=True)
class Standard:
    """What the codes of a weight are held against: the nearest ones, or either neighbour if by chance.

    Element by element those over the scales that stand there; in sum, those that the format's own scales
    give, and what the scales' own codes may add (`slack`). So a last bit that turns a scale is no fault, and
    a scale that serves badly is one.
    """

    encoder: Encoder
    encode: Encode
    over: tuple[Encoder, Encode] | None  # the scales of the file, where they do not just follow the values
    slack: float
    by_chance: bool

    def compare(
        self, facts: Facts, stored: Tensor, start: int, base: Tensor, delta: Tensor, size: Tensor
    ) -> None:
        """Adds one sample to the facts; as `reference.compare`, the stored rows decoded."""
        W, O = base.double(), stored.double()  # noqa: E741
        target = W + delta
        error = (O - target).abs()
        own = self.nearest(target, start)
        facts.least_noise += float(((own - target) ** 2).sum()) + own.numel() * self.slack**2
        facts.coded = True
        facts.elements += stored.numel()
        facts.beyond += int((~(error <= self.allowed(target, W.abs() + size, start))).sum())
        facts.noise += float((error * error).sum())
        gather(facts, W, O, self.nearest(W, start), delta.expand(W.shape), own, self.slack)

    def nearest(self, values: Tensor, start: int) -> Tensor:
        """What the format's own codes of these rows mean, float64, before scales are quantized too."""
        return self.encoder.decoded(self.encode(values.float(), start, None), start).double()

    def allowed(self, target: Tensor, terms: Tensor, start: int) -> Tensor:
        """How far each element of rows `start:` may be off; `terms` is what a float32 sum's slack is of."""
        encoder, encode = self.over or (self.encoder, self.encode)
        encoded = encode(target.float(), start, None)
        allowed = (encoder.decoded(encoded, start).double() - target).abs()
        if self.by_chance:
            allowed = allowed.maximum(encoder.step(target, encoded, start))
        allowed += self.slack + _SCALES * SLACK * terms.amax(1, keepdim=True)
        return allowed + encoder.blur * target.abs().amax(1, keepdim=True)


@contextmanager
def standard_of(encoder: Encoder, code: Code, by_chance: bool) -> Iterator[Standard]:
    """The standard for a weight that is held as `code`."""
    with ExitStack() as stack:
        encode = stack.enter_context(encoder.open("cpu"))
        over = over_its_scales(encoder.name, code)
        kept = (over, stack.enter_context(over.open("cpu"))) if over else None
        yield Standard(encoder, encode, kept, encoder.slack(code), by_chance)
