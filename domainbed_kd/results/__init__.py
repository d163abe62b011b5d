"""From runs' folders to numbers to pages: records, model selection, tables, notes, plots.

`to_frame` gives every record as a pandas DataFrame, `load_logits` the predictions that a run
kept; see docs/analysis.md.
"""

_LOGITS = ("to_frame", "load_logits")
__all__ = [*_LOGITS]


def __getattr__(name: str):
    if name in _LOGITS:
        from domainbed_kd.results import logits  # it needs NumPy

        return getattr(logits, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
