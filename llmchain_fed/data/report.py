"""DataReport: what became of a participant's examples, as counts; another count is one field here, and where it counts.

Knows nothing of texts or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

_KEPT = {
    "duplicate": "the same as one before",
    "length_out_of_range": "longer or shorter than the settings let an answer be",
    "raw": "raw text",
    "prompt_as_input": "with a prompt that goes through the template",
    "control_text": "with a control token spelled as text",
    "without_end": "without an end token, which the model lacks, so that no answer learns where to end",
}
_LEFT_OUT = {
    "empty": "empty",
    "failed": "for which the chain fails",
    "too_long": "too long",
    "contains_end": "with an end token within the answer",
    "contains_stop": "with a stop string within the answer",
    "stripped": "with white space around the answer",
    "not_decodable": "with characters that the vocabulary lacks",
    "forbidden": "with an answer that the settings forbid",
}


@dataclass(slots=True)
class DataReport:
    """What became of a participant's examples. Only `used` ones are trained on; nothing is cut."""

    used: int = 0
    empty: int = 0
    """left out: a missing or blank completion, prompt or variable"""
    failed: int = 0
    """left out: the composed chain raises for it: a retriever, a function, a parser"""
    too_long: int = 0
    """left out: longer than `max_length` or the model's context"""
    contains_end: int = 0
    """left out: an end token within the completion, where an answer would end"""
    contains_stop: int = 0
    """left out: a stop string within the completion, before which an answer would end"""
    stripped: int = 0
    """left out: white space around the completion, which the parser or the tokenizer takes away"""
    not_decodable: int = 0
    """left out: its tokens, decoded, are another text: characters that the vocabulary lacks, lower-cased letters …"""
    forbidden: int = 0
    """left out: the generation settings keep an answer from it: a suppressed token, an n-gram that may not repeat …"""
    duplicate: int = 0
    """kept: the same prompt and completion occurred before"""
    length_out_of_range: int = 0
    """kept: more tokens than `max_new_tokens` or fewer than `min_new_tokens`: an answer would be cut short, or go on"""
    raw: int = 0
    """kept: `RawText`, used as it is"""
    prompt_as_input: int = 0
    """kept: rows of `prompt` and `completion` whose prompt is the input and goes through the template"""
    control_text: int = 0
    """kept: examples that spell a control token where they may not write one; it is encoded as text"""
    without_end: int = 0
    """kept: all of them, where the model and its tokenizer have no end token: no answer learns where to end"""
    completion_tokens: int = 0
    """tokens that carry loss, end tokens included"""
    ignored_columns: int = 0
    """columns of the source that nobody reads"""
    ignored_names: tuple[str, ...] = field(default=(), init=False, compare=False, repr=False)
    """what they are called; that is said where the source is, and leaves no participant"""

    def counts(self) -> dict[str, int]:
        """The counts alone, which may leave a participant, as the arguments of a report like this one."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    @property
    def unsayable(self) -> int:
        """Examples left out because no answer could ever be their completion."""
        return self.contains_end + self.contains_stop + self.stripped + self.not_decodable + self.forbidden

    @property
    def left_out(self) -> int:
        """Examples left out for a reason that `TrainingConfig(tolerance=…)` bounds."""
        return self.unsayable + self.failed

    @property
    def worth_saying(self) -> bool:
        """Whether examples were left out, or taken otherwise than their form suggests."""
        taken = self.raw + self.prompt_as_input + self.control_text + self.length_out_of_range + self.without_end
        return bool(self.empty or self.too_long or self.left_out or taken or self.ignored_columns)

    def in_words(self) -> str:
        """The same for an operator.

        >>> DataReport(used=12, length_out_of_range=10, too_long=1).in_words()
        '12 examples (10 of them longer or shorter than the settings let an answer be), 1 more left out (too long)'
        """
        used = f"{self.used:,} example{'' if self.used == 1 else 's'}"
        kept, others = self.kept_in_words, (self.left_out_in_words, self.ignored_in_words)
        return used + (f" ({kept})" if kept else "") + "".join(f", {other}" for other in others if other)

    @property
    def kept_in_words(self) -> str:
        """What is odd about examples that are used, with their counts."""
        counts = {text: getattr(self, name) for name, text in _KEPT.items()}
        return ", ".join(f"{count:,} of them {text}" for text, count in counts.items() if count)

    @property
    def left_out_in_words(self) -> str:
        """How many examples are not used, and why."""
        left = {text: count for name, text in _LEFT_OUT.items() if (count := getattr(self, name))}
        why = next(iter(left)) if len(left) == 1 else ", ".join(f"{count:,} {text}" for text, count in left.items())
        return f"{sum(left.values()):,} more left out ({why})" if left else ""

    def notes(self, what: str) -> list[str]:
        """What a record should say of it: how many examples of a kind are not used, and why; nothing where all are.

        >>> DataReport(used=1, empty=1, too_long=1).notes("held-out examples")
        ['2 of 3 held-out examples are left out: 1 empty, 1 too long']
        """
        left = {text: count for name, text in _LEFT_OUT.items() if (count := getattr(self, name))}
        gone, why = sum(left.values()), ", ".join(f"{count:,} {text}" for text, count in left.items())
        return [f"{gone:,} of {self.used + gone:,} {what} are left out: {why}"] if left else []

    @property
    def ignored_in_words(self) -> str:
        """How many columns of a table are not read, and their names."""
        names = ", ".join(self.ignored_names[:20]) + (", …" if len(self.ignored_names) > 20 else "")
        plural = "" if self.ignored_columns == 1 else "s"
        said = f"{self.ignored_columns:,} column{plural} not read" + (f" ({names})" if names else "")
        return said if self.ignored_columns else ""

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name):,}"
            for f in fields(self)
            if f.repr and (getattr(self, f.name) or f.name == "used")
        ]
        return f"DataReport({', '.join(shown)})"
