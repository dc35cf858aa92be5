"""Numbers, times and sizes as text, the same on the terminal, in the report and in its charts."""

from __future__ import annotations

import math

UNKNOWN = "-"


def number(value: float | None, digits: int = 4) -> str:
    """A fixed number of decimals; a dash for what is unknown."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share of 1 in percent; a dash for what is unknown."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{100 * value:.2f} %"


def counted(n: int, word: str) -> str:
    """A count with its noun: `1 fold`, `3 folds`."""
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}s"


def duration(seconds: float) -> str:
    """Seconds as 12s, 3m05s, 2h07m or 3d04h."""
    total = round(max(seconds, 0.0))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"


def difference(value: float | None) -> str:
    """A difference with its sign; four decimals, or as many as its first two digits need."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    return f"{value:+.4f}" if abs(value) >= 1e-3 else f"{value:+.1e}"


def file_size(n_bytes: int) -> str:
    """Bytes as 999 B, 12.3 kB or 1.23 GB: three digits, powers of 1000."""
    value, unit = float(n_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def milliseconds(value: float) -> str:
    """Milliseconds as 0.042 ms, 12.3 ms or 1,230 ms."""
    return f"{value:,.0f} ms" if value >= 999.5 else f"{value:.3g} ms"
