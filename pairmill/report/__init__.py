"""One self-contained HTML file about a corpus and a run."""

from pairmill.report.page import build

__all__ = ["build"]
