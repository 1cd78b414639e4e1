"""FederatedAveraging: the object people hold. Options in, rounds out; the loop itself is the hub's.

Knows the options, the hub, checkpoints and callbacks. Knows nothing about how participants train or where they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from llmchain_fed._config import unknown_option
from llmchain_fed.data.encoding import Examples
from llmchain_fed.errors import ConfigError, QuorumError
from llmchain_fed.federated.callback_list import Callbacks
from llmchain_fed.federated.callbacks import Callback, RunInfo
from llmchain_fed.federated.checkpoint.manager import CheckpointManager
from llmchain_fed.federated.checkpoint.membership import Members, checked_members
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.client.global_state_cache import GlobalStateCache
from llmchain_fed.federated.client.personalization import Ditto
from llmchain_fed.federated.history import History, RoundRecord
from llmchain_fed.federated.manual_round import ManualRounds
from llmchain_fed.federated.options import (
    Patience,
    check_numbers,
    check_travels,
    checked_patience,
    checked_quorum,
    sample_size,
    training_of,
)
from llmchain_fed.federated.participant import Participant, as_participants
from llmchain_fed.federated.reporting.screen import Screen
from llmchain_fed.federated.runtime import Runtime, checked_runtime
from llmchain_fed.federated.server.divergence import OnDivergence, checked_on_divergence
from llmchain_fed.federated.server.evaluation import Evaluator
from llmchain_fed.federated.server.replication import Replication
from llmchain_fed.federated.server.round import OpenRound
from llmchain_fed.federated.server.server import Server
from llmchain_fed.federated.settings import make_settings
from llmchain_fed.federated.target import Target
from llmchain_fed.training import trainable
from llmchain_fed.training.loop import TrainingConfig
from llmchain_fed.updates.aggregation import Aggregation, Weighting
from llmchain_fed.updates.aggregation.base import Rule
from llmchain_fed.updates.codecs.base import Codec
from llmchain_fed.updates.server_optimizers import ServerOptimizer


class FederatedAveraging(ManualRounds):
    """Lets a chain learn from several participants' examples without pooling them.

    In each round every participant starts from the same global weights, trains on its own examples, and hands over its
    trained weights; their mean Σ n_k/n · w_k is loaded into the chain. Two ways to drive it: `fit(rounds=n)`, or
    `train(local_data, device_id)` per participant and then `step()`.

    Making one runs a few short forward passes over made-up tokens, which show whether the model can be trained here;
    for a chain it checks that `save` could write it. A round that fails or is interrupted leaves chain and history as
    they were. Updates can leak what they were trained on: this is no privacy guarantee by itself.

    Args:
        model: A chain (also wrapped by `with_config` or `with_fallbacks`), an LLM, a LocalModel or a torch module.
        participants: Name → examples, or a list of `Participant`; with `runtime=TorchDistributed()` those of this rank.
        optimizer: The participants': a name, a torch.optim class, or an instance taken as the template.
        lr: Their learning rate.
        batch_size: examples per optimizer step.
        training: Everything else about local training.
        aggregation: "fedavg", "fednova"; for LoRA "fedit", "ffa", "rolora", "fedsa", "fedsvd", "fedex", "flora",
            "flexlora" (what each promises: `llmchain_fed.updates.aggregation`); or an object with `start`.
        server_optimizer: Moves the global weights along the mean update (`FedAdam()`, `DiLoCo()` …); None loads the
            mean itself.
        codec: What updates travel as: "bf16", "int8", "int4", "topk" or "topk:0.01", with error feedback; None sends
            the trained values bit by bit.
        broadcast_codec: Likewise for changes of the global weights on their way to the participants.
        personal: `Ditto(lam=…)`: every participant also trains a personal adapter.
        runtime: Where participants run; None is this process.
        evaluation: What held-out loss is measured on: a share of each participant's examples set apart (0.1), a mapping
            name → examples, or one set of examples for all.
        weighting: What an update counts by: "examples" (n_k), "tokens" or "equal". Counts are what a participant
            declares when it joins; nobody else can know them.
        max_weight_share: The largest share of a round that one update may weigh, such as 0.4. What is cut from it goes
            to the others in the proportion of their weights; where no more than 1/share take part, all weigh the same.
            Up to 1/share updates are kept until all are in. None sets no limit.
        participants_per_round: How many are sampled each round: a count, or a share as a float.
        quorum: Participants, and updates, without which a round fails; 1 by default: a round goes on with one alone.
            Who is out meanwhile, and why, stands in `attendance`.
        deadline: seconds a round's training may take; who is later is dropped and recorded. None sets none, and yet
            nobody in another process is waited for longer than a day: 24 hours are also what a site's policy lets one
            training take (`max_seconds`), unless its operator says otherwise.
        retries: How often a participant that could not be reached, or failed elsewhere, is asked again in a round.
        samples: held-out examples per participant whose answers are recorded before and after each round.
        checkpoint_dir: Where a checkpoint is written after each round; `FederatedAveraging.resume` goes on from it. A
            server optimizer of your own needs `state_dict` and `load_state_dict` for that, or starts its memory anew.
        keep_checkpoints: How many of the newest are kept; None keeps all.
        callbacks: Told of every round, and of who is out or back: TensorBoard, MLflow, Trackio, ConsoleTable, or your
            own `Callback`.
        seed: Decides sampling, the order of data and dropout.
        progress: Shows on stderr a line per round, one when somebody goes out and one when it is back; on a terminal or
            in a notebook a progress bar, too.

    Raises:
        ChainFileError, RecipeError: `model` is a chain that `save` could not write, so what is learnt would be lost.
            Put a parser of your own behind the chain, or federate the pipe `prompt | llm | parser`.
        ConfigError: An unknown option, or options that contradict each other.
        DuplicateParticipantError: Two participants of one name.
        NotTrainableError: The model has nothing to train.
        UnsupportedModelError: `model` is none of the above, or one that cannot be trained here (see `train_locally`).
    """

    def __init__(
        self,
        model: Any,
        *,
        participants: Mapping[Any, Any] | Iterable[Participant] | None = None,
        optimizer: Any = None,
        lr: float | None = None,
        batch_size: int | None = None,
        training: TrainingConfig | None = None,
        aggregation: str | Aggregation | Rule = "fedavg",
        server_optimizer: ServerOptimizer | None = None,
        codec: str | Codec | None = None,
        broadcast_codec: str | Codec | None = None,
        personal: Ditto | None = None,
        runtime: Runtime | None = None,
        evaluation: float | Mapping[str, Examples] | Examples | None = None,
        weighting: Weighting = "examples",
        max_weight_share: float | None = None,
        participants_per_round: int | float | None = None,
        quorum: int = 1,
        deadline: float | None = None,
        retries: int = 0,
        samples: int = 1,
        checkpoint_dir: str | Path | None = None,
        keep_checkpoints: int | None = 3,
        callbacks: Sequence[Callback] = (),
        seed: int = 0,
        progress: bool = True,
        **unknown: Any,
    ) -> None:
        federation = unknown.pop("_federation", None)
        for name in unknown:
            known = set(type(self).__init__.__annotations__) - {"return", "unknown"}
            raise ConfigError(f"{type(self).__name__}: {unknown_option(name, known)}")  # noqa: EM102
        check_numbers(samples, seed)
        self._given = model
        self._target = Target.of(model)
        self._model = self._target.model
        trainable.admit(self._model)
        self._target.check_savable()
        Callbacks(callbacks)  # refuses what is none
        self._training = training_of(training, optimizer=optimizer, lr=lr, batch_size=batch_size, seed=seed)
        trainable.check_batches(self._model, self._training.micro_batch_size or self._training.batch_size)
        self._global_states = GlobalStateCache(self._model)
        named_participants = as_participants(participants)
        self._transport = checked_runtime(runtime)
        replicated = self._transport.replicated
        if not (self._transport.sequential or replicated):
            check_travels(self._training)
        evaluator = Evaluator(self._target, evaluation, samples=samples, seed=seed)
        self._peers = {name: self._peer(p) for name, p in evaluator.divide(named_participants).items()}
        if not replicated:
            self._transport.host(self._peers)
        available = 0 if replicated else len(self._transport.nodes())
        settings = make_settings(
            self._model,
            self._training,
            self._peers.values(),
            available,
            aggregation=aggregation,
            server_optimizer=server_optimizer,
            codec=codec,
            broadcast_codec=broadcast_codec,
            personal=personal,
            weighting=weighting,
            max_weight_share=max_weight_share,
            participants_per_round=participants_per_round,
            quorum=quorum,
            deadline=deadline,
            retries=retries,
            seed=seed,
        )
        if replicated:
            self._transport.host(self._peers)
            available = len(self._transport.nodes())
            checked_quorum(quorum, sample_size(participants_per_round, available), available)
        self._server = Server(self._target, self._transport, evaluator, settings, federation)
        self._screen = Screen(self.attendance, elsewhere=not self._transport.sequential) if progress else None
        self._callbacks = Callbacks(callbacks, (self._screen,) if self._screen is not None else ())
        self.attendance.listen(self._callbacks.attendance_changed)
        self._server.begin()  # refuses a rule that does not fit the model now, not after the first round's training
        options = {"samples": samples, "quorum": quorum, "deadline": deadline, "retries": retries}
        options["evaluation"] = evaluation if isinstance(evaluation, float) else None
        shown = partial(_show_adapters, self._peers, self._server)  # not a method: who is let go must leave no cycle
        self._checkpoints = CheckpointManager(
            self._server,
            checkpoint_dir,
            keep_checkpoints,
            options,
            given=evaluation is not None,
            leads=self._transport.leads,
            shown=shown,
        )
        self._replication = Replication(self._server, self._transport, shown)
        self._open: OpenRound | None = None
        self._opened = 0.0

    @classmethod
    def resume(
        cls,
        checkpoint_dir: str | Path,
        model: Any,
        *,
        participants: Mapping[Any, Any] | Iterable[Participant] | None = None,
        round: int | None = None,  # noqa: A002 (the field's own word)
        members: Members = "same",
        **options: Any,
    ) -> Self:
        """Goes on from a checkpoint: with the same examples, bit for bit as if the run had never stopped.

        With `members="changed"` participants may be gone or new, and hold other examples or options than then. Weights,
        the server optimizer's memory, round numbers, history and patience go on; who stays keeps its own state, who is
        new starts at the global weights, and the states of the gone are dropped. The next round's record says who left,
        joined or changed; the run is then another one than the interrupted, so nothing is promised bit for bit.

        Options are those of the checkpoint; those that are code (an optimizer class, an aggregation of your own), and
        held-out examples that are no share, must be given again. `runtime` and `callbacks` always are.

        Args:
            checkpoint_dir: That of the run; it goes on writing there.
            model: The same chain as then; its weights are replaced by the checkpoint's.
            participants: The same as then, or with `members="changed"` those who take part from now on.
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
        found, merged, federation = CheckpointManager.read(checkpoint_dir, round, options, model)
        made = cls(model, participants=participants, checkpoint_dir=checkpoint_dir, _federation=federation, **merged)
        made._checkpoints.go_on(found, members)
        return made

    def __repr__(self) -> str:
        names = self._transport.nodes()
        shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        return (
            f"FederatedAveraging({self._model!r}, {len(names)} participants ({shown}), {self.round} rounds completed)"
        )

    def get_model(self) -> Any:
        """What was passed in: the same object, with the global weights in it."""
        return self._given

    # --- the whole loop ---------------------------------------------------------------------------------------------

    def fit(
        self,
        rounds: int,
        *,
        patience: int | None = None,
        min_delta: float = 0.0,
        on_divergence: OnDivergence = "warn",
        of: int | None = None,
    ) -> History:
        """Runs `rounds` more rounds.

        A federation diverges where the held-out loss of all together is above 1.5 × the best so far, the loss before
        the first round included, for two rounds in a row, or is not finite. The round's record and its line say so; a
        participant whose own loss does is noted, too.

        Args:
            rounds: At least one.
            patience: Stop early once the pooled held-out loss has not improved for this many rounds; None never does.
            min_delta: nats per token that count as an improvement.
            on_divergence: "warn" goes on; "stop" ends after the round that diverges, and where a round fails because
                nobody's training loss stayed finite.
            of: How many rounds the whole federation has, where this is a part of them: for the screen and callbacks.

        Returns:
            The history, of earlier calls too.

        Raises:
            ConfigError: No rounds or no participants; `patience` or "stop" without evaluation; a `min_delta` below 0;
                another `on_divergence`.
            DataError: A participant's examples cannot be used.
            QuorumError: A round has too few usable updates; earlier rounds are kept.
            FederationError: A round opened by `train()` is not closed.
            CheckpointError: A checkpoint cannot be written; the round itself is kept.
        """
        self._check_rounds("fit", rounds)
        # participants elsewhere may hold out examples of their own
        measured = self._server.evaluator.active or not self._transport.sequential
        stop = checked_patience(patience, min_delta, measured=measured)
        if stop is not None:
            stop.go_on(self._server.patience)
        stops = checked_on_divergence(on_divergence, measured=measured)
        self._everywhere(lambda: self._lead(rounds, stop, stops=stops, of=of))
        return self.history

    def _everywhere(self, work: Callable[[], Any]) -> Any:
        return self._replication.do(work)

    def _lead(self, rounds: int, patience: Patience | None, *, stops: bool, of: int | None) -> None:
        self._checkpoints.check_directory()  # here, where the other processes of a script hear of what it raises
        self.history.stopped_early = None
        options = {"model": self._model.name, **self._checkpoints.described()}
        info = RunInfo(options, tuple(self._transport.nodes()), self.round, rounds, of, self.attendance)
        self._callbacks.watch(info, self.history, lambda: self._rounds(rounds, patience, stops=stops))

    def _rounds(self, rounds: int, patience: Patience | None, *, stops: bool) -> None:
        server = self._server
        for left in reversed(range(rounds)):
            self._join()  # a round's seconds begin with its broadcast: an engine's start is not a round's cost
            try:
                record = server.run_round(self._callbacks.round_begins)
            except QuorumError:
                if not stops or server.diverged is None:
                    raise
                self.history.stopped_early = server.diverged
                break
            losses = (record.held_out_before, record.held_out_after)
            over = patience is not None and patience.over(
                *losses, believed=server.evaluator.is_shared or patience.is_believed(record)
            )
            why = server.diverged if stops and server.diverged else str(patience) if over else None
            server.patience = patience.state() if patience is not None and why is None and left else []
            self._completed(record)
            if why is not None:
                self.history.stopped_early = why if left else None  # the last round ends it anyway
                break
        server.patience = []

    def _completed(self, record: RoundRecord) -> None:
        """After a round: checkpoint, personal adapters, and those who watch, even if the write failed."""
        try:
            self._checkpoints.save()
        finally:
            self._show_adapters()
            self._callbacks.round_ended(record, self.history)

    def _show_adapters(self) -> None:
        """Personal models of this process's participants become adapters of its chain."""
        _show_adapters(self._peers, self._server)

    def _check_rounds(self, what: str, rounds: int) -> None:
        if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
            msg = f"{what} takes at least one round, got rounds={rounds!r}."
            raise ConfigError(msg)
        if not self._transport.nodes():
            msg = "there is nobody to learn from. Pass participants={name: examples, …}, or use train() and step()."
            raise ConfigError(msg)
        self._check_closed()

    def _join(self) -> None:
        newcomers = self._server.join()
        self._checkpoints.give_back()
        for name in newcomers:
            report = self.data_reports.get(name)
            if report is not None and self._screen is not None:
                self._screen.report(name, report)

    def _peer(self, participant: Participant) -> Client:
        return Client(self._target, participant, self._training, global_states=self._global_states)


def _show_adapters(clients: Mapping[str, Client], server: Server) -> None:
    for client in clients.values():
        client.show_adapter(server.round)
