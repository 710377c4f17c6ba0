"""Numbers for people: three significant digits and a unit. Bytes are decimal (1 GB = 1e9 bytes)."""

from __future__ import annotations

import math

_LARGE = ("", "k", "M", "G", "T", "P", "E", "Z")
_SMALL = ("", "m", "u", "n", "p")


def digits(value: float) -> str:
    """``value`` to three significant digits, never in exponent form: 1.23, 12.3, 123, 1230, 0.0123."""
    if not math.isfinite(value):
        return "?"
    if value == 0:
        return "0"
    places = 2 - math.floor(math.log10(abs(value)))
    rounded = round(value, places)
    if abs(rounded) >= 10 ** (3 - places):  # 9.999 has become 10.0: one digit fewer
        places -= 1
    return f"{rounded:.{max(0, places)}f}"


def scaled(value: float, whole: bool = False) -> tuple[str, str]:
    """Mantissa and SI prefix, the mantissa from 1 to 999 after rounding: ``(1.23, "G")``.

    ``whole``: of what comes in whole pieces, with no prefix below one: there is no millibyte.
    """
    if value == 0 or not math.isfinite(value) or (whole and abs(value) < 0.9995):
        return digits(value), ""
    size = float(f"{abs(value):.2e}")  # round first, so that 999.6 k is 1.00 M
    group = math.floor(math.log10(size) / 3 + 1e-12)
    group = max(1 - len(_SMALL), min(len(_LARGE) - 1, group))
    prefix = _LARGE[group] if group >= 0 else _SMALL[-group]
    return digits(value / 1000.0**group), prefix


def seconds(value: float) -> str:
    """``12.3 us``, ``4.56 ms``, ``1.20 s``; above a second only seconds."""
    if value >= 999.5:
        return f"{count(value)} s"
    number, prefix = scaled(value)
    return f"{number} {prefix}s"


def span(low: float, high: float) -> str:
    """``63.6-82.5 ms``; each end with its unit where they differ."""
    start, end = seconds(low), seconds(high)
    number, _, unit = start.partition(" ")
    return f"{number}-{end}" if end.endswith(f" {unit}") else f"{start} - {end}"


def nbytes(value: float) -> str:
    """``4.56 GB``."""
    number, prefix = scaled(value, whole=True)
    return f"{number} {prefix}B"


def flops(value: float) -> str:
    """``1.20 TFLOP``."""
    number, prefix = scaled(value, whole=True)
    return f"{number} {prefix}FLOP"


def flop_rate(value: float) -> str:
    """``989 TFLOP/s``."""
    return f"{flops(value)}/s"


def byte_rate(value: float) -> str:
    """``4.80 TB/s``."""
    return f"{nbytes(value)}/s"


def short(value: float) -> str:
    """A number and its prefix alone, for narrow columns under a header that says the unit: ``1.20T``; 0 is ``-``."""
    if value == 0:
        return "-"
    number, prefix = scaled(value, whole=True)
    return f"{number}{prefix}"


def parameters(value: float) -> str:
    """Parameter counts as publishers write them: ``671B``, ``36.6B``, ``568M``."""
    number, prefix = scaled(value, whole=True)
    return f"{number}{ {'G': 'B'}.get(prefix, prefix) }"


def count(value: float) -> str:
    """A whole number with thousands separated: ``56,482``; ``?`` where there is none."""
    return f"{round(value):,}" if math.isfinite(value) else "?"


def money(value: float) -> str:
    """US dollars: ``1.23``, ``92,412``."""
    return count(value) if abs(value) >= 100 else digits(value)


def rate(value: float) -> str:
    """Three significant digits at least, all of a larger number: ``1,765``, ``13.8``."""
    return count(value) if abs(value) >= 999.5 else digits(value)


def percent(share: float) -> str:
    """``28.5%``: one digit after the point; what is there but rounds to nothing is ``<0.1%``."""
    if not math.isfinite(share):
        return "?"
    return "<0.1%" if 0 < share < 0.0005 else f"{100 * share:.1f}%"


def chance(share: float) -> str:
    """``51 %``; what may happen or not is neither certain nor impossible: ``>99 %``, ``<1 %``; ``-`` where no limit is.
    """
    if share != share:
        return "-"
    return ">99 %" if share > 0.995 else "<1 %" if share < 0.005 else f"{100 * share:.0f} %"


def plural(number: float, what: str) -> str:
    """``1 sequence``, ``4,096 sequences``."""
    counted = count(number)
    return f"{counted} {what}{'' if counted == '1' else 's'}"


def worth(ratio: float) -> str:
    """Whether GPUs of their own are worth it, that bring ``ratio`` times what all together do: 5 % decide nothing."""
    return "worth it" if ratio > 1.05 else "not worth it" if ratio < 0.95 else "about the same"
