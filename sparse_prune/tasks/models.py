"""Loading and saving the models of the tasks: new Garlic models, Hugging Face directories and names, packed checkpoints."""

from __future__ import annotations

import contextlib
import logging
import math
import pickle
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from .. import bsr
from ..errors import SparsePruneError
from ..linears import is_linear
from ..models import garlic
from ..models.garlic import train_tokenizer
from ..models.garlic_config import GarlicConfig
from ..serialization import is_packed, load_packed, read_json, weights_files
from .data import Example, TagExample, by_kind, check_task

Model = TypeVar("Model", bound=nn.Module)
GARLIC = "garlic"
AUTO_MODELS = {"sentiment": AutoModelForSequenceClassification, "ner": AutoModelForTokenClassification}
HEADS = {
    "sentiment": "ForSequenceClassification",
    "ner": "ForTokenClassification",
}  # how the names of their classes end


def labels_of(examples: Sequence[Example]) -> list[str]:
    """The distinct labels (or tags) of examples: O first, then by name; an entity type that has B- gets I- too."""
    texts, sentences = by_kind(examples)
    if texts:
        labels = sorted({e.label for e in texts})
        if len(labels) < 2:
            raise SparsePruneError("train", "at least two labels", labels[0], "add examples of another label")
        return labels
    types = sorted({tag[2:] for e in sentences for tag in e.tags if tag != "O"})
    if not types:
        raise SparsePruneError("train", "at least one entity", "only O tags", "add sentences with entities")
    return ["O", *(f"{place}-{kind}" for kind in types for place in "BI")]


def new_garlic(task: str, examples: Sequence[Example], max_length: int, settings: dict) -> tuple[PreTrainedModel, Any]:
    """An untrained Garlic and a tokenizer made from the characters of examples; settings go to GarlicConfig."""
    texts = ("".join(e.tokens) if isinstance(e, TagExample) else e.text for e in examples)
    tokenizer = train_tokenizer(texts, max_length=max_length)
    labels = labels_of(examples)
    config = GarlicConfig(
        vocab_size=len(tokenizer), max_position_embeddings=max_length, **_label_settings(labels), **settings
    )
    return AUTO_MODELS[task].from_config(config), tokenizer


def load_model(
    name: str | Path, task: str, labels: Sequence[str] | None = None, dtype: torch.dtype | str = torch.float32
) -> tuple[PreTrainedModel, Any]:
    """A model with the task's head, and its tokenizer, from a directory (dense or packed) or a name on the Hugging Face hub.

    labels   the classes of the head; None takes them from the model's config, which must then have been trained for the task
    dtype    of the parameters; "auto" for that of the checkpoint

    Raises SparsePruneError where nothing can be loaded, the model was trained for the other task, or its weights are not all there
    (a new head's need not be) or integers.
    """
    source, auto = str(name), AUTO_MODELS[check_task(task)]
    # A path that leads nowhere is no name on the hub, where asking takes a minute if there is no network.
    parent = Path(source).parent
    named = Path(source).exists() or (parent != Path() and parent.is_dir())
    if named or source.startswith((".", "~", "/")) or source.count("/") > 1:
        check_model_dir(source)
    expected = "garlic, a model directory or a name on the Hugging Face hub"
    with _reading(source, expected, "check the path, or the name and the network"):
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source)
        if labels is None and task_of(config.architectures) != task:
            got = ", ".join(config.architectures or ()) or "no architecture in its config"
            raise SparsePruneError(
                source, f"a model trained for {task}", got, "train it first with `sparse-prune train`"
            )
        if is_packed(source):
            model = _read_packed(source, config, auto.from_config, dtype)
        else:
            options = {} if labels is None else {**_label_settings(labels), "ignore_mismatched_sizes": True}
            _check_floating(source)
            model, told = auto.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
            missing = sorted(told["missing_keys"])
            if labels is not None:  # a new head is trained, and the encoder's pooler with it
                base = f"{model.base_model_prefix}."
                missing = [name for name in missing if name.startswith(base) and not name.startswith(f"{base}pooler.")]
            check_all_there(source, model, missing)
            model.config.problem_type = None  # the loss of a single label, whatever the checkpoint was trained with
    _check_encoder(model)
    if not tokenizer.is_fast:
        raise SparsePruneError(
            "model", "a model with a fast tokenizer", type(tokenizer).__name__, "choose another model"
        )
    if tokenizer.pad_token_id is None:
        raise SparsePruneError(
            "model", "a tokenizer with a padding token", "none", "set pad_token in its tokenizer_config.json"
        )
    return check_finite(source, model), tokenizer


