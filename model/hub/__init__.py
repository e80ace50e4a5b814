"""Weights from outside, and weights for others.

sources     token rows from a package, a GGUF file, a folder or a hub
packaged    pretrained models that come inside a Python package, as transformers folders
families    Llama, Mistral, Qwen3, Mamba2: their configuration and tensor names in our terms
importing   a transformers folder -> a folder that `model.load` and `--init-from` take
exporting   a run -> a transformers folder
causal_lm   the AutoModelForCausalLM class of an exported folder
"""

from model.hub.sources import PACKAGES, SourceError, pretrained_rows, table_shape

__all__ = ["PACKAGES", "SourceError", "pretrained_rows", "table_shape"]
