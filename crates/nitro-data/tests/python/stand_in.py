"""Lets mosaicml-streaming be imported without the heavy requirements that serve training only.

Where torch and others are missing, empty modules stand in for them, so that the package's own reader,
StreamingDataset and order can run.
"""

import importlib
import importlib.abc
import importlib.machinery
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
