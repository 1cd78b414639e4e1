"""A job of two ranks whose second announces 2⁶⁰ bytes instead of an answer; the first prints how its calls ended.

RANK=0|1 WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… python hostile_rank.py
"""

import json
import time

import torch
import torch.distributed as dist

from llmchain_fed import TorchDistributed
from llmchain_fed.errors import FederationError
from llmchain_fed.runtimes.rank_messages import _tensor


def main():
    runtime = TorchDistributed(timeout=8.0)
    if runtime.rank == 1:
        text = json.dumps({"names": ["x"]}).encode()
        dist.send(torch.tensor([len(text), 0]), 0)
        dist.send(_tensor(text), 0)
        for _ in range(2):  # homes, and the task
            sizes = torch.empty(2, dtype=torch.int64)
            dist.recv(sizes, 0)
            for size in sizes.tolist():
                if size:
                    dist.recv(torch.empty(size, dtype=torch.uint8), 0)
        dist.send(torch.tensor([2**60, 0]), 0)
        time.sleep(1)
        return
    runtime.host({})
    began = time.monotonic()
    for _ in range(2):
        try:
            dict(runtime.call("train", ["x"], b"payload"))
        except FederationError as error:
            print(f"{time.monotonic() - began:.1f} {error}", flush=True)


main()
