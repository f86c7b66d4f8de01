"""What the user reads when a run cannot go on. Everything else that escapes is a fault of ours."""

import re
from collections.abc import Iterable, Iterator

_FEW = 8  # sentences of one kind that are all told
_NAMES = re.compile(r"'[^']*'|\[[^\]]*\]|[\w-]+(\.[\w-]+)+")  # in quotes, of weights; and shapes


class PipelineError(Exception):
    """The run failed, or verification refused its result (exit status 1): one sentence."""


class Refused(PipelineError):  # noqa: N818  it reads like what happened
    """The request is wrong and nothing was written (exit status 2).

    Holds one sentence for each thing that is wrong: it names the key or file, the value, and what
    would be right.
    """

    def __init__(self, *sentences: str) -> None:
        super().__init__("\n".join(sentences))
        self.sentences = sentences

    @classmethod
    def together(cls, refusals: Iterable["Refused"]) -> "Refused":
        """One refusal that says all that these say, each sentence once."""
        return cls(*dict.fromkeys(s for refusal in refusals for s in refusal.sentences))


def each_once(sentences: Iterable[str]) -> Iterator[str]:
    """Sentences that differ in nothing but names and shapes, told of the first where there are many."""
    alike: dict[str, list[str]] = {}
    for sentence in sentences:
        alike.setdefault(_NAMES.sub("", sentence), []).append(sentence)
    for same in alike.values():
        yield from same if len(same) <= _FEW else [f"{same[0]} ({len(same)} of this kind)"]
