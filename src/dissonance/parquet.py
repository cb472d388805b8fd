"""Parquet files that are larger than memory."""

from pathlib import Path

import pyarrow.parquet as pq


def open_parquet(path: Path | str) -> pq.ParquetFile:
    """A file to read batch by batch. Arrow's own defaults keep all that was read of it, or whole row groups."""
    return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
