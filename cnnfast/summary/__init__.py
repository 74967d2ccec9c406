"""What a network computes and moves, layer by layer and stage by stage, and what this machine needs for that at least.

`summarize` finds it without weights; `Report` adds the machine's ceilings; tables.py and plots.py show it.
"""

from cnnfast.summary.figures import Ceilings, Figures, Report, to_csv, to_json
from cnnfast.summary.network import Block, Summary, summarize

__all__ = ["Block", "Ceilings", "Figures", "Report", "Summary", "summarize", "to_csv", "to_json"]
