"""Reads a dataset folder with mosaicml-streaming and prints what it saw, one JSON object.

Usage: read_mds.py FOLDER SCRATCH

torch and other heavy requirements of the package serve training; where they are missing, empty
modules stand in for them, so that the package's own reader, StreamingDataset and order can run.
"""

import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import types

STAND_INS = ("torch", "torchvision", "transformers", "boto3", "botocore", "google", "oci", "azure",
             "matplotlib", "paramiko", "databricks")


class StandIn(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("is_available", "is_initialized"):
            return lambda: False
        if name == "get_worker_info":
            return lambda: None
        if name in ("distributed", "utils", "data", "nn"):
            return importlib.import_module(f"{self.__name__}.{name}")
        kind = type(name, (), {"__class_getitem__": classmethod(lambda cls, item: cls)})
        setattr(self, name, kind)
        return kind


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(Finder())  # behind the real ones

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
