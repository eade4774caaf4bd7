"""One self-contained page that tells what happened in a run, or how runs differ."""

from dpo_ray.report.page import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
