"""Compress the context of a pretrained decoder: one artefact, one interface, many methods.

    compressor = wrap(model, {"method": "condense", "num_condense_tokens": 64})
    context = compressor.compress(context_ids, context_mask)
    compressor.generate(prompt_ids, context=context, max_new_tokens=50)

See README.md beside this file for the methods and their options.
"""

from model.compress.base import (
    CompressorConfig,
    CompressorOutput,
    ContextCompressor,
    compressor,
    method_names,
)
from model.compress.chain import Chain
from model.compress.context import CompressedContext, LayerSlots
from model.compress.decoder import Decoder, load_decoder, load_tokenizer
from model.compress.wrap import load_compressor, wrap

__all__ = [
    "Chain",
    "CompressedContext",
    "CompressorConfig",
    "CompressorOutput",
    "ContextCompressor",
    "Decoder",
    "LayerSlots",
    "compressor",
    "load_compressor",
    "load_decoder",
    "load_tokenizer",
    "method_names",
    "wrap",
]
