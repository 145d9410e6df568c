"""The report of a run: the files of a finished run folder in, one HTML page and PNG plots out."""

from qlora_kit.report.png import can_plot
from qlora_kit.report.record import RECORD_FILE, Answer, Record, Run, Sample, SplitData, read_run
from qlora_kit.report.writing import PLOT_FILES, REPORT_FILE, write_plots, write_report

__all__ = [
    "PLOT_FILES",
    "RECORD_FILE",
    "REPORT_FILE",
    "Answer",
    "Record",
    "Run",
    "Sample",
    "SplitData",
    "can_plot",
    "read_run",
    "write_plots",
    "write_report",
]
