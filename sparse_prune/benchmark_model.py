"""A whole encoder, sparse against dense and against peers, side by side in one run: `sparse-prune bench model`.

The model is pruned by magnitude here, for its speed alone. Every candidate's hidden states are checked against float64 before
anything is timed; candidates take turns, and the median over the turns counts. What runs (`CANDIDATES`):

    dense          PyTorch as it is            dense fused    the dense model after fuse_encoder_
    compile        torch.compile of it         shrunk         dense, heads and FFN rows removed down to the sparse model's size
    sparse         sparsify_ of it, fused      openvino, onnxruntime   the dense model and the pruned ones; deepsparse   these alone

Only encoders of KINDS can be fused and shrunk; of any other model, the row says that these candidates are absent, and why.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import peers as peers_
from .benchmark import (
    DTYPES,
    check_block_fits,
    check_seconds,
    check_threads,
    machine,
    require_onnx,
    short,
    thread_count,
)
from .convert import BlockSparseConfig, sparsify_, swap_modules
from .criteria import block_mask
from .errors import SparsePruneError
from .fuse import KINDS, fuse_encoder_, unfuse_encoder_
from .layers import SparseLinear
from .linears import as_matrix, is_linear
from .masks import expand_mask


def prune_by_magnitude_(model: nn.Module, density: float, blocksize: tuple[int, int], inside) -> dict[str, Tensor]:
    """Zero the blocks of least magnitude in each linear layer where inside(name, module), in place; the masks that are left."""
    masks = {}
    for name, module in model.named_modules():
        if is_linear(module) and inside(name, module):
            weight = as_matrix(module, module.weight.detach())
            check_block_fits(blocksize, weight.shape)
            masks[name] = block_mask(weight, blocksize, density)
            weight.mul_(expand_mask(masks[name], blocksize, weight.shape))
    if not masks:
        raise SparsePruneError("model", "linear layers in its encoder", "none", "pass a self-attention encoder")
    return masks


def shrink_(model: nn.Module, density: float) -> None:
    """Remove heads and FFN rows from every layer of _stacks, in place, until its linear layers keep `density` of their parameters.

    The rival of block sparsity: what remains is dense and needs no kernel of ours. Weights are cut without regard to accuracy.
    """
    for stack in _stacks(model):
        kind = KINDS[type(stack).__name__]
        size = kind.head_size(stack)
        for qkv, out, ffn_in, ffn_out in kind.linears(stack):
            hidden = ffn_in.in_features
            heads = out.in_features // size
            kept = max(1, round(density * heads))
            total = sum(linear.weight.numel() for linear in (*qkv, out, ffn_in, ffn_out))
            # Rows of the feed-forward network use up what attention leaves, in whole vectors of 16.
            rows = max(16, round((density * total - 4 * kept * size * hidden) / (2 * hidden)) // 16 * 16)
            for linear in qkv:
                parts = linear.out_features // (heads * size)  # 3 where one makes q, k and v
                _keep_outputs(linear, parts, kept * size)
            _keep_inputs(out, kept * size)
            _keep_outputs(ffn_in, 1, rows)
            _keep_inputs(ffn_out, rows)
        kind.set_heads_(stack, kept)


def _keep_outputs(linear: nn.Linear, parts: int, rows: int) -> None:
    weight = linear.weight.detach().unflatten(0, (parts, -1))[:, :rows].flatten(0, 1)
    linear.bias = nn.Parameter(linear.bias.detach().unflatten(0, (parts, -1))[:, :rows].flatten())
    linear.weight, linear.out_features = nn.Parameter(weight.contiguous()), parts * rows


def _keep_inputs(linear: nn.Linear, columns: int) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[:, :columns].contiguous())
    linear.in_features = columns


def _stacks(model: nn.Module) -> list[nn.Module]:
    """The encoders in model whose layers are known, which alone can be shrunk and fused."""
    return [module for module in model.modules() if type(module).__name__ in KINDS]


def parameters_of(model: nn.Module) -> int:
    """Parameters of the layers, which Hugging Face's models hold in an nn.ModuleList; a sparse layer counts its kept blocks."""
    lists = nn.ModuleList(module for module in model.modules() if isinstance(module, nn.ModuleList))
    return sum(parameter.numel() for parameter in lists.parameters())


