"""The job as it is submitted: four small JSON files that name two installed classes. It carries no code.

Knows the engine's job layout. Knows nothing of sessions or sockets. A site runs these classes only if its operator's
`local/resources.json` lists them (`kits.configure`), and never anything a job brings along.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

HUB = "llmchain_fed.runtimes.nvflare.bridge.HubBridge"
SITE = "llmchain_fed.runtimes.nvflare.bridge.SiteBridge"
CONTROLLER = "llmchain_fed.runtimes.nvflare.controller.Controller"
EXECUTOR = "nvflare.collab.runtime.executor.CollabExecutor"
SOCKET = "LLMCHAIN_FED_SOCKET"
"""environment variable of a site's engine: where its peer listens; set by the site's operator"""
_COMING = 12.0  # seconds a site has to come to a job that has begun; after that the others begin without it
_THREADS = {"max_inbound_call_threads": 16, "max_outbound_call_threads": 100}


def write_job(folder: Path, *, name: str, sites: Sequence[str], socket: str, run: str) -> Path:
    """Writes the job into `folder/name`, for these sites and no others, and returns that. `run`: see `HubBridge`."""
    config = folder / name / "app" / "config"
    config.mkdir(parents=True)
    files = {
        folder / name / "meta.json": {
            "name": name,
            "resource_spec": {},
            "min_clients": 1,  # who is missing is the loop's business: it has a quorum
            "deploy_map": {"app": ["server", *sites]},
        },
        config / "config_fed_server.json": {
            "format_version": 2,
            "workflows": [
                {
                    "id": "controller",
                    "path": CONTROLLER,
                    "args": {
                        "server_obj_id": "_server",
                        "collab_obj_ids": [],
                        "props": {},
                        "sync_task_timeout": _COMING,
                    }
                    | _THREADS,
                }
            ],
            "components": [{"id": "_server", "path": HUB, "args": {"socket": socket, "run": run}}],
            "task_data_filters": [],
            "task_result_filters": [],
        },
        config / "config_fed_client.json": {
            "format_version": 2,
            "executors": [
                {
                    "tasks": ["*"],
                    "executor": {
                        "path": EXECUTOR,
                        "args": {"client_obj_id": "_client", "collab_obj_ids": [], "props": {}} | _THREADS,
                    },
                }
            ],
            "components": [{"id": "_client", "path": SITE, "args": {}}],
            "task_data_filters": [],
            "task_result_filters": [],
        },
    }
    for path, content in files.items():
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder / name
