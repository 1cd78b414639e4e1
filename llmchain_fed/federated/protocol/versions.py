"""Versions: names of global states, so that a message can bring what changed since one that is there already.

Knows texts and names of tensors. Knows nothing of who has which state.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Self

from llmchain_fed.errors import FederationError
from llmchain_fed.untrusted import shown

STALE = b'{"stale": true}'
"""the answer of a participant that does not have what a difference is against: the hub then sends all"""
START = "start:"
"""begins the name of the state that a participant has before it was sent any: the hash of its weights follows"""
CODED = "coded/"
"""begins the names of a codec's parts in a message: the number of the version they made follows"""
_VERSION = re.compile(r"([^/]{1,64})/([0-9]{1,12})/([^/]{0,64})")


class Version(NamedTuple):
    """Names a global state among those of one hub and one rank."""

    server: str
    """one run of one hub: after a restart the same number may mean another state"""
    number: int
    rank: str
    """of the participant's factors, empty for the common one"""

    def __str__(self) -> str:
        return f"{self.server}/{self.number}/{self.rank}"

    @classmethod
    def read(cls, text: str) -> Self:
        """From its text.

        Raises:
            FederationError: It is none.
        """
        found = _VERSION.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            msg = f"{shown(text)} names no version of the global state."
            raise FederationError(msg)
        return cls(found[1], int(found[2]), found[3])