class _Exported(nn.Module):
    """The model as ONNX gets it: plain attention, one output. Garlic starts after its embeddings, whose hashing ONNX lacks."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to(torch.float32)  # Hugging Face forbids float() where blocks are sparse
        unfuse_encoder_(self.model)
        self.garlic = self.model.config.model_type == "garlic"
        self.model.config._attn_implementation = "eager"
        # torch.onnx.export gives every module the mode of this one back: in training mode, the embeddings would drop out.
        self.eval()

    def forward(self, first: Tensor, attention_mask: Tensor) -> Tensor:
        if self.garlic:
            return self.model.encoder(first, attention_mask, False, False).last_hidden_state
        return self.model(input_ids=first, attention_mask=attention_mask).last_hidden_state

    def inputs(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What forward takes for those tokens."""
        first = self.model.embeddings(ids, mask).detach() if self.garlic else ids
        return {"first": first, "attention_mask": mask}

    def save(self, path: Path) -> Path:
        """Write ONNX, opset 17, with free batch and length."""
        ids = torch.ones(2, 16, dtype=torch.long)
        free = {0: "batch", 1: "length"}
        inputs = self.inputs(ids, ids)
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                self,
                tuple(inputs.values()),
                str(path),
                dynamo=False,
                opset_version=17,
                input_names=list(inputs),
                output_names=["hidden"],
                dynamic_axes=dict.fromkeys((*inputs, "hidden"), free),
            )
        return path


class _Candidate:
    """A model of ours or PyTorch's: seconds() of one run, and hidden() for the check against `source` in float64.

    exact says that it rounds as its dtype does, and nothing else: quantized blocks and peers round as they like.
    """

    ours = True

    def __init__(self, name: str, dtype: str, source: str, model: nn.Module, arguments: dict[str, Tensor]) -> None:
        self.name, self.dtype, self.source, self.model, self.arguments = name, dtype, source, model, arguments
        self.exact = not any(isinstance(m, SparseLinear) and m.packed.scales is not None for m in model.modules())

    def hidden(self) -> Tensor:
        return self.model(**self.arguments)[0].double()

    def seconds(self) -> float:
        start = time.perf_counter()
        self.model(**self.arguments)
        return time.perf_counter() - start


class _PeerCandidate:
    """The same of a peer."""

    ours = exact = False

    def __init__(self, name: str, dtype: str, source: str, peer: peers_.Peer) -> None:
        self.name, self.dtype, self.source, self.peer = name, dtype, source, peer

    def hidden(self) -> Tensor:
        self.peer.run()
        return torch.from_numpy(self.peer.outputs()[0]).double()

    def seconds(self) -> float:
        time.sleep(0.005)  # PyTorch's threads spin for some milliseconds after their work: not on this one's time
        return self.peer.run()


def _medians(candidates: list, seconds: float) -> dict[tuple[str, str], float]:
    """Median seconds of each; they take turns, 5 to 101 of them, for about `seconds` after two to warm up."""
    turn = 0.0
    for _ in range(2):
        turn = sum(candidate.seconds() for candidate in candidates)
    times: dict[tuple[str, str], list[float]] = {(c.name, c.dtype): [] for c in candidates}
    for _ in range(min(101, max(5, round(seconds / turn)))):
        for candidate in candidates:
            times[candidate.name, candidate.dtype].append(candidate.seconds())
    return {key: statistics.median(values) for key, values in times.items()}


