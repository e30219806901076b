"""Run and save models of Hugging Face transformers (5.21 and later) with lowbit's weights.

Importing this package registers the quantization method "lowbit" with transformers:

    from lowbit.integrations.transformers import LowbitConfig
    from transformers import AutoModelForCausalLM

    config = LowbitConfig("awq_w4a16")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)  # quantized while it loads
    model.save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)  # the same weights, bit for bit

A folder that `model.save_pretrained` or `lowbit convert` wrote names the method in its config.json. transformers only
warns about a method that it does not know and then goes on as if the codes were weights: import this package first.
"""

from __future__ import annotations

from lowbit.integrations.transformers.version import VERSION  # first: it says what is missing

# isort: split
from lowbit.integrations.transformers.config import LowbitConfig
from lowbit.integrations.transformers.quantizer import LowbitHfQuantizer
from lowbit.integrations.transformers.registration import register

__all__ = ["VERSION", "LowbitConfig", "LowbitHfQuantizer", "register"]

register()
