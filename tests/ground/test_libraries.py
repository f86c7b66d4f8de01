"""What other libraries log stays off the terminal while they work for us, and only then."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pipeline.ground.libraries import quiet
from tests.command import ARGUMENTS, run

NOISY = logging.getLogger("bitsandbytes.backends.cpu.ops")


def test_a_run_says_nothing_on_stderr_that_is_not_its_own(here: Path) -> None:
    """PEFT imports bitsandbytes, which logs what it does not find, as it is imported."""
    pytest.importorskip("bitsandbytes")
    said = run(*ARGUMENTS, "verify.tokens=32", cwd=here)
    assert (said.returncode, said.stderr) == (0, "")
    assert "logits: KL" in said.stdout
    tuned = ["recipe=extract", "base_model=base", "finetune=out", "output=lora", "rank=4"]
    said = run(*tuned, "verify=structure", cwd=here)
    assert (said.returncode, said.stderr) == (0, "")


def test_a_library_is_quiet_within_and_as_it_was_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    with quiet():
        NOISY.warning("within")
        NOISY.error("wrong")
    NOISY.warning("after")
    assert [record.message for record in caplog.records] == ["wrong", "after"]
    assert logging.getLogger("bitsandbytes").level == logging.NOTSET


def test_whoever_asked_for_more_gets_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bitsandbytes"), quiet():
        NOISY.info("within")
    assert [record.message for record in caplog.records] == ["within"]
