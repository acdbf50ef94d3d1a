"""Measure the table that ships with the package: python bench/shipped_table.py [--isa avx2] [--seconds 0.2] [--cpu NAME].

One `sparse-prune tune` per instruction set of this processor, each with oneDNN and MKL held to the same set, so that a row says
what a processor of that kind would see. Rows of sets that this processor lacks, or that --isa leaves out, stay as another machine
measured them. The parts are kept under runs/tuning/, so that a run that was stopped goes on.
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
    "amx_bf16": ("AVX512_CORE_AMX", "AVX512"),
    "avx512_bf16": ("AVX512_CORE_BF16", "AVX512"),
    "avx512": ("AVX512_CORE", "AVX512"),
    "avx2": ("AVX2", "AVX2"),
    "portable": ("SSE41", "SSE4_2"),
}


def merged(shipped: dict, parts: dict[str, dict]) -> tuple[dict, list[dict], dict[str, dict]]:
    """The machine, rows and other machines (by instruction set) of the shipped table with parts in place of its own sets."""
    rows = {isa: [row for row in part["rows"] + part["forms"] if row["isa"] == isa] for isa, part in parts.items()}
    machines = {isa: part["machine"] for isa, part in parts.items()}
    for row in shipped["rows"] + shipped["forms"]:
        if row["isa"] not in parts:
            rows.setdefault(row["isa"], []).append(row)
            machines[row["isa"]] = shipped.get("machines", {}).get(row["isa"], shipped["machine"])
    best_first = sorted(rows, key=backends.ISAS.index)
    about = machines[best_first[0]]
    others = {isa: machines[isa] for isa in best_first if machines[isa] != about}
    return about, [row for isa in best_first for row in rows[isa]], others


def main() -> None:
    """Measure the sets that were asked for, and write the shipped table with them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", help="sets to measure, comma-separated; all of this processor if left out")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--seconds", default="0.2")
    parser.add_argument("--cpu", help="this processor's name in the table, where its own tells too little")
    options = parser.parse_args()
    parts = {}
    for isa in options.isa.split(",") if options.isa else backends.cpu_isas():
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
        parts[isa] = json.loads(part.read_text(encoding="utf-8"))
        if options.cpu:
            parts[isa]["machine"]["cpu"] = options.cpu
    if not parts:
        parser.error(f"--isa {options.isa}: none of {', '.join(HELD)}")
    out = Path(planner.__file__).with_name("tuning.json")
    about, rows, machines = merged(json.loads(out.read_text(encoding="utf-8")), parts)
    write_table(out, about, rows, machines=machines)


if __name__ == "__main__":
    main()
