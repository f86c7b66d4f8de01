"""load=gguf: one GGUF file, under Hugging Face names and in Hugging Face's order of rows."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from pipeline.ground import hub
from pipeline.ground.codes.gguf import GgufCode, row_bytes
from pipeline.ground.errors import Refused
from pipeline.ground.files import Extent, File
from pipeline.ground.gguf import GgufHeader, GgufTensor, read_gguf
from pipeline.ground.gguf_model import gguf_config, gguf_side_files
from pipeline.ground.gguf_names import hugging_face_name, transform
from pipeline.ground.report import Finding
from pipeline.ground.shards import Entry
from pipeline.stage import Load, stage
from pipeline.weight import Checkpoint, Stored


@stage("gguf")
@dataclass(frozen=True, kw_only=True)
class Gguf(Load):
    """A .gguf file, or a folder that holds one."""

    def check(self) -> None:
        self()

    def __call__(self) -> Checkpoint[Stored]:
        origin = hub.locate("base_model", self.base_model, hub.CHECKPOINT, download=not self.dry_run)
        path = _the_file(origin.folder)
        header = read_gguf(path)
        architecture = header.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise Refused(f"{path}: its metadata lack general.architecture")
        file = File.at(path)
        weights: list[Stored] = []
        left_out, wrong = [], []
        for tensor in header.tensors:
            try:
                name = hugging_face_name(architecture, tensor.name)
                if name is None:
                    left_out.append(tensor.name)
                else:
                    weights.append(_stored(name, tensor, header, architecture, file))
            except Refused as refusal:
                wrong += [f"{path}: {sentence}" for sentence in refusal.sentences]
        if wrong:
            raise Refused(*dict.fromkeys(wrong))
        findings = [Finding(f"{name} is left out: rope_parameters in the config say it") for name in left_out]
        return Checkpoint(
            weights=tuple(weights),
            shards=(),
            dtype="BF16",
            config=gguf_config(header),
            origin=origin,
            files=(file,),
            side_files=gguf_side_files(header),
            findings=tuple(findings),
        )


def _the_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise Refused(f"base_model: '{path}' should hold one GGUF file, but holds {names}; give the file")
    return found[0]


def _stored(name: str, tensor: GgufTensor, header: GgufHeader, architecture: str, file: File) -> Stored:
    if not tensor.shape:
        raise Refused(f"tensor '{tensor.name}' has no dimensions")
    row_bytes(tensor.type, tensor.shape[-1])  # refuses what cannot be decoded
    change = transform(architecture, tensor.name, header.metadata)
    rows = prod(tensor.shape[:-1])
    if change and rows % change.grain:
        raise Refused(f"tensor '{tensor.name}' has {rows} rows, which are no heads of {change.grain}")
    entry = Entry(tensor.name, tensor.type, tensor.shape, Extent(file, tensor.offset, tensor.length))
    return Stored(name, tensor.shape, "BF16", GgufCode(tensor.shape, entry, change))
