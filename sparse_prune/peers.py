"""Other inference runtimes, each in a Python environment of its own (`make peers`), driven over a pipe.

This file is both ends. `Peer` starts the environment's Python on this very file, which then imports nothing of sparse_prune.
Requests and answers are lines of JSON, tensors travel as files, and the worker times a run itself, so the pipe does not count.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RUNTIMES = {"openvino": ("float32", "bfloat16"), "onnxruntime": ("float32",), "deepsparse": ("float32",)}


class PeerError(RuntimeError):
    """A peer that cannot start, or cannot run a model; the text says why."""


class Peer:
    """One ONNX model in one runtime, in a process of its own. A context manager.

    runtime   a key of RUNTIMES
    python    the interpreter of the environment that has it
    model     an .onnx file with free batch and length
    inputs    name -> numpy array; their shapes are fixed for the runtime before it compiles the model
    dtype     "float32" or, where RUNTIMES lists it, "bfloat16": the precision it may compute in

    Raises PeerError with the last line the worker said.
    """

    def __init__(self, runtime: str, python: str | Path, model: Path, inputs: dict, dtype: str, threads: int) -> None:
        import numpy

        self._folder = tempfile.TemporaryDirectory()
        self._output = Path(self._folder.name, "output.npy")
        numpy.savez(Path(self._folder.name, "inputs.npz"), **inputs)
        self._log = open(Path(self._folder.name, "log"), "w+")  # noqa: SIM115
        environment = {"NM_DISABLE_ANALYTICS": "1", **os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [str(python), __file__, runtime],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._asks, self._answers = self._process.stdin, self._process.stdout
        try:
            options = {"model": str(model), "inputs": str(Path(self._folder.name, "inputs.npz"))}
            self.version = self._ask("load", **options, dtype=dtype, threads=threads)["version"]
        except BaseException:
            self.close()
            raise

    def _ask(self, command: str, **options: object) -> dict:
        """The answer to one request. Between requests the process is stopped: some runtimes' threads spin while they wait."""
        try:
            self._process.send_signal(signal.SIGCONT)
            self._asks.write(json.dumps({"command": command, **options}) + "\n")
            self._asks.flush()
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._log.seek(0)
            said = self._log.read().strip().splitlines()
            raise PeerError(said[-1][:300] if said else f"ended with code {self._process.wait()}")
        self._process.send_signal(signal.SIGSTOP)
        return json.loads(answer)

    def run(self) -> float:
        """One inference; its seconds by the worker's clock."""
        return self._ask("run")["seconds"]

    def output(self):
        """The first output of the last run, as a numpy array."""
        import numpy

        self._ask("output", file=str(self._output))
        return numpy.load(self._output)

    def close(self) -> None:
        """End the process."""
        self._process.send_signal(signal.SIGCONT)
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


def installed(folder: str | Path) -> dict[str, Path]:
    """The runtimes whose environments `make peers` made in folder: name -> interpreter."""
    pythons = {name: Path(folder, name, "bin", "python") for name in RUNTIMES}
    return {name: python for name, python in pythons.items() if python.exists()}


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
    return openvino.__version__.split("-")[0], lambda: request.infer(inputs, share_inputs=True)[0]


def _onnxruntime(options: dict, inputs: dict):
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options["threads"]
    settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(options["model"], settings, providers=["CPUExecutionProvider"])
    return onnxruntime.__version__, lambda: session.run(None, inputs)[0]


def _deepsparse(options: dict, inputs: dict):
    import deepsparse

    arrays = list(inputs.values())
    shapes = [list(array.shape) for array in arrays]
    engine = deepsparse.Engine(
        options["model"], batch_size=shapes[0][0], num_cores=options["threads"], input_shapes=shapes
    )
    return deepsparse.__version__, lambda: engine.run(arrays)[0]


def _serve(runtime: str) -> None:
    """Answer requests until standard input ends; what the runtime prints goes to standard error."""
    import numpy

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    infer: Any = None
    last: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["command"] == "load":
            inputs = dict(numpy.load(request["inputs"]))
            version, infer = globals()[f"_{runtime}"](request, inputs)
            answer: dict[str, Any] = {"version": version}
        elif request["command"] == "run":
            start = time.perf_counter()
            last = infer()
            answer = {"seconds": time.perf_counter() - start}
        else:
            numpy.save(request["file"], last)
            answer = {}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve(sys.argv[1])
