# ruff: noqa: T201
"""Our merge beside PEFT's, one row for each architecture: `parity.py`.

Tiny random models, a random LoRA saved by PEFT, merged by us and by PEFT onto the files that transformers
writes. "bits": every tensor is equal. Else how many elements differ, and how far ours and PEFT's are from
float64 at worst, in units of the last place: PEFT rounds the delta of stacked experts to the base's dtype
before it adds it. The kinds of adapters by themselves are compared in tests/ground/deltas.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.architectures import ARCHITECTURES, Architecture, write, write_merged_by_peft
from tests.models import tensors
from tests.running import merge
from tests.tolerance import num_different, worst_ulp


def row(architecture: Architecture, dtype: torch.dtype) -> str:
    """What is to be said of one architecture over a base in this dtype."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
        here = Path(temporary)
        write(architecture, here, dtype)
        write_merged_by_peft(architecture, here, dtype)
        merge(here / "base", here / "adapter", here / "out", verify="structure")
        if dtype is torch.bfloat16:
            wide = {"merge_dtype": "float64", "dtype": "float32"}
            merge(here / "base", here / "adapter", here / "exact", **wide)
        ours, peft = tensors(here / "out"), tensors(here / "peft")
        off = [key for key in ours if not torch.equal(ours[key], peft[key])]
        if not off:
            return f"bits ({len(ours)} tensors)"
        exact = tensors(here / "exact")
        count = sum(num_different(ours[key], peft[key]) for key in off)
        worst = [
            max(worst_ulp(side[key], exact[key].double(), "BF16") for key in off) for side in (ours, peft)
        ]
    return f"{count} elements in {len(off)} tensors differ; ours {worst[0]:.2f} ulp, PEFT {worst[1]:.2f}"


def main() -> None:
    warnings.simplefilter("ignore")
    print("| architecture | float32 base | bfloat16 base |\n|---|---|---|")
    for name, architecture in ARCHITECTURES.items():
        cells = [row(architecture, dtype) for dtype in (torch.float32, torch.bfloat16)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
