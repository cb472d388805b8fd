"""Conflicts, a budget and a random generator -> queries: which answers to ask people about.

`pool_from_tables` builds a `Pool` from a run's tables, `select` spends a budget of judgements on it by a strategy,
`queries_table` gives the outcome as a table. Pure: nothing here reads or writes a file.
"""

from dissonance.selection.pool import Pool, pool_from_tables
from dissonance.selection.selection import Selection, queries_table, select
from dissonance.selection.strategies import STRATEGIES, Strategy
from dissonance.selection.thresholds import Threshold, Thresholds, parse_threshold

__all__ = [
    "STRATEGIES",
    "Pool",
    "Selection",
    "Strategy",
    "Threshold",
    "Thresholds",
    "parse_threshold",
    "pool_from_tables",
    "queries_table",
    "select",
]
