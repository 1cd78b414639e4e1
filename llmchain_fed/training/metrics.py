"""Metrics: what held-out answers are measured by, beside the loss. By name, or a function of one's own.

Knows texts and probabilities of labels. Knows nothing about models, participants or rounds. Scikit-learn and sacrebleu
are imported where a name needs them.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from llmchain_fed._config import plain_number
from llmchain_fed.errors import ConfigError, MissingExtraError, install
from llmchain_fed.untrusted import one_line, shown

MAX_METRICS = 100
"""of a federation"""
MAX_VALUES = 16
"""of one metric"""
MAX_NAME = 100
"""characters of a metric's name, and of what one of its values is called"""
COLLAPSED = "collapsed"
"""what policies call the number of the label that all held-out examples are taken for, where it is one for all"""
LARGEST = 1e15
"""beyond which nothing is a value, in either direction"""
_TAKEN = ("held_out_loss", COLLAPSED)
Probabilities = Sequence[Mapping[str, float]]
Function = Callable[..., Mapping[str, float] | float]


@dataclass(frozen=True)
class Metric:
    """A metric of one's own, and which way is better.

    >>> def sensitivity(predictions, references, inputs):
    ...     ill = [p for p, r in zip(predictions, references, strict=True) if r == "yes"]
    ...     return {"sensitivity": ill.count("yes") / len(ill)}
    >>> Metric(sensitivity, maximize=True).name
    'sensitivity'

    Args:
        fn: `(predictions, references, inputs) -> {name: number}` over all of a participant's held-out examples; a
            fourth argument `probabilities`, one mapping label → probability per example, is given where there are
            labels. Or the name of a function that the sites of a federation register, each its own.
        maximize: Whether more is better, for all that it returns; needed where `fit(monitor=…)` goes by it.

    Raises:
        ConfigError: `fn` is neither a function nor a name.
    """

    fn: Function | str
    maximize: bool | None = None
    name: str = field(default="", compare=False)
    """what records, sites and policies call it; by default the function's own name"""

    def __post_init__(self) -> None:
        if not isinstance(self.fn, str) and not callable(self.fn):
            msg = f"a metric is a function or a name such as 'accuracy', got {self.fn!r:.80}."
            raise ConfigError(msg)
        if self.maximize is not None and not isinstance(self.maximize, bool):
            msg = f"maximize says whether more is better, True or False, got {self.maximize!r:.80}."
            raise ConfigError(msg)
        own = self.fn if isinstance(self.fn, str) else getattr(self.fn, "__name__", type(self.fn).__name__)
        object.__setattr__(self, "name", checked_name(self.name or own.strip("<>")))

    @property
    def code(self) -> bool:
        """Whether it is a function, and no name."""
        return not isinstance(self.fn, str)

    @property
    def wants_probabilities(self) -> bool:
        """Whether it has to have the probabilities of labels."""
        if isinstance(self.fn, str):
            return self.fn == "auc"
        parameter = _fourth(self.fn)
        return parameter is not None and parameter.default is inspect.Parameter.empty


def checked_name(name: Any) -> str:
    """A name that can be shown, filed and plotted.

    Raises:
        ConfigError: It is no text, empty, too long, or contains a slash or what cannot be shown.
    """
    if name in _TAKEN:
        msg = f"{name!r} is measured anyway, so no metric can have that name. Choose another: Metric(fn, name=…)."
        raise ConfigError(msg)
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or "/" in name or one_line(name) != name:
        msg = f"a metric's name has 1 to {MAX_NAME} characters in one line and no slash, got {name!r:.120}."
        raise ConfigError(msg)
    return name


