"""One HTML file that shows what an adaptive model does: `write_report`."""

from acmize.report.page import write_report

__all__ = ["write_report"]
