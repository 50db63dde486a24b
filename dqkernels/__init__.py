"""dqkernels: real 2/4/8-bit weights x 8-bit activations for Hugging Face seq2seq models.

    import dqkernels
    dqkernels.quantize_(model, dqkernels.DQConfig(weight_bits=4))
    print(dqkernels.report(model))
"""

from dqkernels.config import DQConfig
from dqkernels.convert import calibrate, quantize_
from dqkernels.nn import QLinear

__version__ = "0.1.0"
__all__ = ["DQConfig", "QLinear", "calibrate", "info", "load", "quantize_", "report"]
