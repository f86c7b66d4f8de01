"""What peft_type LORA can be, end to end, beside PEFT's own merge and its merge in float64.

Into float32 the values are PEFT's bits. Into 16 bits they are too, but where PEFT casts the delta to the
base's dtype before it adds it: embeddings, bare parameters and BD-LoRA; there PEFT is the one that is off by
more than a rounding. Column norms (DoRA on what lies transposed) and convolutions are float32 sums that torch
takes in another order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from pipeline.ground.deltas.kinds import KINDS, NOT_MERGEABLE
from pipeline.ground.errors import Refused
from pipeline.ground.report import Status
from pipeline.stages.extract.peft import Packing
from tests.beside_peft import (
    WEIGHTS,
    Beside,
    Case,
    Merges,
    load_base,
    merged_by_peft,
    merges,
    quiet,
    with_noise,
    write,
    write_base,
)
from tests.lora_cases import CASES, LINEAR_LAYERS, RESIDUAL_INITS, TIED_OR_RESIZED, llama, lora, mixtral
from tests.models import tensors
from tests.running import merge
from tests.tolerance import within_half_ulp

TOKENS = 32


@pytest.fixture(scope="module", params=[(name, dtype) for name in CASES for dtype in ("float32", "bfloat16")],
                ids=lambda p: f"{p[0]}-{p[1]}")  # fmt: skip
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Merged]:
    ...
