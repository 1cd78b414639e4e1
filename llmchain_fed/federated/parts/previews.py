"""PreviewsData: what each participant of this process learns, to be looked at before a round.

Knows the participants of this process. Knows nothing about rounds, or how a preview is made and drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llmchain_fed.chain.sources import preview_over
from llmchain_fed.data.encoding import EncodedExamples
from llmchain_fed.data.examples import is_ready_tensors, with_columns
from llmchain_fed.data.preview import Preview, joined
from llmchain_fed.data.previewing import preview_of_batches, preview_of_rows, previewed
from llmchain_fed.errors import ConfigError, DataError
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.runtime import Runtime
from llmchain_fed.untrusted import shown


class PreviewsData:
    """The part of `FederatedAveraging` that shows what is learnt."""

    _runtime: Runtime

    def preview(self, participant: Any, *, count: int = 1) -> Preview:
        """What is learnt of a participant's first examples: text, tokens, which are learnt, and where each came from.

        What became of all of its examples is noted, and why the first was left out, where one was. Examples are read
        as `fit` reads them, once; a DataLoader's first batch is drawn.

        Args:
            participant: The name of one in this process.
            count: So many examples.

        Raises:
            ConfigError: Nobody of that name is in this process, or no count.
            DataError: An example cannot be read; where they could not be trained on for another reason, a note says it.
        """
        name, client = str(participant), self._runtime.local.get(str(participant))
        if not isinstance(client, Client):
            known = sorted(n for n, c in self._runtime.local.items() if isinstance(c, Client))
            msg = (
                f"no participant {shown(name, 80)} is in this process ({shown(known, 300)} are). Examples stay where "
                "they are: preview those of another there, by chain.preview(example)."
            )
            raise ConfigError(msg)
        if type(count) is not int or count < 1:
            msg = f"count is how many examples are shown, at least 1, got {count!r:.40}."
            raise ConfigError(msg)
        return _preview(client, count)


def _preview(client: Client, count: int) -> Preview:
    examples, target = client.participant.examples, client.target
    if is_ready_tensors(examples):
        return preview_of_batches(examples, target.model, count)
    notes: list[str] = []
    data: Any = None
    try:
        data = client.data.train()
        notes.append(f"{client.name} trains on {data.report.in_words()}")
        if data.first_left_out:
            notes.append(f"the first that is left out: {data.first_left_out}")
    except DataError as error:
        notes.append(f"these examples are refused: {error}")
    if isinstance(examples, Iterator):  # read by now, and never again
        if not isinstance(data, EncodedExamples):
            raise DataError(notes[-1])
        return joined([preview_of_rows((data[i] for i in range(len(data))), target.model, count)], notes)
    longest, examples = client.config.max_length, with_columns(examples, client.participant.columns)
    if target.prompt is None:
        found = previewed(examples, target.model, count=count, max_length=longest)
    else:
        found = preview_over(target.prompt, examples, count=count, max_length=longest)
    titled = tuple(replace(each, title=f"{client.name}, {each.title}") for each in found.examples)
    return joined([replace(found, examples=titled)], notes)
