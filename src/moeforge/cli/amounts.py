"""Numbers as people read them."""


def in_bytes(number: float) -> str:
    """``1.5 MB``: powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.4g} {unit}"
        number /= 1000
    return f"{number:,.4g} TB"


def short(number: float) -> str:
    """``1.23M``: for counts of parameters and operations."""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:,.4g}T"
