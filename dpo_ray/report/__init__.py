"""One self-contained page that tells what happened in a run, or how runs differ."""

from dpo_ray.report.page import page_template, write_comparison, write_report

__all__ = ["page_template", "write_comparison", "write_report"]
