"""FederatedAveraging: the object that people use. Options in, rounds out.

Knows the options, the server, checkpoints and callbacks. Knows nothing about how participants train or where they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack

from llmchain_fed._config import refusing_unknown
from llmchain_fed.data.examples import Examples, with_columns
from llmchain_fed.data.report import DataReport
from llmchain_fed.federated.callbacks import Callbacks, RunInfo, Stop
from llmchain_fed.federated.checkpoint.manager import CheckpointManager
from llmchain_fed.federated.checkpoint.membership import Members, checked_members
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.comparison.start import Start
from llmchain_fed.federated.fit import Fit, Keep, checked_rounds
from llmchain_fed.federated.history import History, RoundRecord
from llmchain_fed.federated.measures.kept import Keeper
from llmchain_fed.federated.measures.monitor import LOSS
from llmchain_fed.federated.options import FederationConfig, FederationOptions
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.parts.comparing import Comparing
from llmchain_fed.federated.parts.earlier_rounds import EarlierRounds
from llmchain_fed.federated.parts.fixed_options import FixedOptions
from llmchain_fed.federated.parts.manual_rounds import ManualRounds
from llmchain_fed.federated.parts.personal_models import PersonalModels
from llmchain_fed.federated.parts.previews import PreviewsData
from llmchain_fed.federated.reporting.about import about_of
from llmchain_fed.federated.reporting.screen import Screen
from llmchain_fed.federated.server.assembly import assemble
from llmchain_fed.federated.server.attendance import Attendance
from llmchain_fed.federated.server.cost_estimate import Plan, plan_of
from llmchain_fed.federated.server.divergence import OnDivergence
from llmchain_fed.federated.server.server import Replication, Server
from llmchain_fed.federated.settings import showing_options
from llmchain_fed.training.evaluation import EvaluationResult, evaluate_as
from llmchain_fed.training.names import meant_in_federation


class FederatedAveraging(FixedOptions, ManualRounds, EarlierRounds, PersonalModels, PreviewsData, Comparing):
    """Lets a chain learn from several participants' examples without pooling them.

    In each round every participant starts from the same global weights, trains on its own examples, and hands over its
    trained weights; their mean Σ n_k/n · w_k is loaded into the chain. Two ways to drive it: `fit(rounds=n)`, or
    `train(local_data, device_id)` per participant and then `step()`.

    Making one runs a few short forward passes over made-up tokens, which show whether the model can be trained here;
    for a chain it checks that `save` could write it. A round that fails or is interrupted leaves chain and history as
    they were. Updates can leak what they were trained on: this is no privacy guarantee by itself.

    Args:
        model: A chain, an LLM, any Runnable around one local model (retrieval, a graph, an agent …), a LocalModel or a
            torch module.
        participants: Name → examples, or a list of `Participant`; with `runtime=TorchDistributed()` those of this rank.
        optimizer: The participants': a name, a torch.optim class, or an instance taken as the template.
        checkpoint_dir: Where a checkpoint is written after each round; `FederatedAveraging.resume` goes on from it.
        **options: What `FederationConfig` says, where each is explained: `training` or `lr` and `batch_size` for it,
            `aggregation`, `codec`, `evaluation`, `seed` … Also `llm`: which model of a Runnable is trained, where that
            cannot be told; `runtime`: where participants run, by default this process; `callbacks`, told of every round
            and of who is out or back: TensorBoard, MLflow, Trackio, ConsoleTable, or your own `Callback`; and
            `progress`, which shows each round, and who goes out, on stderr.

    Raises:
        ChainFileError, RecipeError: `model` is a chain that `save` could not write, so what is learnt would be lost.
            Put a parser of your own behind the chain, or federate the pipe `prompt | llm | parser`.
        ConfigError: An unknown option, or options that contradict each other.
        DuplicateParticipantError: Two participants of one name.
        NotTrainableError: The model has nothing to train.
        UnsupportedModelError: `model` is none of the above, or one that cannot be trained here (see `train_locally`).
    """

    @showing_options
    def __init__(
        self,
        model: Any,
        *,
        participants: Mapping[Any, Any] | Iterable[Participant] | None = None,
        optimizer: Any = None,
        checkpoint_dir: str | Path | None = None,
        **options: Unpack[FederationOptions],
    ) -> None:
        Callbacks(callbacks := options.get("callbacks", ()))  # refuses what is none, before anything is made
        self._given, self._llm, self._writes = model, options.get("llm"), checkpoint_dir is not None
        self._server, self._peers, self._peer = assemble(model, participants, optimizer, options)
        self._runtime = self._server.runtime
        elsewhere = not self._runtime.sequential
        self._start = None if elsewhere else Start.of(self._server)
        self._screen = Screen(self.attendance, elsewhere=elsewhere) if options.get("progress", True) else None
        self._callbacks = Callbacks(callbacks, (self._screen,) if self._screen is not None else ())
        self.attendance.listen(self._callbacks.attendance_changed)
        self._show_adapters = partial(_show_adapters, self._server, self._peers)  # no method: no cycle
        self._checkpoints = CheckpointManager(self._server, checkpoint_dir, shown=self._show_adapters)
        self._keeper = Keeper(self._server, self._checkpoints)
        self._replication = Replication(self._server, self._show_adapters)
        self._open, self._opened = None, 0.0

    @classmethod
    @showing_options
    def resume(
        cls,
        checkpoint_dir: str | Path,
        model: Any,
        *,
        participants: Mapping[Any, Any] | Iterable[Participant] | None = None,
        optimizer: Any = None,
        round: int | None = None,  # noqa: A002 (the field's own word)
        members: Members = "same",
        **options: Unpack[FederationOptions],
    ) -> Self:
        """Goes on from a checkpoint: with the same examples, bit for bit as if the run had never stopped.

        With `members="changed"` participants may be gone or new, and have other examples or options than then. Weights,
        the server optimizer's memory, round numbers, history and patience go on; who stays keeps its own state, who is
        new starts at the global weights, and the states of the gone are dropped. The next round's record says who left,
        joined or changed; the run is then another one than the interrupted, so nothing is promised bit for bit.

        Options are those of the checkpoint; those that are code (an optimizer class, an aggregation of your own), and
        held-out examples that are no share, must be given again. `runtime` and `callbacks` always are.

        Args:
            checkpoint_dir: That of the run; it goes on writing there.
            model: The same chain as then; its weights are replaced by the checkpoint's.
            participants: The same as then, or with `members="changed"` those who take part from now on.
            optimizer: The participants', where it was code.
            round: Which checkpoint; None is the newest.
            members: "same" refuses other participants, or other counts of examples, than the checkpoint's;
                "changed" goes on with them. `participants_per_round` may then be given anew.
            **options: Further options of `FederatedAveraging`.

        Raises:
            CheckpointError: None there; incomplete or altered; or of another base, prompt, adapter, set of participants
                or option that decides the future. Nothing has changed.
            ConfigError: `members` is neither of the two; or an option does not fit the participants there are now.
        """
        members = checked_members(members)
        found, merged = CheckpointManager.read(checkpoint_dir, round, options, optimizer, model)
        made = cls(model, participants=participants, optimizer=optimizer, checkpoint_dir=checkpoint_dir, **merged)
        made._server.client_manager.federation = found.about.federation
        made._checkpoints.go_on(found, members)
        return made

    def __repr__(self) -> str:
        names = self._runtime.nodes()
        people = f"{len(names)} participants ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
        return f"FederatedAveraging({self._server.model!r}, {people}, {self.round} rounds completed)"

    def get_model(self) -> Any:
        """What was passed in: the same object, with the global weights in it."""
        return self._given

    @property
    def config(self) -> FederationConfig:
        """The options that decide how it goes on; what is code stands there by its name."""
        return self._server.settings.config

    @property
    def round(self) -> int:
        """Rounds completed."""
        return self._server.round

    @property
    def history(self) -> History:
        """The rounds so far."""
        return self._server.history

    @property
    def attendance(self) -> Attendance:
        """Who is in and out, since when and why first, and who is waited for."""
        return self._server.client_manager.attendance

    @property
    def data_reports(self) -> dict[str, DataReport]:
        """What became of each participant's examples, once they have joined."""
        known = self._server.data_reports  # those of this process are the same, with names of columns
        here = ((name, client.data.report) for name, client in self._peers.items())
        return known | {name: report for name, report in here if report is not None and report == known.get(name)}

    def evaluate(self, data: Examples) -> EvaluationResult:
        """Held-out loss of the current global weights on any examples: nats per token, or per example over labels.

        Raises:
            DataError: The examples cannot be used, or, over labels, a completion is none of them.
        """
        target, how = self._server.target, self._server.settings.training
        return evaluate_as(how, target.model, with_columns(data, self.config.columns), target.prompt)

    def plan(self, rounds: int) -> Plan:
        """What so many rounds will take: bytes, memory, and time from one timed optimizer step.

        Raises:
            ConfigError: No rounds, or no participants.
        """
        rounds = checked_rounds("plan", rounds, self._server)
        self._check_closed()
        return Plan(**self._together(lambda: asdict(plan_of(self._server, rounds))))

    @refusing_unknown(meant_in_federation)
    def fit(
        self,
        rounds: int,
        *,
        patience: int | None = None,
        min_delta: float = 0.0,
        monitor: str = LOSS,
        keep: Keep = "last",
        on_divergence: OnDivergence = "warn",
        of: int | None = None,
    ) -> History:
        """Runs `rounds` more rounds; gives back the history, of earlier calls too.

        A federation diverges where the held-out loss of all together is above 1.5 × the best so far, the loss before
        the first round included, for two rounds in a row, or is not finite. The round's record and its line say so; a
        participant whose own loss does is noted, too.

        Args:
            rounds: At least one.
            patience: Stop early once the monitored value has not improved for this many rounds; None never does.
            min_delta: What counts as an improvement there: nats per token, or a metric's own unit.
            monitor: The pooled value that rounds are judged by: "held_out_loss", or a value of `metrics=`.
            keep: "last" ends with the last round's weights. "best" ends with those of the best round, by `monitor`, of
                this fit and of those before it whose weights there are; the weights before the first round are no
                candidate. Personal models and the server optimizer go back with them, history and round numbers do not.
            on_divergence: "warn" goes on; "stop" ends after the round that diverges, and where a round fails because
                nobody's training loss stayed finite.
            of: How many rounds the whole federation has, where this is a part of them: for the screen, for callbacks,
                and for `TrainingConfig(lr_schedule=…)`, which runs over them. By default those up to this call's last,
                so that a further call makes the federation longer, and has the later part of a longer schedule.

        Raises:
            ConfigError: No rounds or no participants; `patience`, `keep="best"` or "stop" without evaluation, which for
                participants elsewhere shows once all have joined; a `monitor` that no participant computes, or of which
                nobody said which way is better; a `min_delta` below 0; another `keep` or `on_divergence`; an `of`
                below 1.
            DataError: A participant's examples cannot be used.
            QuorumError: A round has too few usable updates; earlier rounds are kept.
            FederationError: A round opened by `train()` is not closed.
            CheckpointError: A checkpoint cannot be written; the round itself is kept.
        """
        rounds = checked_rounds("fit", rounds, self._server)
        self._check_closed()
        fit = Fit.asked(
            self._server,
            rounds,
            patience=patience,
            min_delta=min_delta,
            monitor=monitor,
            keep=keep,
            on_divergence=on_divergence,
            of=of,
        )

        def lead() -> None:
            self._check_directory()  # here, where the other processes of a script hear of what it raises
            self.history.stopped_early = None
            options = {"model": self._server.model.name, **self._checkpoints.described()}
            info = RunInfo(options, tuple(self._runtime.nodes()), self.round, rounds, of, self.attendance)
            self._tell_steps()
            self._callbacks.watch(info, self.history, run)

        def run() -> None:
            if fit.run(self._join, self._callbacks.round_begins, self._completed, self._keeper):
                self._checkpoints.save()  # where this goes on, it goes on with these weights
                self._show_adapters()

        self._replication.do(lead)
        return self.history

    def _check_directory(self) -> None:
        self._checkpoints.check_directory()

    def _completed(self, record: RoundRecord) -> Stop | None:
        """After a round: checkpoint, personal adapters, and those who watch, even if the write failed."""
        self.history.about = about_of(self._server, record, self.history.about)
        try:
            self._checkpoints.save()
        finally:
            self._show_adapters()
            said = self._callbacks.round_ended(record, self.history)
        return said

    def _tell_steps(self) -> None:
        """Lets this process's participants say how far they are, where a bar shows it."""
        tell = self._screen.stepped if self._screen is not None and self._screen.shows_a_bar else None
        for client in self._runtime.local.values():
            if isinstance(client, Client):
                client.tell_step = tell

    def _together(self, work: Callable[[], Any]) -> Any:
        """What work gives once everybody has joined, in every process of the script."""

        def joined() -> Any:
            self._join()
            return work()

        return self._replication.do(joined)

    def _join(self) -> None:
        newcomers = self._server.join()
        self._checkpoints.give_back()
        for name in newcomers:
            report = self.data_reports.get(name)
            if report is not None and self._screen is not None:
                self._screen.report(name, report)


def _show_adapters(server: Server, clients: Mapping[str, Client]) -> None:
    """Personal models of this process's participants become adapters of its chain."""
    for client in clients.values():
        client.show_adapter(server.round)
