"""Starts `torchrun_script.py` on three ranks and reads what they report."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("torchrun_script.py")


def torchrun(out, *options, restarts=0, seconds=100):
    """(exit status, output, reports by rank of the last attempt)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command += [f"--max-restarts={restarts}", str(SCRIPT), str(out), *map(str, options)]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    reports = {}
    for path in sorted(out.glob("rank*.json")):
        report = json.loads(path.read_text())
        reports[report["rank"]] = report
    return done.returncode, done.stdout + done.stderr, reports
