"""The run report: one HTML page, self-contained, made from what the run folder holds."""

from unirg.report.build import build
from unirg.report.samples import write_samples

__all__ = ["build", "write_samples"]
