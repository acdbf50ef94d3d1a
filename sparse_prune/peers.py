"""Other inference runtimes, each in a Python environment of its own (`make peers`), driven over a pipe.

This file is both ends. `Peer` starts the environment's Python on this very file, which then imports nothing of sparse_prune.
Requests and answers are lines of JSON, tensors travel as files, and the worker times runs itself, so the pipe does not count.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RUNTIMES = {"openvino": ("float32", "bfloat16"), "onnxruntime": ("float32",), "deepsparse": ("float32",)}
TURNS = (5, 200)  # runs that a median is taken of, at least and at most


class PeerError(RuntimeError):
    """A peer that cannot start, or cannot run a model; the text says why."""


class Peer:
    """One runtime in a process of its own, with one model at a time. A context manager.

    runtime   a key of RUNTIMES
    python    the interpreter of the environment that has it
    threads   for OMP_NUM_THREADS; None: as it is

    version is that of the runtime's package. Every method raises PeerError: with what the runtime said, or where the process has
    ended, with the last line that it wrote.
    """

    def __init__(self, runtime: str, python: str | Path, threads: int | None = None) -> None:
        self.runtime = runtime
        self._folder = tempfile.TemporaryDirectory()
        self._log = open(Path(self._folder.name, "log"), "w+")  # noqa: SIM115
        omp = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [str(python), __file__, runtime],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={"NM_DISABLE_ANALYTICS": "1", **os.environ, **omp},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._asks, self._answers = self._process.stdin, self._process.stdout
        try:
            self.version: str = self._ask("hello")["version"]
        except BaseException:
            self.close()
            raise

    def _ask(self, command: str, **options: object) -> dict:
        """The answer to one request. Between requests the process is stopped: some runtimes' threads spin while they wait."""
        try:
            self._process.send_signal(signal.SIGCONT)
            self._asks.write(json.dumps({"command": command, **options}) + "\n")
            self._asks.flush()
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            code, said = self._process.wait(), self._log.read().strip().splitlines()
            raise PeerError(f"its process has ended with code {code}{': ' + said[-1][:300] if said else ''}")
        self._process.send_signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def load(self, model: str | Path, inputs: dict[str, Any], dtype: str, threads: int) -> None:
        """Take an .onnx file, whose inputs (name -> numpy array) fix the shapes it is compiled for; dtype is the precision that the
        runtime may compute in: "float32" or, where RUNTIMES lists it, "bfloat16"."""
        import numpy

        path = Path(self._folder.name, "inputs.npz")
        numpy.savez(path, **inputs)
        self._ask("load", model=str(model), inputs=str(path), dtype=dtype, threads=threads)

    def run(self) -> float:
        """One inference; its seconds by the worker's clock."""
        return self._ask("run")["seconds"]

    def time(self, seconds: float) -> float:
        """Median seconds of inferences one after another for about that time, after three to warm up."""
        return self._ask("time", seconds=seconds)["seconds"]

    def outputs(self) -> list[Any]:
        """The outputs of the last run, as numpy arrays."""
        import numpy

        path = Path(self._folder.name, "outputs.npz")
        self._ask("outputs", file=str(path))
        with numpy.load(path) as arrays:
            return [arrays[name] for name in arrays.files]

    def close(self) -> None:
        """End the process."""
        self._process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # what a process that has ended did not read
            self._asks.close()
        self._answers.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def installed(folder: str | Path | None) -> dict[str, Path]:
    """The runtimes whose environments `make peers` made in folder: name -> interpreter; none without a folder."""
    marks = sorted(Path(folder).glob("*/.installed")) if folder is not None else []
    return {mark.parent.name: mark.parent / "bin" / "python" for mark in marks}


def linear_onnx(weight: Any, bias: Any, tokens: int, path: Path) -> None:
    """Write y = x[M, K] @ weight[N, K]^T + bias[N] as a float32 ONNX graph with numpy weights as constants, zeros and all."""
    import numpy
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    constants = [numpy_helper.from_array(numpy.ascontiguousarray(weight.T), "w"), numpy_helper.from_array(bias, "b")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    inputs = helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, weight.shape[1]])
    outputs = helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, weight.shape[0]])
    graph = helper.make_graph(nodes, "linear", [inputs], [outputs], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, str(path))


def _openvino(options: dict, inputs: dict):
    import openvino

    model = openvino.Core().read_model(options["model"])
    model.reshape({name: list(array.shape) for name, array in inputs.items()})
    hints = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[options["dtype"]],
        "INFERENCE_NUM_THREADS": options["threads"],
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.compile_model(model, "CPU", hints).create_infer_request()
    for name, array in inputs.items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

    def run() -> list:
        request.infer()
        return [request.get_output_tensor(i).data for i in range(len(model.outputs))]

    return run


def _onnxruntime(options: dict, inputs: dict):
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options["threads"]
    settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(options["model"], settings, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)


def _deepsparse(options: dict, inputs: dict):
    import deepsparse

    arrays = list(inputs.values())
    shapes = [list(array.shape) for array in arrays]
    engine = deepsparse.Engine(
        options["model"], batch_size=shapes[0][0], num_cores=options["threads"], input_shapes=shapes
    )
    return lambda: engine.run(arrays)


class _Worker:
    """The far end: runs one model at a time."""

    def __init__(self, runtime: str) -> None:
        self.runtime = runtime
        self.infer: Any = None
        self.last: Any = None

    def hello(self, request: dict) -> dict:
        from importlib.metadata import version

        return {"version": version(self.runtime)}

    def load(self, request: dict) -> dict:
        import numpy

        if request["dtype"] not in RUNTIMES.get(self.runtime, (request["dtype"],)):
            raise ValueError(f"{self.runtime} runs {' and '.join(RUNTIMES[self.runtime])}")
        arrays = dict(numpy.load(request["inputs"]))
        # Kept here, for a runtime may read them where they lie.
        self.inputs = {name: numpy.ascontiguousarray(array) for name, array in arrays.items()}
        self.infer = globals()[f"_{self.runtime}"](request, self.inputs)
        return {}

    def run(self, request: dict) -> dict:
        start = time.perf_counter()
        self.last = self.infer()
        return {"seconds": time.perf_counter() - start}

    def time(self, request: dict) -> dict:
        for _ in range(3):
            self.run(request)
        times: list[float] = []
        end = time.perf_counter() + request["seconds"]
        while len(times) < TURNS[0] or (time.perf_counter() < end and len(times) < TURNS[1]):
            times.append(self.run(request)["seconds"])
        return {"seconds": statistics.median(times)}

    def outputs(self, request: dict) -> dict:
        import numpy

        numpy.savez(request["file"], *self.last)
        return {}


def _serve(runtime: str) -> None:
    """Answer requests until standard input ends; what the runtime prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = _Worker(runtime)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request["command"])(request)
        except (
            Exception
        ) as error:  # a runtime may raise anything: whoever asked is told, and may ask for something else
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        _serve(sys.argv[1])
