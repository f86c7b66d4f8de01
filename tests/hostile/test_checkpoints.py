"""Base checkpoints that are broken, hostile or not what they seem: refused before a byte is written.

The rows of section 6 of the security page as crafted files, and what goes wrong with folders in daily life.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import making
from tests.command import ARGUMENTS, answer, listing, refusal, refused
from tests.making import (
    adapter_tensors,
    base_tensors,
    floats,
    llama_config,
    lora_config,
    safetensors_bytes,
    shard_name,
    with_header,
    write_adapter,
    write_base,
    write_index,
    write_json,
    write_shards,
)

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
UNPROVED = (*ARGUMENTS, "verify=none")


def base_refusal(here: Path) -> str:
    return refusal(here, *UNPROVED)


def weights(here: Path) -> Path:
    return here / "base" / "model.safetensors"


# Folders


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter")
    sentence = base_refusal(tmp_path)
    assert sentence.startswith("base_model: 'base' does not exist; give a folder, a GGUF file or a hub id")


def test_an_empty_folder_says_what_should_be_in_it(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    sentence = base_refusal(tmp_path)
    assert "base: is empty; a checkpoint folder holds config.json and model.safetensors" in sentence


def test_a_folder_without_config_is_refused(here: Path) -> None:
    (here / "base" / "config.json").unlink()
    assert "base: has no config.json" in base_refusal(here)


def test_a_folder_without_weights_is_refused(here: Path) -> None:
    weights(here).unlink()
    sentence = base_refusal(here)
    assert "base: holds no weights (model.safetensors, or model.safetensors.index.json with" in sentence


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
def test_pickles_are_never_read(here: Path, name: str) -> None:
    weights(here).rename(here / "base" / name)
    sentence = base_refusal(here)
    assert f"base: holds its weights as pickles ({name}), which can run code" in sentence
    assert "convert them to safetensors first" in sentence


def test_an_adapter_given_as_base_is_recognized(here: Path) -> None:
    sentence = refusal(here, "base_model=adapter", "adapter=adapter", "output=out", "verify=none")
    assert "adapter: holds an adapter, not a model; give it as adapter=" in sentence


def test_a_file_given_as_base_says_to_give_its_folder(here: Path) -> None:
    sentence = refusal(here, "base_model=base/model.safetensors", "adapter=adapter", "output=out")
    assert sentence == "base_model: 'base/model.safetensors' is a file; give its folder, or a .gguf file"


def test_a_git_lfs_pointer_says_how_to_get_the_weights(here: Path) -> None:
    weights(here).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e"
        "adbb8f32b1258daaa5e2ca24d17e2393\nsize 41528\n"
    )
    sentence = base_refusal(here)
    assert "model.safetensors: is a git-lfs pointer, not the weights; run `git lfs pull`" in sentence


def test_two_shard_sets_without_an_index_are_ambiguous(here: Path) -> None:
    weights(here).unlink()
    for name in ("a-00001-of-00001.safetensors", "b-00001-of-00001.safetensors"):
        (here / "base" / name).write_bytes(safetensors_bytes(base_tensors()))
    sentence = base_refusal(here)
    assert "base: holds 2 safetensors files but no model.safetensors.index.json that says" in sentence


def test_shards_that_the_index_does_not_name_do_not_count(tmp_path: Path) -> None:
    write_base(tmp_path / "base", num_shards=2)
    write_adapter(tmp_path / "adapter")
    stray = safetensors_bytes(base_tensors(seed=9))
    (tmp_path / "base" / "consolidated.safetensors").write_bytes(stray)
    assert answer(*ARGUMENTS, "verify=structure", cwd=tmp_path).status == 0
    written = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert written == [shard_name(1, 2), shard_name(2, 2)]


def test_one_file_under_another_name_says_what_it_should_be_called(here: Path) -> None:
    weights(here).rename(here / "base" / "weights.safetensors")
    sentence = base_refusal(here)
    assert "holds weights.safetensors but neither model.safetensors nor" in sentence
    assert "rename it to model.safetensors" in sentence


# config.json


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[]", "is not a table of fields"),
        ('"llama"', "is not a table of fields"),
        ("\udcff", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "is not JSON"),
        ("version https://git-lfs.github.com/spec/v1\n", "is not JSON"),
    ],
    ids=["cut", "empty", "list", "text", "bytes", "deep", "deep tables", "lfs"],
)
def test_a_config_that_cannot_be_read_is_named(here: Path, text: str, part: str) -> None:
    (here / "base" / "config.json").write_text(text, "utf-8", errors="surrogateescape")
    sentence = base_refusal(here)
    assert "config.json: " in sentence
    assert part in sentence


@pytest.mark.parametrize(
    "config",
    [
        llama_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        {"model_type": "x", "text_config": llama_config(quantization_config={"quant_method": "gptq"})},
    ],
    ids=["root", "nested"],
)
def test_a_config_that_promises_codes_of_plain_weights_is_not_believed(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    write_base(tmp_path / "base", config=config)
    write_adapter(tmp_path / "adapter")
    said = answer(*UNPROVED, cwd=tmp_path)
    assert said.status == 0, said
    assert "quant" not in (tmp_path / "out" / "config.json").read_text()


def test_a_config_that_has_code_fetched_is_refused(tmp_path: Path) -> None:
    # CVE-2026-4372: transformers before 5.3 downloads and runs the Hub kernel that this names.
    config = llama_config(_attn_implementation_internal="attacker/kernel")
    write_base(tmp_path / "base", config=config)
    write_adapter(tmp_path / "adapter")
    assert "_attn_implementation_internal" in base_refusal(tmp_path)


# One safetensors file


def crafted(
    change: dict[str, Any] | None = None, metadata: Any = None, drop: str | None = None, data: bytes = b""
) -> bytes:
    """The tiny base with q_proj's header entry changed."""
    whole = safetensors_bytes(base_tensors())
    length = int.from_bytes(whole[:8], "little")
    table = json.loads(whole[8 : 8 + length])
    if drop:
        del table[Q_PROJ][drop]
    table[Q_PROJ] |= change or {}
    if metadata is not None:
        table["__metadata__"] = metadata
    return with_header(table, whole[8 + length :] + data)


