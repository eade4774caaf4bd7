"""A user's function, found by the import path that a setting names."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def load_function(path: str, *, setting: str) -> Callable[..., Any]:
    """The function at `module:function`; modules of the current directory can be imported."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(f"{setting} {path!r} is no import path: write module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"{setting} {path!r}: module {module_name!r} cannot be imported from {os.getcwd()} or "
            f"the Python path ({type(error).__name__}: {error})"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        callables = [
            key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
        ]
        raise ValueError(
            f"{setting} {path!r}: {name!r} is no function of {module_name!r}, "
            f"which has {', '.join(callables) or 'none'}"
        )
    return function
