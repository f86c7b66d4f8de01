"""What stands beside the weights: tokenizer, templates, processors, code. Copied, never rewritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

# What quantizers put beside a checkpoint; it says how to read codes, which no output holds any more.
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


class Group(Enum):
    """Files that belong together: a tokenizer comes as a set from one folder."""

    tokenizer = (
        "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json "
        "vocab.json vocab.txt merges.txt *.spm *.tiktoken *.bpe spiece.model sentencepiece.bpe.model "
        "tekken.json tokenizer.model.v* bpe.codes"
    )
    template = "chat_template.jinja chat_template.json additional_chat_templates/*.jinja"
    other = (
        "generation_config.json preprocessor_config.json processor_config.json image_processor_config.json "
        "video_preprocessor_config.json audio_tokenizer_config.json feature_extractor_config.json "
        "params.json normalizer.json modules.json "
        "config_sentence_transformers.json sentence_bert_config.json "
        "*.py LICENSE* LICENCE* NOTICE* USE_POLICY*"
    )

    @property
    def patterns(self) -> list[str]:
        return self.value.split()


class SideFile(Protocol):
    """One or more files beside the weights, and whose they are."""

    @property
    def group(self) -> Group: ...

    @property
    def origin(self) -> str: ...

    @property
    def has_template(self) -> bool: ...

    def write(self, folder: Path) -> list[str]:
        """Writes into the folder; the names written, relative to it."""


@dataclass(frozen=True, slots=True)
class Copied:
    """A file taken over byte for byte from the folder of `origin` ("base" or "adapter")."""

    name: str
    path: Path
    group: Group
    origin: str

    @property
    def has_template(self) -> bool:
        """Whether a chat template is in it."""
        if self.group is Group.template:
            return self.name.startswith("chat_template")
        if self.name != "tokenizer_config.json":
            return False
        try:
            return bool(json.loads(self.path.read_text("utf-8")).get("chat_template"))
        except (ValueError, AttributeError):
            return False

    def write(self, folder: Path) -> list[str]:
        target = folder / self.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, target)
        return [self.name]


def side_files(folder: Path, origin: str) -> tuple[SideFile, ...]:
    """The side files of a checkpoint or adapter folder, in order of their names."""
    found: dict[str, SideFile] = {}
    nested = (*folder.rglob("*.jinja"), *folder.rglob("*.py"), *_module_files(folder))
    for path in (*sorted(folder.iterdir()), *sorted(nested)):
        name = path.relative_to(folder).as_posix()
        group = next((g for g in Group if any(fnmatch(name, p) for p in g.patterns)), None)
        if path in nested:
            group = group or Group.other
        if group and path.is_file():
            found.setdefault(name, Copied(name, path, group, origin))
    return tuple(found.values())


def _module_files(folder: Path) -> list[Path]:
    """The files of what sentence-transformers puts behind the model: 1_Pooling/config.json and so on."""
    if not (folder / "modules.json").is_file():
        return []
    try:
        modules = [str(m["path"]) for m in json.loads((folder / "modules.json").read_text("utf-8"))]
    except (ValueError, TypeError, KeyError):
        return []
    inside = [folder / m for m in modules if m and ".." not in m and not m.startswith("/")]
    return [
        path for f in inside if f.is_dir() for path in f.iterdir() if path.suffix in (".json", ".safetensors")
    ]


def left_out(folder: Path, taken: Sequence[SideFile]) -> list[str]:
    """Files of a checkpoint's folder that are neither taken nor weights nor written anew."""
    names = {getattr(file, "name", "") for file in taken}
    anew = (
        *QUANTIZATION_FILES,
        "*.safetensors",
        "*.safetensors.index.json",
        "*.gguf",
        "config.json",
        "README.md",
        ".*",
    )
    return [
        path.name
        for path in sorted(folder.iterdir())
        if path.name not in names and not path.is_dir() and not any(fnmatch(path.name, p) for p in anew)
    ]


def write_side_files(folder: Path, files: Sequence[SideFile]) -> dict[str, str]:
    """Writes them; the names written and whose they are."""
    return {name: file.origin for file in files for name in file.write(folder)}


def brings_tokenizer(files: Sequence[SideFile]) -> bool:
    """Whether a whole tokenizer is among them."""
    return any(getattr(f, "name", "") in {"tokenizer.json", "tokenizer.model"} for f in files)


def chosen(base: Sequence[SideFile], adapter: Sequence[SideFile]) -> list[SideFile]:
    """The base's files, with the adapter's tokenizer and template instead where it brings its own.

    The tokenizer is one set: the adapter's if it holds tokenizer.json or tokenizer.model. The template
    is the adapter's if it has one, in a file or in the tokenizer's config.
    """
    brings = brings_tokenizer(adapter)
    tokenizer = [f for f in (adapter if brings else base) if f.group is Group.tokenizer]
    own_template = [f for f in adapter if f.group is Group.template] if brings else []
    if own_template or (brings and any(f.has_template for f in tokenizer)):
        template = own_template
    else:
        template = [f for f in base if f.group is Group.template]
    return [*tokenizer, *template, *(f for f in base if f.group is Group.other)]
