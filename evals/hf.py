"""Load a safetensors checkpoint, quantized or not, with transformers."""

from __future__ import annotations

import importlib.util
import io
import logging
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from llmlite.checkpoint.checkpoint import CONFIG_ERRORS, read_config
from llmlite.errors import InputError, OutsideError, first_line

# quant_method in config.json -> the extra of this project and the modules of it that transformers needs
EXTRAS = {
    "gptq": ("gptq", ("optimum", "gptqmodel")),
    "bitsandbytes": ("bnb", ("bitsandbytes",)),
    "compressed-tensors": ("compressed-tensors", ("compressed_tensors",)),
}


def load_transformers(path: Path, threads: int | None = None) -> tuple[Any, Any]:
    """The model in eval mode, in the dtype it is stored in, and its tokenizer.

    On the first GPU where there is one. Pickle weights and remote code are refused. ``threads`` is a setting of
    the whole process (torch.set_num_threads). Raises `InputError` when the checkpoint can't be loaded.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)
    method = require_packages(path)
    where = {"device_map": {"": 0}} if torch.cuda.is_available() else {}
    try:
        # gptqmodel prints a banner and its log on standard output
        with redirect_stdout(sys.stderr), _without_bars(method):
            tokenizer = load_tokenizer(path)
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True, **where
            )
            if method == "compressed-tensors":  # it unpacks the weights at the first forward: that belongs to loading
                with torch.no_grad():
                    loaded[0](torch.zeros(1, 1, dtype=torch.long, device=loaded[0].device))
    except ImportError as error:
        raise InputError(f"{path}: a Python package that it needs is missing ({first_line(error)})") from None
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutsideError(f"{path}: does not fit into memory ({first_line(error)})") from None
    except (OSError, SafetensorError, *CONFIG_ERRORS) as error:
        raise InputError(f"{path}: transformers can't load it ({first_line(error)})") from None
    model, report = loaded
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise InputError(f"{path}: {len(names)} tensors of the model are not in the files, {names[0]!r} for one")
    return model.eval(), tokenizer


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint; `InputError` where there is none."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, *CONFIG_ERRORS) as error:
        raise InputError(f"{path}: transformers can't load its tokenizer ({first_line(error)})") from None


def _without_bars(method: str) -> AbstractContextManager:
    """compressed-tensors draws its progress bars unconditionally, so nothing it writes on standard error is shown."""
    return redirect_stderr(io.StringIO()) if method == "compressed-tensors" else nullcontext()


def require_packages(path: Path) -> str:
    """The quantization method, "" for none.

    `InputError` names the extra, where transformers itself would end in a NameError (gptq) or less.
    """
    quantization = read_config(path).get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise InputError(f"{path}: config.json has a quantization_config that is not a JSON object")
    method = str(quantization.get("quant_method", ""))
    extra, modules = EXTRAS.get(method, ("", ()))
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"{path}: loading a {method} checkpoint needs the Python package {module}, which is not installed: "
                f"install llmlite with its extra '{extra}', as in pip install '.[{extra}]'"
            )
    # bitsandbytes logs a line per layer and call: that float32 inputs are cast, which its format says already
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return method


def kv_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values that one more position takes, all layers, in the model's dtype."""
    config = model.config.get_text_config()
    heads = config.num_key_value_heads if "num_key_value_heads" in config.to_dict() else config.num_attention_heads
    head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize


def prefix_token(tokenizer: Any) -> int | None:
    """The one token that a transformers tokenizer puts in front of a text, None where it puts none."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a", add_special_tokens=True).input_ids
    return full[0] if len(full) > len(plain) and full[1 : 1 + len(plain)] == plain else None
