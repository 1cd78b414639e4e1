"""Two real ranks over gloo, one of which says what makes no sense: rank 0 names it, in time, and the group is over.

Belongs here: what needs processes. Does not: heads and sizes of every kind (test_frames).
"""

import os
import subprocess
import sys
from pathlib import Path

from federation_processes import free_port

SCRIPT = Path(__file__).parent / "corpus" / "hostile_rank.py"


def test_a_rank_that_announces_more_than_there_is_memory_is_named_at_once():
    port, ranks = free_port(), []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        command = [sys.executable, str(SCRIPT)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    try:
        said, log = ranks[0].communicate(timeout=90)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    first, second = said.decode().splitlines()
    seconds, message = first.split(" ", 1)
    why = "rank 1 ('x') sent what makes no sense: a head of 1,152,921,504,606,846,976 bytes was announced"
    assert message.startswith(why), log.decode()[-2000:]
    assert float(seconds) < 8
    assert second.split(" ", 1)[1] == message, "the group is not used again"