def checked_metrics(given: Any, *, elsewhere: bool = False) -> tuple[Metric, ...]:
    """The metrics that a user gives, each under a name of its own.

    Args:
        given: Names, functions and `Metric` objects; or None.
        elsewhere: Sites may know names that nobody knows here.

    Raises:
        ConfigError: One is none of these, or a name that nobody knows; or two have one name.
        MissingExtraError: A name needs a library that is not installed here.
    """
    if given is None:
        return ()
    if isinstance(given, (str, Metric)) or not isinstance(given, Iterable):
        msg = f"metrics is a list of names and functions, got {given!r:.80}. Write metrics=[…]."
        raise ConfigError(msg)
    found: dict[str, Metric] = {}
    for item in given:
        metric = _metric(item)
        if not metric.code and metric.fn not in BUILT_IN and not elsewhere:
            raise ConfigError(unknown_metric(metric.name, BUILT_IN))
        if metric.name in found:
            remedy = "Name one of them: Metric(fn, name=…)." if metric.code else "List it once."
            msg = f"two metrics are called {metric.name!r}. {remedy}"
            raise ConfigError(msg)
        if not elsewhere and metric.name in BUILT_IN and not metric.code:
            _require(metric.name)
        found[metric.name] = metric
    if len(found) > MAX_METRICS:
        msg = f"{len(found)} metrics are given, at most {MAX_METRICS} are measured."
        raise ConfigError(msg)
    return tuple(found.values())


def _metric(item: Any) -> Metric:
    if isinstance(item, Mapping):  # as a federation's file has it
        if not {"name"} <= item.keys() <= {"name", "maximize"}:
            msg = f"a metric in a file is a name, or {{name: …, maximize: true}}, got {shown(dict(item), 120)}."
            raise ConfigError(msg)
        item = Metric(item["name"], item.get("maximize"))
    metric = item if isinstance(item, Metric) else Metric(item)
    if not metric.code and metric.fn in BUILT_IN:
        if metric.name != metric.fn:
            msg = f"{metric.fn!r} keeps its name, by which sites know it: {metric.name!r} cannot be another."
            raise ConfigError(msg)
        return Metric(metric.fn, True if metric.maximize is None else metric.maximize)
    return metric


def unknown_metric(name: str, known: Iterable[str], what: str = "metric") -> str:
    """The sentence for a name that nobody knows.

    >>> unknown_metric("acuracy", ["accuracy", "f1"])
    "unknown metric 'acuracy'; did you mean 'accuracy'? Known: accuracy, f1"
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {shown(name, MAX_NAME)!r}; {hint}Known: {', '.join(known) or 'none'}"


# --- computing --------------------------------------------------------------------------------------------------------


def computed(
    fn: Function,
    name: str,
    predictions: Sequence[str],
    references: Sequence[str],
    inputs: Sequence[Any],
    probabilities: Probabilities | None = None,
    *,
    quote: bool = True,
) -> tuple[dict[str, float], str | None]:
    """What a metric says of answers, one finite number or several, by name; and what of it is none.

    A function that returns a bare number has its own name for it. It has inputs and probabilities as copies, so that
    what it does to them changes no later measurement. What libraries warn of is left unsaid: a number that is none is
    said by itself; unless `quote`, without what it is instead and what it is called, which may be an example's text.

    Raises:
        ConfigError: It returns no numbers by name, or needs probabilities of labels, and there are none.
        Exception: Whatever it raises itself.
    """
    arguments: list[Any] = [list(predictions), list(references), copy.deepcopy(list(inputs))]
    parameter = _fourth(fn)
    keyword = {}
    if parameter is not None and (probabilities is not None or parameter.default is inspect.Parameter.empty):
        if probabilities is None:
            msg = f"the metric {name!r} needs the probabilities of labels. Give labels=[…]."
            raise ConfigError(msg)
        own = [dict(row) for row in probabilities]
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY or parameter.name == "probabilities":
            keyword[parameter.name] = own
        else:
            arguments.append(own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fn(*arguments, **keyword)
    values = found if isinstance(found, Mapping) else {name: found}
    if not 0 < len(values) <= MAX_VALUES:
        msg = f"the metric {name!r} returned {len(values)} values, wanted are 1 to {MAX_VALUES}."
        raise ConfigError(msg)
    numbers = {checked_name(key): _number(value) for key, value in values.items()}
    wrong = [f"{key!r} is no finite number ({shown(values[key], 60)})" for key, n in numbers.items() if n is None]
    if wrong and not quote:
        wrong = ["a value is no finite number"]  # how many would be a number of the function's own choice
    return {key: number for key, number in numbers.items() if number is not None}, "; ".join(wrong) or None


def _number(value: Any) -> float | None:
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else plain_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        return None
    return float(value)


def _fourth(fn: Function) -> inspect.Parameter | None:
    """The parameter that takes probabilities: the one of that name, or a fourth that has to be given."""
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # of C, without a signature
        return None
    if "probabilities" in parameters:
        return parameters["probabilities"]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    by_place = [p for p in parameters.values() if p.kind in kinds]
    return by_place[3] if len(by_place) > 3 and by_place[3].default is inspect.Parameter.empty else None


# --- by name ----------------------------------------------------------------------------------------------------------


def _accuracy(predictions: Sequence[str], references: Sequence[str], _: Any) -> float:
    """The share of answers that equal the wanted text."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(references, predictions))


