"""Handshakes: until a connection has its name, what comes over it is handled one frame after the other.

Knows NVFlare's connection manager (NVFlare 2.9, fuel/f3/sfm/conn_manager.py), which hands each frame to a thread of a
pool, and answers a handshake before it has noted whose connection it is. The other side speaks on once it is answered:
what it says in that moment finds no name and is lost, a site's registration too, whose engine then ends.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from typing import Any


class FramesInOrder:
    """Stands in NVFlare's connection manager, between what receives frames and the pool that handles them.

    A frame that is handled can wait for others of its connection, so their order ends with the handshake.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[Any, deque[Any]] = {}
        """connection → its frames that came before it had a name, without the one being handled"""

    def install(self) -> None:
        """Takes the place of the manager's method; NVFlare has no hook between the two."""
        from nvflare.fuel.f3.sfm.conn_manager import ConnManager

        ConnManager.process_frame = lambda manager, connection, frame: self.take(manager, connection, frame)

    def take(self, manager: Any, connection: Any, frame: Any) -> None:
        """Has a frame that was just received handled, now or after those that came before it."""
        if manager.stopped:
            return
        with self._lock:
            waiting = self._waiting.get(connection)
            if waiting is not None:
                waiting.append(frame)
                return
            named = connection.sfm_endpoint is not None
            if not named:
                self._waiting[connection] = deque()
        if named:
            _submit(manager, manager.process_frame_task, connection, frame)
        else:
            _submit(manager, self._handle, manager, connection, frame)

    def _handle(self, manager: Any, connection: Any, frame: Any) -> None:
        while True:
            manager.process_frame_task(connection, frame)
            with self._lock:
                waiting = self._waiting[connection]
                if connection.sfm_endpoint is not None or not waiting:
                    del self._waiting[connection]
                    break
                frame = waiting.popleft()
        for later in waiting:
            _submit(manager, manager.process_frame_task, connection, later)


def _submit(manager: Any, task: Any, *arguments: Any) -> None:
    with suppress(RuntimeError):  # the pool takes no more once the manager stops
        manager.frame_mgr_executor.submit(task, *arguments)
