"""The evaluation for people: a page, its charts, and a table for the terminal."""

from reptile.evaluate.report.page import render_report
from reptile.evaluate.report.summary import summary_table

__all__ = ["render_report", "summary_table"]
