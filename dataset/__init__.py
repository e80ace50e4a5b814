"""Any corpus in, the same batches at any world size, nothing silently lost.

import dataset
data = dataset.open("data/pystdlib")
view = data.view(context=2048, packing="concat", seed=0)
batch = view.batch(step=0, global_batch=96, rank=0, world=4)      # .tokens .cu_seqlens .weights
"""

from dataset.compose import build
from dataset.files import DatasetError
from dataset.format import Dataset
from dataset.format import open_dataset as open
from dataset.tokenizers import Tokenizer

__all__ = ["Dataset", "DatasetError", "Tokenizer", "build", "open"]