def offsets() -> tuple[int, int]:
    """Where q_proj's bytes lie."""
    whole = safetensors_bytes(base_tensors())
    begin, end = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])[Q_PROJ]["data_offsets"]
    return begin, end


BEGIN, END = offsets()


@pytest.mark.parametrize(
    ("file", "part"),
    [
        (b"", "is truncated or not a safetensors file"),
        (b"\x10\x00\x00", "is truncated or not a safetensors file"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "is truncated or not a safetensors file"),
        (b"<!DOCTYPE html><html>404</html>", "is truncated or not a safetensors file"),
        (b"PK\x03\x04" + b"\x00" * 64, "is truncated or not a safetensors file"),
        (safetensors_bytes(base_tensors())[:-1], "is truncated: 1 bytes are missing; fetch it again"),
        (safetensors_bytes(base_tensors())[:9000], "bytes are missing; fetch it again"),
        (crafted(data=b"hidden"), "6 bytes follow its last tensor"),
        (with_header("{", b""), "header is not JSON"),
        (with_header("[]", b""), "is not a table of fields"),
        (with_header("null", b""), "is not a table of fields"),
        (with_header("[" * 100_000, b""), "header is not JSON"),
        (with_header('{"a":' * 100_000, b""), "header is not JSON"),
        (with_header('{"a": ' + "9" * 5000 + "}", b""), "header is not JSON"),
        (with_header('{"a": 3}', b""), "tensor 'a' lacks dtype, shape or data_offsets"),
        (
            with_header('{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "a": {}}', b"1234"),
            "twice",
        ),
        (with_header('{"__metadata__": {"a": "b", "a": "c"}}', b""), "twice"),
        (crafted(metadata={"format": 3}), "is not a table of tensors and text"),
        (crafted(metadata=["pt"]), "is not a table of tensors and text"),
        (crafted(metadata="pt"), "is not a table of tensors and text"),
        (crafted(drop="dtype"), f"tensor '{Q_PROJ}' lacks dtype, shape or data_offsets"),
        (crafted(drop="shape"), f"tensor '{Q_PROJ}' lacks dtype, shape or data_offsets"),
        (crafted(drop="data_offsets"), f"tensor '{Q_PROJ}' lacks dtype, shape or data_offsets"),
        (crafted({"data_offsets": [BEGIN]}), f"tensor '{Q_PROJ}' lacks dtype, shape or data_offsets"),
        (crafted({"data_offsets": "ab"}), "that is not a natural number"),
        (crafted({"shape": 1024}), f"tensor '{Q_PROJ}' lacks dtype, shape or data_offsets"),
        (crafted({"dtype": "Q9"}), "has dtype 'Q9', which this version does not know"),
        (crafted({"dtype": ["BF16"]}), "has dtype ['BF16'], which this version does not know"),
        (crafted({"shape": [32, -32]}), "that is not a natural number"),
        (crafted({"shape": [32.0, 32]}), "that is not a natural number"),
        (crafted({"shape": [True, 1024]}), "that is not a natural number"),
        (crafted({"shape": ["32", 32]}), "that is not a natural number"),
        (crafted({"data_offsets": [-2, END]}), "that is not a natural number"),
        (crafted({"shape": [32, 31]}), "has 2048 bytes, which is not BF16 [32, 31]"),
        (crafted({"shape": [2**62, 2**62]}), "has 2048 bytes, which is not BF16"),
        (crafted({"shape": [2**63 + 512, 2]}), "has 2048 bytes, which is not BF16"),
        (crafted({"dtype": "F32"}), "has 2048 bytes, which is not F32 [32, 32]"),
        (crafted({"dtype": "F4", "shape": [1, 3]}), "which is not F4 [1, 3]"),
        (crafted({"data_offsets": [END, BEGIN]}), "has -2048 bytes"),
        (crafted({"data_offsets": [BEGIN - 2, END - 2]}), "leaves a hole or overlaps another one"),
        (crafted({"data_offsets": [BEGIN + 2, END + 2]}), "leaves a hole or overlaps another one"),
        (crafted({"data_offsets": [0, 2048]}), "leaves a hole or overlaps another one"),
        (crafted({"data_offsets": [10**9, 10**9 + 2048]}), "leaves a hole or overlaps another one"),
        (crafted({"dtype": "BF16", "shape": [0, 32], "data_offsets": [BEGIN, BEGIN]}), "leaves a hole"),
    ],
)
def test_a_malformed_safetensors_file_is_refused(here: Path, file: bytes, part: str) -> None:
    weights(here).write_bytes(file)
    sentence = base_refusal(here)
    assert "base/model.safetensors: " in sentence
    assert part in sentence


