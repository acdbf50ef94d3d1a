"""Compile a packed classifier ahead of time for programs without Python: `python export.py PACKED_DIR OUT_DIR`.

OUT_DIR gets model.pt2 (AOTInductor's package), the kernels' library, the schemas of the operators used, and inputs with the logits
that PyTorch gives for them, which run_model checks:

    cmake -S examples/cpp -B build -DCMAKE_PREFIX_PATH=$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')
    cmake --build build && build/run_model OUT_DIR
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import sparse_prune as sp

SHAPES = ((1, 16), (3, 40))  # batch and length of the inputs to check; neither is what the model was exported with


class Logits(nn.Module):
    """input_ids int64 [B, T], no padding -> logits [B, num_labels]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits


@torch.no_grad()
def export(packed: Path, out: Path) -> None:
    """Write what the module's docstring lists."""
    out.mkdir(parents=True, exist_ok=True)
    net = AutoModelForSequenceClassification.from_pretrained(packed)
    sp.unfuse_encoder_(net)  # the fused encoder is for eager calls
    model = Logits(net).eval()
    vocabulary = net.config.vocab_size
    example = torch.randint(vocabulary, (2, 24))
    model(example)  # derives the layout that the kernels read, so that it goes into the package
    dynamic = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(model, (example,), dynamic_shapes=dynamic)
    torch._inductor.aoti_compile_and_package(program, package_path=str(out / "model.pt2"))
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    used = [op for op in targets if getattr(op, "namespace", "") == "sparse_prune"]
    (out / "operators.txt").write_text("\n".join(str(op._schema) for op in used))
    library = next(Path(sp.__file__).parent.glob("_C_cpu*.so"))
    shutil.copy(library, out / "_C_cpu.so")
    sizes = torch.tensor(SHAPES)
    (out / "shapes.bin").write_bytes(sizes.numpy().tobytes())
    for i, shape in enumerate(SHAPES):
        ids = torch.randint(vocabulary, shape)
        (out / f"ids{i}.bin").write_bytes(ids.numpy().tobytes())
        (out / f"logits{i}.bin").write_bytes(model(ids).contiguous().numpy().tobytes())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python export.py PACKED_DIR OUT_DIR")
    export(Path(sys.argv[1]), Path(sys.argv[2]))
