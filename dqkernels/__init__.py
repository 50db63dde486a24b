"""dqkernels: real 2/4/8-bit weights x 8-bit activations for Hugging Face seq2seq models.

    import dqkernels
    dqkernels.quantize_(model, dqkernels.DQConfig(weight_bits=4))
    print(dqkernels.report(model))

Importing this package makes transformers read and write packed models, and loads nothing: torch,
transformers and the kernels come with the first use.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from typing import TYPE_CHECKING

from dqkernels.config import VERSION, DQConfig

if TYPE_CHECKING:
    from dqkernels.convert import calibrate, quantize_
    from dqkernels.hf import load
    from dqkernels.nn import QLinear
    from dqkernels.reporting import info, report

__version__ = VERSION
__all__ = ["DQConfig", "QLinear", "calibrate", "info", "load", "quantize_", "report"]

_HOME = {
    "QLinear": "dqkernels.nn",
    "calibrate": "dqkernels.convert",
    "info": "dqkernels.reporting",
    "load": "dqkernels.hf",
    "quantize_": "dqkernels.convert",
    "report": "dqkernels.reporting",
}
#: The module of transformers that knows its quantizers; modeling_utils imports it before any model exists.
_QUANTIZERS = "transformers.quantizers.auto"


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dqkernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_plugin() -> None:
    try:
        importlib.import_module("dqkernels.hf")
    except Exception as error:  # `import transformers` of a program that never meets a packed model must go on
        logging.getLogger("dqkernels").warning(
            "transformers cannot read or write packed models here: %s: %s", type(error).__name__, error
        )


class _RegisterAfterTransformers:
    """Registers the quantizer plug-in right after transformers has loaded its quantizers, whenever that is.

    Loading them here would make `import dqkernels` as slow as `import transformers.quantizers` (about 2.5 s).
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _register_plugin()

            spec.loader.exec_module = exec_module
        return spec


if _QUANTIZERS in sys.modules:
    _register_plugin()
else:
    sys.meta_path.insert(0, _RegisterAfterTransformers())
