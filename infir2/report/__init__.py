"""From the metrics of one or several runs to one HTML file that needs nothing but a browser."""

from infir2.report.chain import is_chain, write_chain_report
from infir2.report.html import write_report

__all__ = ["is_chain", "write_chain_report", "write_report"]
