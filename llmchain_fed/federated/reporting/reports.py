"""Reports: what a history can write for people who were not there.

Knows files. Knows nothing of how a page looks; that stands in `page`, which is loaded when one is asked for.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from llmchain_fed.storage.own_files import write_whole


class Reports:
    """The part of a `History` that writes pages."""

    def report(
        self, path: str | Path, *, title: str | None = None, comparison: Any = None, samples: bool = True
    ) -> Path:
        """Writes one HTML page about the federation, for everyone who took part; gives back its path.

        It says for each participant whether taking part helped, shows every round, what left whom in bytes and kinds,
        the data by counts, model, options and versions, and what went wrong. It is one file that loads nothing from
        anywhere and runs no script; the same history gives the same bytes.

        Args:
            path: Of the file, such as "report.html"; missing folders are made, a page that is there is replaced.
            title: The headline; by default it says how many took part.
            comparison: What `fed.compare` gave, so that each participant's loss is also shown beside that of training
                alone.
            samples: Whether the samples in the history stand on the page. They are held-out texts of the participants:
                without them the page has numbers, names, options and notes alone.

        Raises:
            ConfigError: The history has no round yet, or `comparison` has no rows; nothing is written.
            OSError: It cannot be written; what was there is as it was.
        """
        from llmchain_fed.federated.reporting.page import page

        text = page(self, title=title, comparison=comparison, samples=samples)  # type: ignore[arg-type]
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() else 0o666
        write_whole(path, text, mode=mode, follow=True)
        return path