def test_the_crafted_files_differ_from_a_sound_one_only_in_their_fault(here: Path) -> None:
    weights(here).write_bytes(crafted())
    assert answer(*UNPROVED, "dry_run=true", cwd=here).status == 0


@pytest.mark.parametrize("length", [100_000_001, 2**40, 2**64 - 1])
def test_a_header_beyond_the_formats_limit_is_refused_before_it_is_read(here: Path, length: int) -> None:
    import resource

    with weights(here).open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(300_000_000)  # sparse: as long as it claims, in the first case
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "model.safetensors: is truncated or not a safetensors file" in base_refusal(here)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a/b", "..", "CON", "x" * 300])
def test_a_tensor_name_is_never_a_file_name(here: Path, name: str) -> None:
    write_base(here / "base", base_tensors() | {name: floats("BF16", np.ones((2, 2)))})
    before = listing(here)
    assert answer(*ARGUMENTS, "verify=structure", cwd=here).status == 0
    assert {p.partition("/")[0] for p in listing(here).keys() - before.keys()} == {"out"}


def test_a_sentence_stays_one_line_whatever_a_tensor_is_called(here: Path) -> None:
    name = "a\nerror: all is well\x1b[2J"
    weights(here).write_bytes(with_header({name: {}}, b""))
    sentence = base_refusal(here)
    assert "\x1b" not in sentence


