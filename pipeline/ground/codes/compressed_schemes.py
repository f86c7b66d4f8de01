"""What compressed-tensors' config says of a module: bits, groups and blocks; and the grid its scales form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.ground.codes.reading import matrices
from pipeline.ground.codes.scale_grid import Grid
from pipeline.ground.errors import Refused


@dataclass(frozen=True, slots=True)
class Scheme:
    """The weights' arguments of one config group, as far as they are there."""

    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        keys = ("num_bits", "strategy", "group_size", "block_structure", "symmetric")
        told = [f"{key} {self.arguments[key]}" for key in keys if self.arguments.get(key) is not None]
        return ", ".join(told) or "1 to 8 bits"

    @property
    def block(self) -> tuple[int, int] | None:
        """block_structure, rows and columns."""
        block = self.arguments.get("block_structure")
        sizes = block.split("x") if isinstance(block, str) else block
        if not isinstance(sizes, list) or len(sizes) != 2 or not all(str(size).isdecimal() for size in sizes):
            return None
        height, width = (int(size) for size in sizes)
        return (height, width) if height and width else None

    def bits(self, columns: int, words: int) -> int | None:
        """Bits of a code, if `columns` of them fill `words` words densely; None if none or several do."""
        fitting = [bits for bits in range(1, 9) if -(-columns * bits // 32) == words]
        said = self.arguments.get("num_bits")
        fitting = [bits for bits in fitting if said is None or bits == said]
        return fitting[0] if len(fitting) == 1 else None


@dataclass(frozen=True, slots=True)
class Schemes:
    """The config groups, each with its targets."""

    present: bool  # whether the config is compressed-tensors' at all
    config: Mapping[str, Any]
    groups: tuple[tuple[str, Scheme], ...]  # (target, scheme)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Schemes:
        method = str(config.get("quant_method"))
        groups = config.get("config_groups")
        tables = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
        pairs = [
            (target, Scheme(table["weights"]))
            for table in tables
            if isinstance(table.get("weights"), Mapping)
            for target in table.get("targets") or []
            if isinstance(target, str)
        ]
        llm_compressor = "auto-round" in method and "llm_compressor" in str(config.get("packing_format"))
        present = method == "compressed-tensors" or bool(tables) or llm_compressor
        return cls(present, config, tuple(pairs))

    def check(self) -> None:
        """Refused for weights that mean something only together with a transform of what enters or leaves."""
        transforms = self.config.get("transform_config")
        if isinstance(transforms, Mapping) and transforms.get("config_groups"):
            raise Refused(
                "quantization_config: transform_config: its weights are rotated, which cannot be undone "
                "here; give the model in 16 bits"
            )

    def schemes(self, module: str) -> tuple[Scheme, ...]:
        """Those a module may have: by its name, else by a pattern of names, else by a class it may be of."""
        ranked = [(_rank(module, target), scheme) for target, scheme in self.groups]
        best = min((rank for rank, _ in ranked), default=_UNLIKE)
        return tuple(s for rank, s in ranked if rank == best < _UNLIKE) or (Scheme(),)


_UNLIKE = 3


def _rank(module: str, target: str) -> int:
    """0 for its name, 1 for a pattern of it, 2 for a class, which a name cannot show, 3 for none of these."""
    if target == module:
        return 0
    if target.startswith("re:"):
        try:
            return 1 if re.match(target.removeprefix("re:"), module) else _UNLIKE
        except re.error:
            return _UNLIKE
    return 2 if target.isidentifier() and target[0].isupper() else _UNLIKE


def fitting_grid(shape: tuple[int, ...], scales: tuple[int, ...], scheme: Scheme) -> Grid | None:
    """The grid of scales of this shape for a weight of that one; None if it fits none."""
    outer, rows, columns = matrices(shape)
    if 0 in shape or 0 in scales:
        return None
    if scales in ((), (1,)):
        return Grid(outer * rows, 1, 1, outer * rows, columns)
    if len(scales) != len(shape) or scales[:-2] != shape[:-2]:
        return None
    down, across = scales[-2:]
    if (down, across) == (1, 1):
        return Grid(rows, 1, 1, rows, columns)
    if scheme.block and scheme.arguments.get("strategy", "block") == "block":
        height, width = scheme.block
        fits = (down, across) == (-(-rows // height), -(-columns // width))
        return Grid(rows, down, across, height, width) if fits else None
    if down != rows or columns % across:
        return None
    said, width = scheme.arguments.get("group_size"), columns // across
    if isinstance(said, int) and said > 0 and said != width:
        return None
    return Grid(rows, rows, across, 1, width)
