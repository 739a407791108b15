"""One self-contained HTML page about one or more runs."""

from imagewright.report.collect import RunSection, collect_run
from imagewright.report.page import ReportInputs, build_report, write_report

__all__ = ["ReportInputs", "RunSection", "build_report", "collect_run", "write_report"]
