"""Numbers as people read them."""


def in_bytes(number: float) -> str:
    """``1.5 MB``: powers of 1000."""
    return _scaled(number, (" B", " kB", " MB", " GB", " TB"))


def short(number: float) -> str:
    """``1.23M``: for counts of parameters and operations."""
    return _scaled(number, ("", "k", "M", "G", "T"))


def in_seconds(number: float) -> str:
    """``12.3 ms``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if number >= size:
            return f"{number / size:,.4g} {unit}"
    return f"{number * 1e6:,.4g} us"


def _scaled(number: float, units: tuple[str, ...]) -> str:
    power = 0
    while number >= 1000 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    return f"{number:,.4g}{units[power]}"
