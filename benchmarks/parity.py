# ruff: noqa: T201
"""Our merge beside PEFT's: `parity.py [NAME ...]` prints a row for each kind, layer and architecture.

Tiny random models, a random adapter saved by PEFT, merged by us and by PEFT onto the files that transformers
writes. "bits": every value is equal. Else the largest difference, in units of the last place of the largest
of base, delta and result, and how many values differ. Where PEFT is wrong both are held against the formula
in float64, written out by hand (tests/peft_defects.py): ours in units, which are those of a float32 sum or
half of one of 16 bits, PEFT's by the norm of its error as a multiple of the delta's.

A new row is a Case in one of GROUPS; what PEFT merges wrongly is a Defect.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import architectures, kind_cases, lora_cases
from tests.beside_peft import Beside, Case, Merges, merges
from tests.peft_defects import DEFECTS, Defect

GROUPS: dict[str, Mapping[str, Case]] = {
    "LoRA on linear layers": lora_cases.LINEAR_LAYERS,
    "LoRA on other layers": lora_cases.OTHER_LAYERS,
    "LoRA on bare parameters": lora_cases.PARAMETERS,
    "Beside LoRA": lora_cases.BESIDE_LORA,
    "Resized vocabularies": lora_cases.RESIZED,
    "Tied embeddings": lora_cases.TIED_RIGHTLY,
    "Other kinds": kind_cases.CASES,
    "Architectures": architectures.CASES,
}
WHY = {
    Beside.bits: "which should be the same",
    Beside.delta_rounded: "PEFT rounds the delta too",
    Beside.order: "float32 sums in another order",
    Beside.loose: "float32 computations of another order",
}
DTYPES = (torch.float32, torch.bfloat16)


def run(case: Case, dtype: torch.dtype, told: Callable[[Merges], str]) -> str:
    """A cell: what is to be said of the case over a base in this dtype."""
    with tempfile.TemporaryDirectory() as scratch:
        return told(merges(case, Path(scratch), dtype))


def beside(found: Merges) -> str:
    """How far PEFT and we are apart."""
    if found.ours.keys() != found.theirs.keys():
        return f"other weights: {', '.join(sorted(found.ours.keys() ^ found.theirs.keys()))}"
    if not found.different:
        return "bits"
    total = sum(found.ours[name].numel() for name in found.different)
    return f"{found.apart:.2g} ulp, {found.num_different:,} of {total:,} values ({WHY[found.case.beside]})"


def wrong(defect: Defect) -> Callable[[Merges], str]:
    """How far each is from what is right."""

    def told(found: Merges) -> str:
        right = defect.right(found.folder)
        theirs = {"lm_head.weight": found.theirs.get("model.embed_tokens.weight"), **found.theirs}
        ours, peft = found.away(found.ours, right), found.missed(theirs, right)  # type: ignore[arg-type]
        return f"ours {ours:.2g} ulp off, PEFT {peft:.2g} times the delta"

    return told


def rows(names: Iterable[str], cells: Callable[[str, torch.dtype], str]) -> Iterator[str]:
    for name in names:
        yield f"| {name} | {' | '.join(cells(name, dtype) for dtype in DTYPES)} |"


def main(wanted: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for title, cases in GROUPS.items():
        if names := [name for name in cases if not wanted or name in wanted]:
            print(f"\n| {title} | float32 base | bfloat16 base |\n|---|---|---|")
            for line in rows(names, lambda name, dtype: run(cases[name], dtype, beside)):  # noqa: B023
                print(line, flush=True)
    if names := [name for name in DEFECTS if not wanted or name in wanted]:
        print("\n| What PEFT merges wrongly | float32 base | bfloat16 base |\n|---|---|---|")
        for name in names:
            cells = [run(DEFECTS[name].case, dtype, wrong(DEFECTS[name])) for dtype in DTYPES]
            print(f"| {name}: {DEFECTS[name].what} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
