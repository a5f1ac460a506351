"""``report.html``: one file, without a network, that shows what was run, what was found and what is wrong with it."""

from d2net.report.page.table import Table, comparison_page_table, evaluation_page_table
from d2net.report.page.write import NotInstalledError, check_installed, write_report

__all__ = [
    "NotInstalledError",
    "Table",
    "check_installed",
    "comparison_page_table",
    "evaluation_page_table",
    "write_report",
]
