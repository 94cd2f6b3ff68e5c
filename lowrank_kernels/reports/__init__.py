"""What of a model an optimizer projects, what it does not and why, and the bytes of all of it.

report.py: report; rows.py: what it holds; measured.py: bytes and refreshes of one parameter; reasons.py: why
a parameter is not projected; text.py: the tables.
"""

from .report import report
from .rows import Bytes, Group, Parameter, Report, Unprojected

__all__ = ["Bytes", "Group", "Parameter", "Report", "Unprojected", "report"]
