"""One inference engine, timed on request, inside the environment that `make peers` made for it (runs/peers/ENGINE).

python peers.py ENGINE answers each line of JSON on stdin with one on stdout. A request holds `model` (an ONNX file, or an
.npz file of linear layers w0 [N, K], b0 [N], w1, ... with relu between them), `inputs` (an .npz file of them by name),
`outputs` (the .npz file to write), `threads`, `seconds` and `dtype`; the answer holds `us`, the median microseconds of a
call, or `error`. The first line that an engine prints is {"ready": version}. This file needs the engine, onnx and numpy, and
nothing of sparse-prune.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def linear_onnx(layers: dict[str, np.ndarray], tokens: int, path: Path) -> None:
    """x [M, K] -> relu between the layers -> y, as a float32 ONNX graph with the weights as constants, zeros and all."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    count = sum(name.startswith("w") for name in layers)
    nodes, constants, now = [], [], "x"
    for i in range(count):
        constants.append(numpy_helper.from_array(np.ascontiguousarray(layers[f"w{i}"].T), f"w{i}"))
        constants.append(numpy_helper.from_array(layers[f"b{i}"], f"b{i}"))
        nodes.append(helper.make_node("MatMul", [now, f"w{i}"], [f"p{i}"]))
        nodes.append(helper.make_node("Add", [f"p{i}", f"b{i}"], [f"z{i}"]))
        now = f"z{i}"
        if i + 1 < count:
            nodes.append(helper.make_node("Relu", [now], [f"h{i}"]))
            now = f"h{i}"
    inputs = helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, layers["w0"].shape[1]])
    outputs = helper.make_tensor_value_info(now, TensorProto.FLOAT, [tokens, layers[f"w{count - 1}"].shape[0]])
    graph = helper.make_graph(nodes, "linear", [inputs], [outputs], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, str(path))


def deepsparse(path: str, inputs: dict[str, np.ndarray], threads: int, dtype: str) -> Callable[[], list[np.ndarray]]:
    if dtype != "float32":
        raise ValueError("DeepSparse runs float32")
    from deepsparse import Engine

    arrays = [np.ascontiguousarray(value) for value in inputs.values()]
    engine = Engine(path, batch_size=len(arrays[0]), num_cores=threads)
    return lambda: engine.run(arrays)


def onnxruntime(path: str, inputs: dict[str, np.ndarray], threads: int, dtype: str) -> Callable[[], list[np.ndarray]]:
    if dtype != "float32":
        raise ValueError("ONNX Runtime's CPU kernels run float32")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)


def openvino(path: str, inputs: dict[str, np.ndarray], threads: int, dtype: str) -> Callable[[], list[np.ndarray]]:
    hints = {"float32": "f32", "bfloat16": "bf16"}
    if dtype not in hints:
        raise ValueError("OpenVINO's CPU plugin runs float32 and bfloat16")
    import openvino as ov

    config = {"INFERENCE_PRECISION_HINT": hints[dtype], "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(path, "CPU", config | {"NUM_STREAMS": "1"}).create_infer_request()
    for name, value in inputs.items():
        request.set_tensor(name, ov.Tensor(value, shared_memory=True))

    def run() -> list[np.ndarray]:
        request.infer()
        return [output.data for output in (request.get_output_tensor(i) for i in range(len(request.model_outputs)))]

    return run


ENGINES = {"deepsparse": deepsparse, "onnxruntime": onnxruntime, "openvino": openvino}


def version(engine: str) -> str:
    from importlib.metadata import version as installed

    return f"{engine} {installed(engine)}"


def answer(engine: str, request: dict, folder: Path) -> dict:
    inputs = dict(np.load(request["inputs"]))
    path = Path(request["model"])
    if path.suffix == ".npz":
        layers, path = dict(np.load(path)), folder / "model.onnx"
        linear_onnx(layers, len(inputs["x"]), path)
    run = ENGINES[engine](str(path), inputs, request["threads"], request["dtype"])
    outputs = [np.array(value) for value in run()]
    np.savez(request["outputs"], *outputs)
    for _ in range(3):
        run()
    times, end = [], time.perf_counter() + request["seconds"]
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return {"us": statistics.median(times) * 1e6}


def main() -> None:
    engine = sys.argv[1]
    os.environ.setdefault("NM_DISABLE_ANALYTICS", "1")
    # Engines greet and warn on stdout, which belongs to the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": version(engine)}), file=answers, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            try:
                result = answer(engine, json.loads(line), Path(folder))
            except (
                Exception
            ) as error:  # an engine may raise anything: whoever asked is told, and may ask for something else
                result = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main()
