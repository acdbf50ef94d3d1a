"""How long `import sparse_prune` takes beyond `import torch`: python bench/import_time.py [--processes 15].

Seconds by the clock, medians of fresh processes, after one that is not counted: it reads the files from the disk.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from sparse_prune.benchmark import machine

PROGRAM = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import sparse_prune
print(middle - start, time.perf_counter() - middle)
"""


def main() -> None:
    """Print both medians and the slowest process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=15)
    options = parser.parse_args()
    runs = []
    for _ in range(1 + options.processes):
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
        runs.append([float(seconds) for seconds in done.stdout.split()])
    about = machine()
    print(f"{about['cpu']}, torch {about['torch']}, python {about['python']}")
    for name, seconds in zip(("torch", "sparse_prune"), zip(*runs[1:], strict=True), strict=True):
        print(f"import {name:<13} {statistics.median(seconds):.3f} s, at most {max(seconds):.3f}")


if __name__ == "__main__":
    main()
