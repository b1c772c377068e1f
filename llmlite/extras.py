"""Optional packages, imported when they are first needed."""

import importlib
import logging
from types import ModuleType

from llmlite.errors import InputError


def need(extra: str, module: str) -> ModuleType:
    """The module, or `InputError` that names the extra of this project which installs it.

    peft imports bitsandbytes, which would tell at once what it lacks for speed, and later a line per layer.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise InputError(
            f"this needs the Python package {module}, which is not installed: "
            f"install llmlite with its extra '{extra}', as in pip install '.[{extra}]'"
        ) from None