def check_finite(source: str, model: Model) -> Model:
    """model itself; raises SparsePruneError where a weight is NaN or infinite."""
    for name, weight in model.named_parameters():
        bsr.check_finite(weight, f"{source}: {name}")
    return model


def check_all_there(source: str | Path, model: nn.Module, missing: Sequence[str]) -> None:
    """Raise SparsePruneError where weights are missing from the files of model, which transformers then draws at random."""
    if missing:
        got, remedy = f"{len(missing)} missing, such as {missing[0]}", "save the whole model again, in floating point"
        raise SparsePruneError(str(source), f"all weights of a {type(model).__name__}", got, remedy)


def stored_weights(directory: str | Path) -> list[Path]:
    """The files of weights in a model directory: safetensors, or where there are none, PyTorch's."""
    return [file for file in weights_files(directory) if file.is_file()] or [
        *Path(directory).glob("pytorch_model*.bin")
    ]


def _check_floating(source: str) -> None:
    """Raise SparsePruneError where a weight in a model directory is integers, which transformers takes without their scale."""
    for file in stored_weights(source):
        for name, dtype in _stored_dtypes(file):
            if name.endswith((".weight", ".bias")) and dtype.startswith(("I", "U", "BOOL", "torch.int", "torch.uint")):
                remedy = "pass the checkpoint from before it was quantized, or dequantize it"
                raise SparsePruneError(f"{file}: {name}", "floating point", dtype, remedy)


def _stored_dtypes(file: Path) -> Iterator[tuple[str, str]]:
    """Name and dtype of each tensor in a file of weights."""
    if file.suffix == ".bin":
        state = torch.load(file, map_location="meta", weights_only=True)
        yield from ((name, str(tensor.dtype)) for name, tensor in state.items())
        return
    with safe_open(file, "pt") as stored:
        yield from ((name, stored.get_slice(name).get_dtype()) for name in stored.keys())  # noqa: SIM118


def check_dense(name: str | Path) -> None:
    """Raise SparsePruneError where a directory holds a packed model, which has no dense layers left to train."""
    if is_packed(name):
        raise SparsePruneError(
            str(name), "a dense model", "a packed one", "pass the dense directory that it was packed from"
        )


def load_dir(path: str | Path, kind: Any, dtype: torch.dtype | str = "auto") -> tuple[PreTrainedModel, Sequence[str]]:
    """The model in a directory, dense or packed, and the names of the weights that its files lack; in evaluation.

    kind     what class_of the directory says, or an Auto class
    dtype    of the parameters; "auto" for that of the checkpoint

    The files are safetensors or, where there are none, pytorch_model.bin; of these tensors are read and nothing else, so that no
    code runs. Raises SparsePruneError where they cannot be read or do not fit the class, or a weight is NaN, infinite or an
    integer.
    """
    source = str(path)
    with _reading(source, f"the weights of a {kind.__name__}", "save it again with its save_pretrained"):
        if is_packed(source):
            config = kind.config_class.from_pretrained(source)
            return _read_packed(source, config, kind._from_config, dtype), ()
        _check_floating(source)
        model, told = kind.from_pretrained(source, dtype=dtype, output_loading_info=True)
    return check_finite(source, model), sorted(told["missing_keys"])


def class_of(path: str | Path) -> type[PreTrainedModel] | None:
    """The class, of transformers or ours, that config.json in a directory names; None where it names none.

    Raises SparsePruneError for any other class: code that comes with a directory is never run.
    """
    check_model_dir(path)
    file = Path(path, "config.json")
    settings = read_json(file)
    name = next(iter(settings.get("architectures") or ()), None) if isinstance(settings, dict) else None
    if name is None:
        return None
    found = getattr(transformers, str(name), None) or getattr(garlic, str(name), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and getattr(found, "config_class", None)):
        remedy = "convert it in Python: sparse_prune.nonzero_masks, sparsify_, save_packed"
        raise SparsePruneError(f"{file}: architectures", "a model class of transformers", name, remedy)
    return found


