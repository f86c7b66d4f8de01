"""What a GGUF file holds beside the weights: config and tokenizer, as transformers makes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.ground.errors import PipelineError
from pipeline.ground.gguf import GgufHeader
from pipeline.ground.gguf_rope import rope_parameters
from pipeline.ground.model_config import edited
from pipeline.ground.sidefiles import Group


@dataclass(frozen=True, slots=True)
class GgufConfig:
    """The config.json of the model in a GGUF file; transformers reads it when it is first needed."""

    path: Path
    model_type: str
    tied: bool
    attention_bias: bool
    head_dim: int | None
    rope_parameters: Mapping[str, Any] | None

    @property
    def quantization_config(self) -> dict[str, Any]:
        return {}  # what transformers would call it says nothing that the tensors do not

    def read(self) -> dict[str, Any]:
        return {
            **_config(self.path),
            **({"attention_bias": True} if self.attention_bias else {}),
            **({"head_dim": self.head_dim} if self.head_dim else {}),
            **({"rope_parameters": dict(self.rope_parameters)} if self.rope_parameters else {}),
            "tie_word_embeddings": self.tied,
        }

    def text(self, edits: Mapping[str, Any]) -> str:
        return json.dumps(edited(self.read(), {"dtype": "bfloat16", **edits}), indent=2) + "\n"


def gguf_config(header: GgufHeader) -> GgufConfig:
    """The config of this file: what transformers reads of it, and what it overlooks."""
    architecture = str(header.metadata["general.architecture"])
    names = {tensor.name for tensor in header.tensors}
    head_dim = header.metadata.get(f"{architecture}.attention.key_length")
    return GgufConfig(
        header.path,
        model_type=architecture,
        tied="output.weight" not in names,
        attention_bias="blk.0.attn_output.bias" in names,
        head_dim=head_dim if isinstance(head_dim, int) else None,
        rope_parameters=rope_parameters(header),
    )


@lru_cache(maxsize=8)
def _config(path: Path) -> dict[str, Any]:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    with _reading(path, "config"):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    found: dict[str, Any] = config.to_diff_dict()
    for private in ("_name_or_path", "_model_name_or_path"):
        found.pop(private, None)
    return {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]], **found}


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """The tokenizer, chat template and generation defaults that a GGUF file holds."""

    path: Path
    has_template: bool
    group: Group = Group.tokenizer
    origin: str = "base"
    name: str = "tokenizer.json"

    def write(self, folder: Path) -> list[str]:
        from transformers import AutoTokenizer

        with _reading(self.path, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(
                self.path.parent, gguf_file=self.path.name, trust_remote_code=False
            )
        tokenizer.init_kwargs.pop("name_or_path", None)
        return sorted(Path(file).name for file in tokenizer.save_pretrained(folder))


@dataclass(frozen=True, slots=True)
class GgufGeneration:
    """generation_config.json with the special tokens that a GGUF file names."""

    metadata: Mapping[str, int]
    group: Group = Group.other
    origin: str = "base"
    has_template: bool = False
    name: str = "generation_config.json"

    def write(self, folder: Path) -> list[str]:
        (folder / self.name).write_text(json.dumps(dict(self.metadata), indent=2) + "\n", "utf-8")
        return [self.name]


def gguf_side_files(header: GgufHeader) -> tuple[GgufTokenizer | GgufGeneration, ...]:
    """What is written beside the weights of this file."""
    metadata = header.metadata
    tokens = {
        f"{kind}_token_id": value
        for kind, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if isinstance(value := metadata.get(f"tokenizer.ggml.{key}_token_id"), int)
    }
    if "tokenizer.ggml.tokens" not in metadata:
        return ()
    tokenizer = GgufTokenizer(header.path, has_template="tokenizer.chat_template" in metadata)
    return (tokenizer, GgufGeneration(tokens)) if tokens else (tokenizer,)


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Quiet; and what transformers cannot make of the file becomes one sentence."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # whatever transformers raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PipelineError(f"{path}: transformers cannot read its {what} ({reason})") from error
    finally:
        logging.set_verbosity(level)
