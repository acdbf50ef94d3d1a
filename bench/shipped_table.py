"""Measure the table that ships with the package: python bench/shipped_table.py [--threads 1] [--seconds 0.2].

One `sparse-prune tune` per instruction set of this processor, each with oneDNN and MKL held to the same set, so that a row says
what a processor of that kind would see. The parts are kept under runs/tuning/, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from sparse_prune import backends, planner
from sparse_prune.tuning import write_table

# What oneDNN and MKL call the same instructions; each dtype has rows for the sets that its kernels can use.
HELD = {
    "avx512_bf16": ("AVX512_CORE_BF16", "AVX512"),
    "avx512": ("AVX512_CORE", "AVX512"),
    "avx2": ("AVX2", "AVX2"),
    "portable": ("SSE41", "SSE4_2"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default="1")
    parser.add_argument("--seconds", default="0.2")
    options = parser.parse_args()
    rows, about = [], {}
    for isa in backends.cpu_isas():
        if isa not in HELD:
            print(f"{isa}: left out, nobody has compared it with a dense product held to it")
            continue
        part = Path("runs/tuning") / f"{isa}.json"
        if not part.exists():
            onednn, mkl = HELD[isa]
            held = {"ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}
            command = [sys.executable, "-m", "sparse_prune", "tune", "--isa", isa, "--out", str(part)]
            command += ["--threads", options.threads, "--seconds", options.seconds]
            subprocess.run(command, check=True, env=os.environ | held)
        planner.load_table(part)
        data = json.loads(part.read_text(encoding="utf-8"))
        about = about or data["machine"]
        rows += data["rows"] + data["forms"]
    write_table(Path(planner.__file__).with_name("tuning.json"), about, rows)


if __name__ == "__main__":
    main()