# Index and shards


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """As `here`, the base in two shards."""
    write_base(tmp_path / "base", num_shards=2)
    write_adapter(tmp_path / "adapter")
    return tmp_path


def weight_map(here: Path) -> dict[str, Any]:
    table = json.loads((here / "base" / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    assert isinstance(table, dict)
    return table


def test_an_index_that_names_a_missing_shard_is_refused(sharded: Path) -> None:
    (sharded / "base" / shard_name(2, 2)).unlink()
    sentence = base_refusal(sharded)
    assert "index.json: names model-00002-of-00002.safetensors, which is not in the folder" in sentence


def test_a_truncated_shard_is_refused(sharded: Path) -> None:
    path = sharded / "base" / shard_name(2, 2)
    path.write_bytes(path.read_bytes()[:-100])
    sentence = base_refusal(sharded)
    assert "model-00002-of-00002.safetensors: is truncated: 100 bytes are missing" in sentence


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "../../etc/passwd",
        "/etc/passwd",
        "/tmp/model.safetensors",
        "shards/model.safetensors",
        "..\\model.safetensors",
        "./model.safetensors",
        "..",
        "",
        "pytorch_model.bin",
        "model.safetensors\x00.txt",
        3,
        None,
        ["model.safetensors"],
        {"file": "model.safetensors"},
    ],
)
def test_an_index_names_plain_safetensors_files_alone(sharded: Path, shard: Any) -> None:
    (sharded / "model.safetensors").write_bytes(safetensors_bytes(base_tensors()))  # what ../ would find
    write_index(sharded / "base", weight_map(sharded) | {Q_PROJ: shard})
    sentence = base_refusal(sharded)
    assert f"index.json: '{Q_PROJ}' lies in {shard!r}, which is not a plain safetensors file name" in sentence


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is not JSON"),
        ("[]", "is not a table of fields"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map, a table"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "twice"),
        ("[" * 100_000, "is not JSON"),
    ],
    ids=["empty", "list", "table", "no map", "empty map", "twice", "deep"],
)
def test_an_index_that_cannot_be_read_is_refused(sharded: Path, text: str, part: str) -> None:
    (sharded / "base" / "model.safetensors.index.json").write_text(text)
    sentence = base_refusal(sharded)
    assert "index.json: " in sentence
    assert part in sentence


def test_an_index_that_promises_a_tensor_its_shard_lacks_is_refused(sharded: Path) -> None:
    write_index(sharded / "base", weight_map(sharded) | {"model.more.weight": shard_name(2, 2)})
    sentence = base_refusal(sharded)
    assert "model-00002-of-00002.safetensors: lacks tensor 'model.more.weight', unlike" in sentence


