"""Weights that no delta reaches, in an output: the base's very bytes, or codes of its values made anew.

A base of codes may have been written in its own format again: then the codes of what was not merged are the
base's (save.quantize=keep), or what the format makes of the values that they mean. A manifest tells which. In
a folder without one, bytes that are not the base's must be exactly what would be written here; or, where
most of the untouched codes are others than the base's, every row as near as such codes come.
"""

from __future__ import annotations

from math import lcm

from pipeline.ground import tiles
from pipeline.ground.codes.code import Code
from pipeline.ground.codes.encoders.schemes import written_anew
from pipeline.ground.compare import different
from pipeline.ground.files import as_bytes, read_into
from pipeline.ground.parallel import plain_arithmetic
from pipeline.ground.report import Action, Gate, Status
from pipeline.ground.shards import Entry
from pipeline.ground.written import Written
from pipeline.output.quantizing import sources_of
from pipeline.verification.recomputing import other_values
from pipeline.weight import Output, Weight


def untouched(output: Output) -> Gate:
    """Weights that are copied hold the base's bytes; those that may be encoded anew, those or its values."""
    sources = {name: entry for w in output.merged.weights for name, entry in sources_of(w).items()}
    copied = [w for w in output.plan.weights if w.action is Action.copied]
    wrong = different(output.folder, copied, sources)
    either = {w.name for w in copied if w.encoder}
    anew = either & wrong.keys()
    for name in anew - _not_encoded(output, anew, as_written=2 * len(anew) < len(either)):
        del wrong[name]
    wanted = "the base's bytes" + (", or codes of its values" if either else "")
    if wrong:
        first = next(iter(wrong.values()))
        return Gate("untouched", Status.failed, f"{first} differs ({len(wrong)} weights)", wanted)
    same = len(copied) - len(anew)
    told = [f"{same} weights identical"] if same else []
    told += [f"{len(anew)} quantized anew"] if anew else []
    return Gate("untouched", Status.passed, ", ".join(told) or "no weight is copied", wanted)


def _not_encoded(output: Output, names: set[str], as_written: bool) -> set[str]:
    """Those whose codes are not the base's values encoded anew; `as_written` here, to the byte."""
    weights = [w for w in output.merged.weights if w.name in names]
    codes = Written(output.folder).codes if weights else {}
    with plain_arithmetic():
        others = [w for w in weights if not _is_written_anew(w, codes[w.name])]
    return {w.name for w in others} if as_written else set(other_values(output, others, every=True))


def _is_written_anew(weight: Weight, code: Code) -> bool:
    """Whether these are the very bytes that save.quantize makes of the weight."""
    encoder = written_anew(weight.name, code)
    if encoder is None:
        return False
    entries = {entry.name: entry for entry in code.entries}
    main, sides = entries[encoder.parts[0].name], []
    with weight.open("cpu") as rows, encoder.open("cpu") as encode:
        for start, stop in tiles.grid(weight.num_rows, weight.num_columns, lcm(weight.grain, encoder.grain)):
            encoded = encode(rows(start, stop).value.float(), start, None)
            if not _holds(main, encoder.offset(start), as_bytes(encoded.codes)):
                return False
            sides.append(encoded.sides)
    return all(_holds(entries[name], 0, as_bytes(t)) for name, t in encoder.finish(sides).items())


def _holds(entry: Entry, offset: int, wanted: memoryview) -> bool:
    """Whether a tensor of a file has these bytes there."""
    found = memoryview(bytearray(len(wanted)))
    if offset + len(wanted) > entry.extent.length:
        return False
    with entry.extent.file.opened() as descriptor:
        read_into(descriptor, entry.extent.offset + offset, found)
    return found == wanted.cast("B")
