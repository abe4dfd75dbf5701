"""Prints the order in which mosaicml-streaming reads weighted streams, for each case two epochs.

Usage: streams.py CASES SCRATCH

CASES is a JSON list of {"streams": [{"local": FOLDER, "repeat": 2}, ...], "dataset": {"shuffle": true}}.
"""

import json
import os
import sys

import stand_in  # noqa: F401
from streaming import Stream, StreamingDataset

cases, scratch = sys.argv[1:3]
os.environ["TMPDIR"] = scratch
orders = []
for case in json.loads(cases):
    streams = [Stream(**stream) for stream in case["streams"]]
    how = dict(case["dataset"])
    if how["shuffle"]:
        how["shuffle_algo"] = "py1s"  # it decides the number of canonical nodes, shuffled or not
    dataset = StreamingDataset(streams=streams, batch_size=4, **how)
    dataset.get_item = lambda i, *rest: i
    orders.append([[int(i) for i in dataset] for _ in range(2)])
print(json.dumps(orders))
