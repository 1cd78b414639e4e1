"""An operation that this package does not have: how many examples a participant has, and how long completions are."""

from typing import Annotated

from pydantic import Field

from llmchain_fed.federated.client.operations import register_task
from llmchain_fed.federated.protocol.answers import TaskAnswer
from llmchain_fed.federated.protocol.tasks import Task


class StatisticsTask(Task):
    """How many examples are there, of at least so many tokens?"""

    operation = "statistics"
    counts_as_training, measured = False, 0

    at_least: Annotated[int, Field(ge=0, le=10**6)] = 0


class StatisticsAnswer(TaskAnswer):
    """Counts, and no text."""

    max_bytes = 200

    examples: Annotated[int, Field(ge=0, le=10**9)]
    mean_tokens: Annotated[float, Field(ge=0.0, le=1e6)]


def statistics(client, task):
    data = client.data.train()
    lengths = [len(completion) for _, completion in (data[i] for i in range(len(data)))]
    lengths = [length for length in lengths if length >= task.at_least]
    return StatisticsAnswer(examples=len(lengths), mean_tokens=sum(lengths) / max(1, len(lengths)))


register_task(StatisticsTask, statistics)
