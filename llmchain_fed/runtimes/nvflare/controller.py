"""Controller: the engine's own, except that a site which does not come to a job is left out of it.

Knows how the engine begins a job. Knows nothing of frames. The engine's controller fails the job for all as soon as one
site is not there after `sync_task_timeout` seconds (NVFlare 2.9.0, collab/runtime/controller.py, `control_flow`): a
site whose machine fell asleep, or whose kit was started twice, would cost all the others a minute and the job.
"""

from __future__ import annotations

from typing import Any

from nvflare.collab.runtime.controller import CollabController
from nvflare.collab.runtime.defs import SETUP_TASK_NAME, SYNC_TASK_NAME


class Controller(CollabController):  # type: ignore[misc]  # nvflare has no types
    """Begins a job with those who came; a call to one of the others fails with its own reason."""

    client_info: dict[str, Any]
    client_setup_status: dict[str, bool]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._came: dict[str, Any] = {}

    def broadcast_and_wait(self, task: Any, fl_ctx: Any, **options: Any) -> None:
        """As the engine's: the first task asks who is there; the second tells those, and only those, of each other."""
        if task.name == SETUP_TASK_NAME:
            options |= {"targets": list(self._came), "min_responses": len(self._came)}
        super().broadcast_and_wait(task=task, fl_ctx=fl_ctx, **options)
        if task.name == SYNC_TASK_NAME:
            self._came = {name: info for name, info in self.client_info.items() if info is not None}
            for info in self._came.values():  # all sites offer the same: that of one stands for who did not come
                self.client_info = {name: found or info for name, found in self.client_info.items()}
        elif task.name == SETUP_TASK_NAME:
            self.client_setup_status |= {name: True for name in self.client_info if name not in self._came}
