"""``report.html`` beside a compressed model: what was done to which expert, and what it cost."""

from pathlib import Path
from typing import Any

from moeforge.analyze.report import environment
from moeforge.compress.plan import Plan, Row
from moeforge.config import Tree

STRENGTH = {16: 100, 8: 75, 4: 55, 3: 40, 2: 26, "vector": 20, "ternary": 14, "coded": 7}
"""Percent of colour of a cell."""


def page(report: Tree, plan: Plan, title: str) -> str:
    """The page, complete in itself. Raises UserError where jinja2 is missing."""
    quality, before, after = report["quality"], report["bytes_before"], report["bytes"]
    whole_before, whole_after = sum(before.values()), sum(after.values())
    grown = quality["bits_after"] / quality["bits_before"] - 1
    smaller = f"{whole_before / whole_after:.2f} times smaller"
    cost = f"{grown:+.2%} bits per byte" if abs(grown) >= 5e-5 else "bits per byte as before"
    table = [(name, before[name], after[name]) for name in after] + [("all", whole_before, whole_after)]
    layers: dict[int, list[Row]] = {}
    for row in sorted(plan.rows, key=lambda row: row.place):
        layers.setdefault(row.layer, []).append(row)
    content: dict[str, Any] = {
        "title": title,
        "headline": f"{smaller}: {whole_after / 1e6:,.2f} MB of {whole_before / 1e6:,.2f} MB, {cost}.",
        "sizes": [
            {"name": name, "before": f"{b:,}", "after": f"{a:,}", "share": f"{a / b:.1%}" if b else ""}
            for name, b, a in table
        ],
        "bits": f"{report['bits_per_weight']:.3f}",
        "before": f"{quality['bits_before']:.4f}",
        "after": f"{quality['bits_after']:.4f} ({grown:+.2%})",
        "kl": f"{quality['kl']:.4f}",
        "agreement": f"{quality['agreement']:.1%}",
        "speed": f"{speed:,.0f}" if (speed := report["tokens_per_second"]) else "not written by the engine",
        "tokens": f"{quality['tokens']:,}",
        "calibration": f"{report['calibration_tokens']:,}",
        "for_text": report["rounding"] == "gptq",
        "scarce": ", ".join(f"{layer}.{e}" for layer, some in report["scarce_experts"].items() for e in some),
        "plan": [{"number": layer, "cells": [_cell(row) for row in rows]} for layer, rows in layers.items()],
    }
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    return environment().from_string(template).render(content)


def _cell(row: Row) -> dict[str, object]:
    if row.action == "drop":
        return {"text": "–", "title": f"expert {row.expert}: dropped", "strength": 0}
    if row.action == "merge_into":
        return {"text": "m", "title": f"expert {row.expert}: merged into {row.into}", "strength": 0}
    text = str(row.bits) if isinstance(row.bits, int) else row.bits[0]
    bits = f"{row.bits} bits" if isinstance(row.bits, int) else row.bits
    group = f", groups of {row.group}" if row.group else ""
    return {"text": text, "title": f"expert {row.expert}: {bits}{group}", "strength": STRENGTH[row.bits]}
