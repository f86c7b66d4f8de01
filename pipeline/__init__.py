"""Turns a LoRA into a model and a model into a LoRA, and proves the result.

import pipeline
report = pipeline.run("merge", base_model="BASE", adapter="ADAPTER", output="OUT")
report                  # in a notebook: the page; report.passed, report.plots, report.stands_at
pipeline.plan(...)      # what it would do
"""

from pipeline.api import plan, run
from pipeline.ground.errors import PipelineError, Refused

__all__ = ["PipelineError", "Refused", "plan", "run"]
