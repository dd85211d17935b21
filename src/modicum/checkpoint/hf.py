"""The stock Hugging Face layout of the native families: configuration and tensors, both ways."""

from modicum.checkpoint.hf_config import NATIVE_FAMILIES, language_config, stock_config
from modicum.checkpoint.hf_fields import UnknownFamilyError
from modicum.checkpoint.hf_tensors import NativeTensors, to_native, to_stock

__all__ = [
    "NATIVE_FAMILIES",
    "NativeTensors",
    "UnknownFamilyError",
    "language_config",
    "stock_config",
    "to_native",
    "to_stock",
]
