"""The variants of a fold trial that every part knows by name; snapshots and soups have their own.

Imports nothing: the blend uses it without the records.
"""

from __future__ import annotations

RAW = "raw"
"""The weights as they were trained."""
EMA = "ema"
"""Their exponential moving average."""
