"""Whom a federation begins with, and whom it goes on with after its checkpoint."""

from tiny import PAIRS

MORE = [("reload the page", "recharger la page"), ("print", "imprimer"), ("zoom in", "agrandir"), ("help", "aide")]


THEN = {"a": PAIRS[:5], "b": PAIRS[5:9], "c": PAIRS[9:]}


NOW = {
    "gone": {"a": PAIRS[:5], "c": PAIRS[9:]},
    "new": {**THEN, "d": MORE},
    "grown": {**THEN, "c": PAIRS[9:] + MORE},
    "all three": {"d": MORE[2:], "a": PAIRS[:5], "c": PAIRS[9:] + MORE[:2]},
}