def _f1(predictions: Sequence[str], references: Sequence[str], _: Any) -> float:
    """The mean over all texts that are wanted or answered of each one's F1 ("macro")."""
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, average="macro", zero_division=0.0))


def _auc(_: Any, references: Sequence[str], __: Any, probabilities: Probabilities) -> float:
    """The area under the ROC curve; of three labels or more the mean over each against all others."""
    from sklearn.metrics import roc_auc_score

    labels = list(probabilities[0])
    missing = [label for label in labels if label not in references]
    if missing:
        msg = f"no held-out example has the label {missing[0]!r:.60}, so there is no curve"
        raise ConfigError(msg)
    if strange := next((text for text in references if text not in labels), None):
        msg = f"a held-out example has {strange!r:.60}, which is none of the labels"
        raise ConfigError(msg)
    if len(labels) == 2:
        return float(roc_auc_score([text == labels[1] for text in references], [p[labels[1]] for p in probabilities]))
    order = sorted(labels)
    rows = [[p[label] for label in order] for p in probabilities]
    return float(roc_auc_score(references, rows, multi_class="ovr", labels=order))


def _exact_match(predictions: Sequence[str], references: Sequence[str], _: Any) -> float:
    """The share of answers that equal the wanted text but for white space around both."""
    pairs = list(zip(predictions, references, strict=True))
    return sum(answer.strip() == wanted.strip() for answer, wanted in pairs) / len(pairs)


def _chrf(predictions: Sequence[str], references: Sequence[str], _: Any) -> float:
    """chrF2 of sacrebleu over all answers together, 0 to 100."""
    from sacrebleu.metrics import CHRF

    return float(CHRF().corpus_score(list(predictions), [list(references)]).score)


def _rouge_l(predictions: Sequence[str], references: Sequence[str], _: Any) -> float:
    """The mean over examples of ROUGE-L's F1 (Lin 2004), 0 to 1; words are runs of letters, digits and _, in any case.

    No library that is installed has it without another tokenizer for English alone.
    """
    pairs = list(zip(predictions, references, strict=True))
    return sum(rouge_l_f1(answer, wanted) for answer, wanted in pairs) / len(pairs)


def rouge_l_f1(answer: str, wanted: str) -> float:
    """ROUGE-L of one answer, β = 1: from their longest common subsequence of words.

    >>> rouge_l_f1("police kill the gunman", "police killed the gunman")
    0.75
    """
    found, right = (re.findall(r"\w+", text.lower()) for text in (answer, wanted))
    if not found or not right:
        return float(found == right)
    row = [0] * (len(right) + 1)
    for word in found:
        before = row
        row = [0]
        for at, other in enumerate(right):
            row.append(before[at] + 1 if word == other else max(row[at], before[at + 1]))
    common = row[-1]
    return 2 * common / (len(found) + len(right))


BUILT_IN: Mapping[str, Function] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "auc": _auc,
    "exact_match": _exact_match,
    "chrf": _chrf,
    "rouge_l": _rouge_l,
}
"""the names that every participant knows; of each, more is better"""
_LIBRARIES = {"accuracy": "sklearn", "f1": "sklearn", "auc": "sklearn", "chrf": "sacrebleu"}


def _require(name: str) -> None:
    library = _LIBRARIES.get(name)
    if library is not None and find_spec(library) is None:
        package = {"sklearn": "scikit-learn"}.get(library, library)
        msg = f"the metric {name!r} needs {package}, which is not installed: {install('metrics', package)}"
        raise MissingExtraError(msg)
