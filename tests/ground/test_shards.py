"""Headers that we write and read, against the safetensors library."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.ground.dtypes import num_bytes, torch_dtype
from pipeline.ground.shards import lay_out, read_shard

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda n: n != "__metadata__" and n.isprintable()
)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
dtypes = st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"])
tables = st.dictionaries(names, st.tuples(dtypes, shapes), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(table=tables, metadata=st.dictionaries(names, st.text(max_size=5), max_size=2))
def test_what_we_lay_out_the_library_reads(
    table: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    header, slots = lay_out([(n, d, s) for n, (d, s) in table.items()], metadata)
    random = torch.Generator().manual_seed(0)
    body = torch.randint(2, (sum(s.length for s in slots),), generator=random, dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(header + body.numpy().tobytes())
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(table)
            assert (file.metadata() or {}) == metadata
            for slot in slots:
                dtype, shape = table[slot.name]
                start = slot.offset - len(header)
                wanted = body[start : start + slot.length].clone().view(torch_dtype(dtype)).view(shape)
                assert slot.length == num_bytes(dtype, shape)
                found = file.get_tensor(slot.name)
                assert found.shape == wanted.shape
                assert (
                    found.reshape(-1).view(torch.uint8).tolist()
                    == wanted.reshape(-1).view(torch.uint8).tolist()
                )


@settings(max_examples=100, deadline=None)
@given(table=tables)
def test_what_the_library_writes_we_read(table: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    state = {n: torch.zeros(s, dtype=torch_dtype(d)) for n, (d, s) in table.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file(state, path, {"format": "pt"})
        shard = read_shard(path)
        assert {e.name: (e.dtype, e.shape) for e in shard.entries} == table
        assert shard.metadata == {"format": "pt"}
        for entry in shard.entries:
            assert entry.extent.length == state[entry.name].numel() * state[entry.name].element_size()
