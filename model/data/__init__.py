"""Text -> token shards -> batches.

python -m model.data prepare Book tokens --tokenizer gpt2       # a text, or a folder of them, into a token folder
python -m model.data show tokens                                # what is in it, every shard checked
python -m model.data list Book                                  # chapters, characters and words of each work

data = open_source(Path("Book"), Path("runs/a/data"), "gpt2")   # or load(folder), once it exists
idx, targets = get_batch(data.train, context=1024, seed=1, step=0, rows=range(8))
loader = Loader(data.train, context=1024, seed=1, first_step=0, rows=range(64), micro_batch=8, device="cuda")
for idx, targets in windows(data.val, context=1024, batch_size=8): ...
"""

from model.data.corpus import TokenData, load, open_source, prepare, verify
from model.data.loader import Loader, get_batch, windows

__all__ = ["Loader", "TokenData", "get_batch", "load", "open_source", "prepare", "verify", "windows"]
