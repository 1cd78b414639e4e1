"""Every exception this package raises on purpose.

Each says what happened (with values), why it matters and what to do. A failed call leaves weights, history
and files as they were.

    LLMChainFedError
    ├── ConfigError                   an option that is unknown, out of range or contradicts another
    ├── MissingExtraError             an optional dependency is not installed (names the extra)
    ├── RecipeError                   a prompt or chain recipe that is unknown or not allowed
    ├── ChainFileError                a saved chain directory that is incomplete, altered or foreign
    ├── CheckpointError               a checkpoint that is incomplete, altered or another federation's
    ├── ModelError
    │   ├── UnsupportedModelError     not a model, LLM or chain that can be trained here
    │   ├── NotTrainableError         no parameter requires a gradient
    │   ├── WeightsMismatchError      a state of another adapter or model, or with NaN in it
    │   └── PromptTooLongError        the prompt leaves no room in the model's context
    ├── DataError
    │   ├── ChatTemplateError         a chat template that refuses its messages, or looks into text it should not
    │   ├── DialogueError             messages out of order, or without an answer to learn
    │   ├── EmptyParticipantError     no usable example
    │   ├── ExampleFailedError        a composed chain that raises for an example
    │   ├── LabelError                labels that are no set of different texts, or a completion that is none of them
    │   ├── PromptVariablesError      the example's variables are not the prompt's
    │   ├── SchemaError               a schema that no answer can keep to, or a value or call that does not fit its own
    │   ├── TemplatedTwiceError       a value already carries the template's text
    │   └── UnsayableError            completions that decoding does not give back
    ├── TrainingError
    │   └── NonFiniteLossError        the loss or a weight became NaN or infinite
    └── FederationError
        ├── ContractError             a participant with another base, adapter, prompt or version
        ├── DeadlineError             no answer before the deadline
        ├── DuplicateParticipantError two participants of one name, or one that trained twice in a round
        ├── NothingTrainedError       step() before any participant trained
        ├── ParticipantError          a participant elsewhere failed, or answered what makes no sense
        ├── PolicyError               a site's policy does not allow what was asked
        ├── QuorumError               fewer participants or updates than the quorum asks for
        ├── TransportError            the way to a participant or to the engine is broken
        └── UpdateRefusedError        an update that is malformed, foreign, stale or not finite
"""


class LLMChainFedError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(LLMChainFedError):
    """An option that is unknown, out of range or contradicts another."""


class MissingExtraError(LLMChainFedError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class RecipeError(LLMChainFedError):
    """A prompt or chain recipe that is unknown, malformed or not allowed."""


class ChainFileError(LLMChainFedError):
    """A saved chain directory that is incomplete, altered or of a foreign format."""


class CheckpointError(LLMChainFedError):
    """A federation's checkpoint that is incomplete, altered, another federation's, or cannot be written."""


class ModelError(LLMChainFedError):
    """Something about the model itself."""


class UnsupportedModelError(ModelError):
    """Not a model, LLM or chain that can be trained or asked here."""


class NotTrainableError(ModelError):
    """No parameter of the model requires a gradient."""


class WeightsMismatchError(ModelError):
    """A state whose names, shapes or values do not fit this model."""


class PromptTooLongError(ModelError):
    """The prompt leaves no room for an answer in the model's context."""


class DataError(LLMChainFedError):
    """An example, or a source of examples, that cannot be used."""


class DialogueError(DataError):
    """A conversation whose messages are out of order, or in which there is no answer to learn."""


class EmptyParticipantError(DataError):
    """A participant without a single usable example."""


class ExampleFailedError(DataError):
    """A composed chain raises for an example before or behind its model: a retriever, a function, a parser."""


class LabelError(DataError):
    """Labels that are empty, given twice or cannot be told apart, or a completion that is none of them."""


class SchemaError(DataError):
    """A schema that no answer can keep to, or not within the budget; or an object or a call that does not fit."""


class ChatTemplateError(DataError):
    """A chat template that refuses the messages it is given, or that cannot be applied to them."""


class UnsayableError(DataError):
    """Completions that the model could never give as an answer, because decoding does not give them back."""


class PromptVariablesError(DataError):
    """An example whose variables are not those of the prompt."""


class TemplatedTwiceError(DataError):
    """A value that already carries the text of the template it would be put into."""


class TrainingError(LLMChainFedError):
    """Local training could not go on."""


class NonFiniteLossError(TrainingError):
    """The training loss, or a trained weight, became NaN or infinite."""


class FederationError(LLMChainFedError):
    """A round, or an update within it, that cannot be completed."""


class ContractError(FederationError):
    """A participant whose base weights, adapter, prompt or package version differ from the federation's."""


class DeadlineError(FederationError):
    """No answer before the deadline; what comes later is dropped."""


class DuplicateParticipantError(FederationError):
    """Two participants of one name, or one participant that trained twice in a round."""


class NothingTrainedError(FederationError):
    """`step()` was called before any participant had trained in this round."""


class ParticipantError(FederationError):
    """A participant in another process failed, or its answer makes no sense; the message carries its own error."""


class PolicyError(FederationError):
    """A site's policy does not allow what was asked of it."""


class QuorumError(FederationError):
    """Fewer participants joined, or fewer updates were accepted, than the quorum asks for."""


class TransportError(FederationError):
    """The way to a participant, or to the engine that carries it, is broken."""


class UpdateRefusedError(FederationError):
    """An update that is malformed, foreign, stale, oversized or not finite."""


def install(extra: str, *packages: str) -> str:
    """How to get what is missing: this project's extra where its checkout is, else the packages themselves.

    The project is on no index, so its own name there would find nothing.

    >>> install("rich", "rich")
    "pip install rich; in a checkout of this project: pip install -e '.[rich]'"
    """
    return f"pip install {' '.join(packages)}; in a checkout of this project: pip install -e '.[{extra}]'"