def bench_model(
    model: nn.Module,
    inside: Callable[[str, nn.Module], bool],
    densities: Iterable[float] = (0.5, 0.2, 0.1),
    blocksize: tuple[int, int] = (32, 32),
    batches: Iterable[int] = (1, 16),
    lengths: Iterable[int] = (64, 128),
    dtypes: Iterable[str] = ("float32", "bfloat16"),
    threads: int | None = None,
    packed: nn.Module | None = None,
    compiled: bool = False,
    peers: Mapping[str, Path] | None = None,
    seconds: float = 5.0,
    on_row: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Milliseconds of a whole encoder, one row per batch and length with every candidate in it, timed in turns.

    model     the dense encoder of tokens without its head, a Hugging Face model
    inside    inside(name, module) says which linear layers are pruned
    packed    its packed twin, which then is the one sparse candidate; None: pruned here to each of densities
    compiled  also time torch.compile of the dense model
    peers     runtime -> interpreter, as peers.installed() finds them; a peer that fails is reported with its reason

    A row: batch, length, blocksize, threads, `machine()`, candidates: [{name, dtype, ms, error, parameters}], absent and failed:
    name -> reason, versions of peers. error is relative to float64 with the same weights, parameters those of the encoder's layers.

    Raises SparsePruneError for an unknown dtype, a model that reads no tokens, a block larger than a weight, threads below 1,
    seconds below 0, and for peers without onnx; ArithmeticError for a wrong result of ours.
    """
    check_seconds(seconds)
    check_threads(threads)
    dtypes, peers = list(dtypes), peers or {}
    if peers:
        require_onnx()
    for name in dtypes:
        if name not in DTYPES:
            raise SparsePruneError("dtypes", f"names among {', '.join(DTYPES)}", name, "choose some of these")
    reads: Any = getattr(model, "main_input_name", "input_ids")
    if reads != "input_ids":
        raise SparsePruneError(
            "model", "one that reads tokens", f"one that reads {reads}", "choose an encoder of texts"
        )
    model = copy.deepcopy(model).to(torch.float32).eval()
    unfuse_encoder_(model)
    variants, sources, absent = _variants(model, inside, () if packed is not None else densities, blocksize, packed)
    sizes = {name: parameters_of(net) for name, (net, _) in variants.items()}
    if compiled:
        variants["compile"] = model, "dense"
        sizes["compile"] = sizes["dense"]
    nets = [
        (name, dtype, source, _compiled(net, dtype) if name == "compile" else copy.deepcopy(net).to(DTYPES[dtype]))
        for name, (net, source) in variants.items()
        for dtype in dtypes
    ]
    generator = torch.Generator().manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder, thread_count(threads) as used:
        files = _exports(sources, peers, Path(folder), absent)
        for batch, length in ((batch, length) for batch in batches for length in lengths):
            row: dict[str, Any] = {"kind": "model", **machine(), "threads": used, "batch": batch, "length": length}
            row |= {"blocksize": list(blocksize), "candidates": [], "absent": absent, "failed": {}, "versions": {}}
            config: Any = model.config
            ids = torch.randint(5, config.vocab_size, (batch, length), generator=generator)
            arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with contextlib.ExitStack() as opened, torch.inference_mode():
                candidates: list[_Candidate | _PeerCandidate] = [_Candidate(*net, arguments) for net in nets]
                candidates += _peer_candidates(opened, peers, files, arguments, dtypes, used, row)
                exact = {name: copy.deepcopy(net).double()(**arguments)[0] for name, net in sources.items()}
                errors = _checked(candidates, exact, row["failed"])
                candidates = [candidate for candidate in candidates if (candidate.name, candidate.dtype) in errors]
                medians = _medians(candidates, seconds)
            for key, error in errors.items():
                entry = {"name": key[0], "dtype": key[1], "ms": 1e3 * medians[key], "error": error}
                row["candidates"].append(entry | {"parameters": sizes.get(key[0])})
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return rows


def _variants(
    model, inside, densities, blocksize, packed
) -> tuple[dict[str, tuple[nn.Module, str]], dict[str, nn.Module], dict[str, str]]:
    """Candidates of ours and PyTorch's, name -> (model, source); the sources: dense float32 models with the same weights; and the
    candidates that there are not, name -> reason.
    """
    sources = {"dense": model}
    variants, absent = {"dense": (model, "dense")}, {}
    known = bool(_stacks(model))
    if known:
        variants["dense fused"] = copy.deepcopy(model), "dense"
    else:
        absent["dense fused"] = f"{type(model).__name__} is none of the encoders that can be fused, {', '.join(KINDS)}"
    if packed is not None:
        variants["sparse"] = copy.deepcopy(packed).to(torch.float32).eval(), "sparse"
        sources["sparse"] = copy.deepcopy(variants["sparse"][0])
        unfuse_encoder_(sources["sparse"])
        layers = [layer for layer in sources["sparse"].modules() if isinstance(layer, SparseLinear)]
        swap_modules(sources["sparse"], {layer: layer.to_dense() for layer in layers})
    elif not known:
        absent["shrunk"] = f"which heads and FFN rows can go is known for {', '.join(KINDS)} alone"
    for density in densities:
        pruned = copy.deepcopy(model)
        masks = prune_by_magnitude_(pruned, density, blocksize, inside)
        sparse = copy.deepcopy(pruned)
        sparsify_(sparse, BlockSparseConfig(blocksize=blocksize, max_density=1.0), inside, masks)
        if known:
            shrunk = sources[f"shrunk {density:g}"] = copy.deepcopy(model)
            shrink_(shrunk, density)
            for name, net in ((f"shrunk {density:g}", shrunk), (f"shrunk {density:g} fused", copy.deepcopy(shrunk))):
                variants[name] = net, f"shrunk {density:g}"
        variants[f"sparse {density:g}"] = sparse, f"sparse {density:g}"
        sources[f"sparse {density:g}"] = pruned
    for name, (net, _) in variants.items():
        if name.endswith("fused") or name.startswith("sparse"):
            fuse_encoder_(net)
    return variants, sources, absent


def _exports(sources, peers, folder: Path, absent: dict[str, str]) -> dict[str, tuple[_Exported, Path]]:
    """The sources that peers take, as ONNX; absent tells of peers whose model the exporter cannot write."""
    files = {}
    for name, net in sources.items():
        takers = [runtime for runtime in peers if _takes(runtime, name)]
        if takers:
            exported = _Exported(net)
            try:
                files[name] = exported, exported.save(folder / f"{name}.onnx".replace(" ", "-"))
            except Exception as error:  # what PyTorch's exporter raises has no common class
                why = textwrap.shorten(str(error), 200, placeholder=" ...")
                absent |= dict.fromkeys(takers, f"{type(net).__name__} cannot be exported to ONNX: {why}")
    return files


def _compiled(model: nn.Module, dtype: str) -> nn.Module:
    compiled = torch.compile(copy.deepcopy(model).to(DTYPES[dtype]))
    assert isinstance(compiled, nn.Module)
    return compiled


def _takes(runtime: str, source: str) -> bool:
    """Every engine runs the pruned weights, and those that are made for dense ones these too."""
    return source.startswith("sparse") or (source == "dense" and runtime != "deepsparse")


def _peer_candidates(opened, peers, files, arguments, dtypes, threads, row) -> Iterator[_PeerCandidate]:
    """Every peer's process, started and run once; row["failed"] tells of those that could not."""
    for runtime, python in peers.items():
        for source, (exported, file) in files.items():
            if not _takes(runtime, source):
                continue
            inputs = {name: t.numpy() for name, t in exported.inputs(*arguments.values()).items()}
            for dtype in peers_.RUNTIMES[runtime]:
                if dtype not in dtypes:
                    continue
                name = runtime if source == "dense" else f"{runtime} {source.removeprefix('sparse ')}"
                try:
                    peer = opened.enter_context(peers_.Peer(runtime, python, threads))
                    peer.load(file, inputs, dtype, threads)
                    peer.run()
                except peers_.PeerError as error:
                    row["failed"][f"{name} {short(dtype)}"] = str(error)
                    continue
                row["versions"][runtime] = peer.version
                yield _PeerCandidate(name, dtype, source, peer)


def _checked(candidates, exact: Mapping[str, Tensor], failed: dict[str, str]) -> dict[tuple[str, str], float]:
    """(name, dtype) -> error against float64, without those of peers that are wrong, which go to failed.

    Ours may err twice as much as dense PyTorch in the dtype, else this raises ArithmeticError; int8 blocks and peers up to 10%.
    """
    errors = {}
    for candidate in candidates:
        got, best = candidate.hidden(), exact[candidate.source]
        errors[candidate.name, candidate.dtype] = float((got - best).norm() / best.norm())
    for candidate in candidates:
        name, dtype = candidate.name, candidate.dtype
        allowed = 2 * max(errors["dense", dtype], torch.finfo(DTYPES[dtype]).eps) if candidate.exact else 0.1
        if errors[name, dtype] <= allowed:
            continue
        if candidate.ours:
            raise ArithmeticError(f"{name} in {dtype}: error {errors[name, dtype]:.1e}, more than {allowed:.1e}")
        failed[f"{name} {short(dtype)}"] = f"wrong: error {errors.pop((name, dtype)):.1e}"
    return errors
