"""``moeforge demo`` over three seeds: does PR-MoE end below its dense twin each time? Writes ``demo_seeds.json``."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from report import write


def main() -> None:
    """Each seed in its own process, as a user would run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(parser.parse_args().seeds):
            out = Path(folder) / f"seed-{seed}"
            subprocess.run([sys.executable, "-m", "moeforge", "demo", f"--seed={seed}", f"--out={out}"], check=True)
            summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
            results[f"seed {seed}"] = summary
            print(seed, summary["dense"]["bits_per_byte"], summary["pr_moe"]["bits_per_byte"], flush=True)
    write("demo_seeds", results)


if __name__ == "__main__":
    main()
