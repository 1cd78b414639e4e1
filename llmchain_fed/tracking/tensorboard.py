"""TensorBoard: a federation's rounds as event files.

Knows torch's SummaryWriter. Knows nothing of how rounds come about.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmchain_fed.errors import MissingExtraError, install
from llmchain_fed.federated.callbacks import Callback, RunInfo, metrics_of, samples_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from llmchain_fed.federated.history import History, RoundRecord


class TensorBoard(Callback):
    """Writes scalars and sample texts that `tensorboard --logdir …` shows; step is the round's number.

    Scalars are float32, as TensorBoard's are: byte counts above 16 MB are rounded. A fit that starts at an earlier
    round than the folder has, as after a restored checkpoint, hides the rounds it runs again. The texts are held-out
    examples: who can read the folder can read them.

    Args:
        log_dir: Folder of this run; made when it does not exist.
        samples: Also writes the rounds' sample texts.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, log_dir: str | Path, *, samples: bool = True) -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            msg = f"TensorBoard needs tensorboard, which is not installed: {install('tensorboard', 'tensorboard')}"
            raise MissingExtraError(msg) from error
        self.log_dir = Path(log_dir)
        self._samples = samples
        self._writer: SummaryWriter | None = None

    def __repr__(self) -> str:
        return f"TensorBoard({str(self.log_dir)!r})"

    def on_fit_begin(self, run: RunInfo) -> None:
        """Opens an event file and writes the settings as a table."""
        self._close()
        writer = self._open(purge_step=run.start_round + 1)
        rows = {**run.options, "participants": ", ".join(run.participants), "rounds": run.rounds}
        table = ["| setting | value |", "|---|---|", *(f"| {_cell(k)} | {_cell(v)} |" for k, v in rows.items())]
        writer.add_text("federation/settings", "\n".join(table), run.start_round)
        writer.flush()

    def on_round_end(self, record: RoundRecord, history: History) -> None:  # noqa: ARG002
        """Writes the round's numbers and samples, and flushes them."""
        writer = self._open()
        for name, value in metrics_of(record).items():
            writer.add_scalar(name, value, record.round)
        if self._samples:
            for participant, text in samples_of(record).items():
                writer.add_text(f"samples/{participant}", text, record.round)
        writer.flush()

    def on_fit_end(self, history: History) -> None:  # noqa: ARG002
        """Closes the file; another fit opens another in the same folder, which TensorBoard shows as one run."""
        self._close()

    def on_error(self, error: BaseException) -> None:  # noqa: ARG002
        """Closes the file; it contains the rounds that were completed."""
        self._close()

    def _open(self, purge_step: int | None = None) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.log_dir), purge_step=purge_step)
        return self._writer

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
