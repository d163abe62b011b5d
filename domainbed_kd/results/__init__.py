"""From runs' folders to numbers to pages: records, model selection, tables, notes, plots.

`to_frame` gives all records as a pandas DataFrame, `load_logits` the predictions that a run kept;
see docs/analysis.md.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from domainbed_kd.results.logits import load_logits, to_frame

__all__ = ["to_frame", "load_logits"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from domainbed_kd.results import logits  # it needs NumPy

        return getattr(logits, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