def test_a_shard_with_a_tensor_that_the_index_does_not_list_is_refused(sharded: Path) -> None:
    listed = weight_map(sharded)
    del listed["lm_head.weight"]
    write_index(sharded / "base", listed)
    sentence = base_refusal(sharded)
    assert "model-00002-of-00002.safetensors: holds tensor 'lm_head.weight', unlike" in sentence


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    tensors = base_tensors()
    write_adapter(tmp_path / "adapter")
    folder = write_base(tmp_path / "base", tensors, num_shards=2)
    first, names = folder / shard_name(1, 2), list(tensors)
    doubled = [*names[: len(names) // 2], "lm_head.weight"]
    first.write_bytes(safetensors_bytes({name: tensors[name] for name in doubled}))
    assert "holds tensor 'lm_head.weight', unlike" in base_refusal(tmp_path)


def test_a_single_file_is_read_though_an_old_index_stands_beside_it(here: Path) -> None:
    write_shards(here / "base", base_tensors(seed=9), 2)
    assert answer(*ARGUMENTS, "verify=structure", cwd=here).status == 0
    assert [p.name for p in (here / "out").glob("*.safetensors*")] == ["model.safetensors"]


# Values


def failed(here: Path, *arguments: str) -> str:
    """The sentence of a run that must fail while it is at work (exit status 1) and leave nothing."""
    before = listing(here)
    said = answer(*ARGUMENTS, *arguments, cwd=here)
    assert said.status == 1, said
    assert listing(here) == before
    [sentence] = said.errors
    return sentence


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("verify", ["none", "structure"])
def test_a_merged_weight_that_is_not_finite_fails_the_run(here: Path, value: float, verify: str) -> None:
    tensors = base_tensors()
    numbers = np.full((32, 32), 0.5)
    numbers[31, 7] = value
    write_base(here / "base", tensors | {Q_PROJ: floats("BF16", numbers)})
    sentence = failed(here, f"verify={verify}")
    assert sentence.startswith(f"{Q_PROJ}: holds values that are not finite in the output")


def test_an_adapter_with_a_nan_fails_the_run(here: Path) -> None:
    tensors = adapter_tensors()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    write_adapter(here / "adapter", tensors | {name: floats("F32", np.full((4, 32), np.nan))})
    assert failed(here, "verify=none").startswith(f"{Q_PROJ}: holds values that are not finite")


def test_a_merged_weight_beyond_float16_fails_the_run_and_names_a_wider_dtype(here: Path) -> None:
    write_base(here / "base", base_tensors() | {Q_PROJ: floats("BF16", np.full((32, 32), 1e6))})
    sentence = failed(here, "verify=none", "save.dtype=float16")
    assert "not finite" in sentence
    assert "save.dtype=bfloat16 has a wider range" in sentence


def test_an_untouched_weight_beyond_float16_is_not_made_infinite_in_silence(here: Path) -> None:
    write_base(here / "base", base_tensors() | {"lm_head.weight": floats("BF16", np.full((64, 32), 1e6))})
    sentence = failed(here, "verify=structure", "save.dtype=float16")
    assert sentence.startswith("lm_head.weight: ")


def test_an_untouched_weight_keeps_its_nan(here: Path) -> None:
    numbers = np.full((64, 32), np.nan)
    write_base(here / "base", base_tensors() | {"lm_head.weight": floats("BF16", numbers)})
    assert answer(*ARGUMENTS, "verify=structure", cwd=here).status == 0


# Several at once


def test_all_that_is_wrong_is_told_at_once(here: Path) -> None:
    (here / "base" / "config.json").unlink()
    write_json(here / "adapter" / "adapter_config.json", lora_config(use_qalora=True, r=0))
    (here / "out").mkdir()
    sentences = refused(here, *ARGUMENTS)
    assert len(sentences) == 4
    for part in ("has no config.json", "use_qalora", "r is 0", "output: 'out' exists already"):
        assert any(part in sentence for sentence in sentences), sentences


def test_a_base_that_changes_while_it_is_used_fails_the_run(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stages.save import merged

    plain = merged.write_shards

    def meddled(*arguments: Any) -> Any:
        weights(here).write_bytes(safetensors_bytes(making.base_tensors(seed=7)) + b"\x00")
        return plain(*arguments)

    monkeypatch.setattr(merged, "write_shards", meddled)
    said = answer(*UNPROVED, cwd=here)
    assert said.status == 1
    assert "model.safetensors: changed while the run was using it; start again" in said.err
    assert not (here / "out").exists()
    assert not (here / "out.partial").exists()
