# ruff: noqa: T201
"""Merged weights against float64 and against PEFT, on a random Llama of 6 million parameters.

`exactness.py` prints, for each dtype of base and output, the worst distance from the float64 recomputation
in units of the last place (as it is, and less the slack of a float32 sum), and how many elements differ
from PEFT's default `merge_and_unload` where that writes the same dtype.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline.ground.rounding import ulp
from tests.models import LINEAR, exact, merged_by_peft, tensors, write_llama, write_lora
from tests.running import merge
from tests.tolerance import FLOAT32_SLACK, num_different

NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def main() -> None:
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "vocab_size": 1024}
    print(
        f"{'base':10}{'output':10}{'worst ulp':>11}{'less slack':>11}{'elements':>12}{'differ from PEFT':>18}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for number, kind in enumerate((torch.float32, torch.bfloat16, torch.float16)):
            folder = Path(scratch) / str(number)
            base = write_llama(folder / "base", kind, shard="1GB", **shape)
            adapter = write_lora(folder / "adapter", base, r=16, lora_alpha=24)
            before, peft = tensors(base), merged_by_peft(base, adapter)
            for dtype, name in NAMES.items():
                with redirect_stdout(StringIO()):
                    merge(base, adapter, folder / dtype, dtype=dtype)
                after = tensors(folder / dtype)
                worst = slackless = 0.0
                elements = 0
                for weight, stored in after.items():
                    if weight.split(".")[-2] not in LINEAR:
                        continue
                    module = weight.removesuffix(".weight")
                    target, size = exact(before[weight], adapter, module, 1.5)
                    error, unit = (stored.double() - target).abs(), ulp(target, name)
                    worst = max(worst, float((error / unit).max()))
                    slackless = max(slackless, float(((error - FLOAT32_SLACK * size) / unit).max()))
                    elements += stored.numel()
                same = after["model.norm.weight"].dtype == peft["model.norm.weight"].dtype
                differ = str(sum(num_different(after[n], peft[n]) for n in after)) if same else "-"
                source = str(kind).removeprefix("torch.")
                print(f"{source:10}{dtype:10}{worst:11.4f}{slackless:11.4f}{elements:12,}{differ:>18}")


if __name__ == "__main__":
    main()
