"""Numbers as people read them, the same on the console and in the report."""

from __future__ import annotations

import math


def number(value: float, digits: int = 3) -> str:
    """About `digits` significant digits: 0.0123, 4.57, 1,203, 3.1e-7."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    size = abs(value)
    if size == 0 or (isinstance(value, int) and size < 1e9):
        return f"{value:,.0f}"
    if size < 1e-3 or size >= 1e9:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:,.{decimals}f}"


def signed(value: float) -> str:
    """The same with its sign, always: +0.486, −1.41."""
    return f"{'−' if value < 0 else '+'}{number(abs(value))}"


def percent(value: float) -> str:
    """A fraction as per cent with one decimal: 41.5%."""
    return f"{100 * value:.1f}%" if math.isfinite(value) else number(value)


def duration(seconds: float) -> str:
    """0.42 s, 12.3 s, 3m 20s, 1h 04m, 2d 03h."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours < 48 else f"{hours // 24}d {hours % 24:02d}h"
