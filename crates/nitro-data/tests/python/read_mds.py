"""Reads a dataset folder with mosaicml-streaming and prints what it saw, one JSON object.

Usage: read_mds.py FOLDER SCRATCH
"""

import hashlib
import json
import os
import sys

import stand_in  # noqa: F401
import streaming  # noqa: E402
from streaming import StreamingDataset  # noqa: E402

folder, scratch = sys.argv[1:3]
os.environ["TMPDIR"] = scratch


def digest(value):
    if hasattr(value, "tobytes") and not isinstance(value, (bytes, memoryview)):
        shape = getattr(value, "shape", getattr(value, "size", ()))
        return [str(list(shape)), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return value


plain = StreamingDataset(local=folder, batch_size=4, shuffle=False, validate_hash="sha1")
samples = [{k: digest(v) for k, v in plain[i].items()} for i in range(len(plain))]
orders = {}
for seed in (9176, 5):
    shuffled = StreamingDataset(local=folder, batch_size=4, shuffle=True, shuffle_algo="py1s",
                                shuffle_seed=seed)
    real = shuffled.get_item
    shuffled.get_item = lambda i, *rest, real=real: i
    orders[str(seed)] = [[int(i) for i in shuffled] for _ in range(2)]
print(json.dumps({"version": streaming.__version__, "samples": samples, "orders": orders}))
