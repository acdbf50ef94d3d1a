"""How long a packed Hugging Face model takes to load, and what memory it grows by, beside the dense one: time, then peak.

    python bench/load.py MODEL_DIR [--density 0.2] [--dtype float32] [--as float32]

MODEL_DIR is a dense encoder. Both are saved in --dtype, loaded in turns by AutoModel.from_pretrained (as dtype --as), and run once
on 16 tokens, for a mapped file is only read when it is used. Medians of 15 loads. Memory is the growth of a process's peak, in a
fresh one each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

TOKENS, TURNS = 16, 15


def load(path: Path, dtype: str) -> tuple[float, float]:
    """Milliseconds until the model is there, and until it has run once."""
    from transformers import AutoModel

    start = time.perf_counter()
    model = AutoModel.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    there = time.perf_counter()
    with torch.inference_mode():
        model(torch.arange(1, 1 + TOKENS).view(1, TOKENS))
    return (there - start) * 1e3, (time.perf_counter() - start) * 1e3


def kilobytes(key: str) -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)


def peak(path: Path, warm_up: Path, dtype: str) -> float:
    """MiB by which loading path and running it once raises the peak of this process."""
    load(warm_up, dtype)
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    load(path, dtype)
    return (kilobytes("VmHWM") - before) / 1024


def main() -> None:
    """Save both, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--as", dest="into", help="the dtype to load in; default: --dtype")
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.into = options.into or options.dtype
    import transformers
    from transformers import AutoModel

    import sparse_prune as sp

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if options.peak_of:
        print(json.dumps(peak(options.peak_of, options.model, options.into)))
        return
    with tempfile.TemporaryDirectory() as folder:
        small = transformers.BertConfig(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=64
        )
        paths = {name: Path(folder, name) for name in ("dense", "sparse", "small")}
        transformers.BertModel(small).save_pretrained(paths["small"])
        model = AutoModel.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
        model.save_pretrained(paths["dense"])
        sp.sparsify_(model, sp.BlockSparseConfig(density=options.density))
        model.save_pretrained(paths["sparse"])
        times = {name: [] for name in ("dense", "sparse")}
        for _ in range(TURNS + 1):
            for name in times:
                times[name].append(load(paths[name], options.into))
        print(
            f"{sp.backends.cpu_name()}, torch {torch.__version__}, transformers {transformers.__version__}, one thread"
        )
        for name, turns in times.items():
            there, ran = (statistics.median(column) for column in zip(*turns[1:], strict=True))
            arguments = [
                sys.executable,
                __file__,
                str(paths["small"]),
                "--peak-of",
                str(paths[name]),
                "--as",
                options.into,
            ]
            grew = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
            size = (paths[name] / "model.safetensors").stat().st_size / 2**20
            print(
                f"{name:<7} load {there:6.1f} ms, load and first forward {ran:6.1f} ms, "
                f"file {size:6.1f} MiB, peak grows by {grew:6.1f} MiB"
            )


if __name__ == "__main__":
    main()