def load_encoder(name: str | Path) -> nn.Module:
    """The encoder without a head in a directory, dense or packed, or an untrained Garlic for "garlic"; in evaluation.

    Raises SparsePruneError where there is no such model.
    """
    if str(name) == GARLIC:
        return AutoModel.from_config(GarlicConfig()).eval()
    model, _ = load_dir(name, class_of(name) or AutoModel, torch.float32)
    _check_encoder(model)
    return model.base_model


@contextlib.contextmanager
def _reading(source: str, expected: str, remedy: str) -> Iterator[None]:
    """Errors of the libraries that read a model, told as one SparsePruneError."""
    try:
        yield
    except SparsePruneError:
        raise
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError),
        *(ArithmeticError, EOFError, SafetensorError, pickle.UnpicklingError),
    ) as error:
        told = textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
        raise SparsePruneError("model", expected, f"{source} ({told})", remedy) from None


def _read_packed(source: str, config: Any, make: Callable[..., Model], dtype: torch.dtype | str) -> Model:
    """A packed model by our own reader, which names the tensor that is wrong; transformers' does not."""
    del config.quantization_config
    own = (config.dtype or torch.float32) if dtype == "auto" else dtype
    return load_packed(make(config, dtype=own), source).eval()


def _check_encoder(model: PreTrainedModel) -> None:
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model.base_model, "decoder"):
        raise SparsePruneError(
            "model", "an encoder", f"{type(model).__name__}, which decodes too", "choose another model"
        )


def check_model_dir(path: str | Path) -> None:
    """Raise SparsePruneError unless path is a directory with a model's config.json."""
    if not Path(path, "config.json").is_file():
        got = (
            "no config.json in it" if Path(path).is_dir() else "a file" if Path(path).exists() else "no such directory"
        )
        raise SparsePruneError(str(path), "a model directory", got, "pass what `sparse-prune train` wrote")


def task_of(architectures: Sequence[str] | None) -> str | None:
    """The task that a model was trained for, by what its config says of its class; None for another head or none."""
    names = architectures or ()
    return next((task for task, head in HEADS.items() if any(name.endswith(head) for name in names)), None)


def encoder_filter(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    """filter_fn for Pruner and sparsify_: the linear layers inside the encoder's stack of layers.

    The stack is any nn.ModuleList inside the base model, so embeddings, pooler and head stay out. Raises SparsePruneError where
    there is no such layer.
    """
    prefix = getattr(model, "base_model_prefix", "")
    base = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    stacks = [f"{name}." for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and name.startswith(base)]

    def inside(name: str, module: nn.Module) -> bool:
        return is_linear(module) and name.startswith(tuple(stacks))

    if not any(inside(name, module) for name, module in model.named_modules()):
        raise SparsePruneError(
            "model", "a stack of layers with nn.Linear inside", type(model).__name__, "choose a self-attention encoder"
        )
    return inside


def most_tokens(model: nn.Module) -> float:
    """How many tokens a row the model has positions for; infinity where it counts none."""
    config: Any = model.config
    most = getattr(config, "max_position_embeddings", None) or -1
    for name, module in model.named_modules():
        # RoBERTa and its kin count from behind the padding's position.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            most = module.num_embeddings - module.padding_idx - 1
    return most if most > 0 else math.inf  # XLNet has -1


def max_length_of(model: PreTrainedModel, tokenizer, wanted: int) -> int:
    """wanted, or less where the model or its tokenizer cannot take as many tokens."""
    return int(min(wanted, most_tokens(model), tokenizer.model_max_length))


def check_ids(model: PreTrainedModel, rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> None:
    """Raise SparsePruneError where a row of rows, or its padding, has a token that the model has no embedding for."""
    largest = max((max(row["input_ids"], default=0) for row in rows), default=0)
    if max(largest, pad_token_id) >= model.config.vocab_size:
        expected, got = f"a tokenizer of {model.config.vocab_size} tokens", f"token {max(largest, pad_token_id)}"
        raise SparsePruneError(
            "model",
            f"{expected}, as many as its embeddings",
            got,
            "save the model with the tokenizer it was trained with",
        )


def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively; elsewhere autocast would be slower than fp32."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def _label_settings(labels: Sequence[str]) -> dict:
    names = dict(enumerate(labels))
    return {"num_labels": len(names), "id2label": names, "label2id": {label: i for i, label in names.items()}}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences Hugging Face's logs and bars, which would break into ours: a with statement, or a decorator."""
    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
