"""The catalogues of the installed wheels: what is kept, what is dropped, and that nothing leaks."""

import importlib
import subprocess
import sys
from importlib.metadata import PathDistribution
from itertools import combinations
from pathlib import Path
from types import ModuleType

import polib
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def catalogues():
    return importlib.import_module("examples.common.catalogues")


@pytest.fixture(scope="module")
def french(catalogues: ModuleType):
    return {name: catalogues.read_catalogue(name, "fr") for name in catalogues.PUBLISHERS}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, catalogues: ModuleType):
    """A made-up wheel whose French catalogue contains the given .po text."""

    def install(text: str, *, suffix: str = ".po") -> None:
        info, folder = tmp_path / "made-1.dist-info", tmp_path / "made" / "locale" / "fr" / "LC_MESSAGES"
        info.mkdir()
        folder.mkdir(parents=True)
        header = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\n'
        po = polib.pofile(header + text, wrapwidth=0)
        po.save(str(folder / "made.po")) if suffix == ".po" else po.save_as_mofile(str(folder / "made.mo"))
        (info / "METADATA").write_text("Name: made\nVersion: 1\n")
        (info / "RECORD").write_text(f"made/locale/fr/LC_MESSAGES/made{suffix},,\n")
        monkeypatch.setattr(catalogues, "distribution", lambda _: PathDistribution(info))

    return install


def test_each_publisher_has_about_the_known_number_of_messages(french):
    counts = {name: len(messages) for name, messages in french.items()}
    known = {"django": 345, "wagtail": 980, "plone": 2279, "pretix": 4377, "sphinx": 331}  # November 2026
    assert counts.keys() == known.keys()
    for name, expected in known.items():
        assert 0.75 * expected < counts[name] < 1.5 * expected, counts


def test_the_french_is_french(french):
    pairs = {name: dict(messages) for name, messages in french.items()}
    assert pairs["django"]["Personal info"] == "Informations personnelles"
    assert pairs["wagtail"]["Edit comment"] == "Modifier le commentaire"
    assert pairs["sphinx"]["Python Module Index"] == "Index des modules Python"
    assert pairs["pretix"]["Start date"] == "Date de début"
    # Plone's msgid is only a name here (button_save_as_new_version): the English stands in a comment.
    assert pairs["plone"]["Save as new revision"] == "Sauver en tant que nouvelle version"


def test_no_publisher_keeps_markup_or_ids(french):
    for messages in french.values():
        for text in (text for message in messages for text in message):
            assert 8 <= len(text) <= 120
            assert text == " ".join(text.split())
            assert not set("{}") & set(text)
            assert "://" not in text
            assert "%s" not in text
        assert not [source for source, _ in messages if " " not in source and "_" in source]


def test_a_source_stands_once_in_a_catalogue(catalogues, french):
    for messages in french.values():
        keys = [catalogues.normalise(message.source) for message in messages]
        assert len(keys) == len(set(keys))
        assert all(keys)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("Delete %(name)s now", "Supprimer %(name)s maintenant"),
        ("Delete %s now please", "Supprimer %s maintenant"),
        ("About %.2f seconds", "Environ %.2f secondes"),
        ("Hello {name}, welcome", "Bonjour {name}, bienvenue"),
        ("Hello {{ name }}", "Bonjour {{ name }}"),
        ("Rename ${title}", "Renommer ${title}"),
        ("$d days and $h hours", "$d jours et $h heures"),
        ("A <b>bold</b> claim", "Une affirmation audacieuse"),
        ("A bold claim", "Une affirmation <b>audacieuse</b>"),
        ("See https://example.org", "Voir le site"),
        ("Terms&nbsp;of use", "Conditions d'utilisation"),
        ("Don&#39;t do that", "Ne faites pas cela"),
        ("Short", "Une traduction assez longue"),
        ("Long enough", "Court"),
        ("x" * 121, "Une traduction"),
        ("no_end_date", "La date de fin manque"),
        ("2017-05-31 10:00", "31/05/2017 10:00 h"),
        ("Description", "Description"),
        ("Not translated yet", ""),
    ],
)
def test_what_is_no_plain_translation_is_dropped_with_a_reason(catalogues, source, target):
    assert catalogues.why_dropped(source, target)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("Delete the page", "Supprimer la page"),
        ("Get 20% off and more", "20 % de réduction et plus"),
        ("Terms & conditions", "Conditions générales"),
        ("More than 5 (> 5) seats", "Plus de 5 (> 5) places"),
        ("Costs 5 $ at least", "Coûte au moins 5 $"),
    ],
)
def test_plain_translations_are_kept(catalogues, source, target):
    assert catalogues.why_dropped(source, target) is None


def test_fuzzy_obsolete_plural_and_ambiguous_entries_are_counted(catalogues, wheel):
    wheel("""
#, fuzzy
msgid "A fuzzy entry"
msgstr "Une entrée floue"

msgid "One page deleted"
msgid_plural "Many pages deleted"
msgstr[0] "Une page supprimée"
msgstr[1] "Des pages supprimées"

msgctxt "verb"
msgid "Schedule"
msgstr "Planifier"

msgctxt "noun"
msgid "Schedule"
msgstr "Calendrier"

msgctxt "button"
msgid "Save page…"
msgstr "Enregistrer…"

msgid "Save page"
msgstr "Enregistrer la\u00a0page"

#~ msgid "An obsolete entry"
#~ msgstr "Une entrée obsolète"
""")
    messages, dropped = catalogues.survey("django", "fr")
    assert messages == [("Save page", "Enregistrer la page")]
    assert +dropped == {
        "fuzzy": 1,
        "plural": 1,
        "obsolete": 1,
        "translation depends on its context": 2,
        "repeated source": 1,
    }


def test_the_english_of_a_message_id_is_in_its_default_comment(catalogues, wheel):
    wheel(r"""
#. Shown under the field.
#. Default: "Hit the \"Save\" button "
#. "below the form."
msgid "help_save"
msgstr "Cliquez sur le bouton « Enregistrer » sous le formulaire."

msgid "help_without_default"
msgstr "Une aide sans texte anglais"
""")
    messages, dropped = catalogues.survey("plone", "fr")
    assert [message.source for message in messages] == ['Hit the "Save" button below the form.']
    assert +dropped == {"message id without English text": 1}


def test_a_mo_file_serves_where_no_po_was_shipped(catalogues, wheel):
    wheel('msgid "Delete the page"\nmsgstr "Supprimer la page"\n', suffix=".mo")
    assert catalogues.read_catalogue("django", "fr") == [("Delete the page", "Supprimer la page")]


@pytest.mark.parametrize("seed", [0, 1])
def test_no_source_is_both_trained_on_and_held_out(catalogues, seed):
    splits = catalogues.split_publishers(catalogues.PUBLISHERS, "fr", train=None, test=40, seed=seed)
    keys = {
        (name, side): {catalogues.normalise(source) for source, _ in pairs}
        for name, split in splits.items()
        for side, pairs in [("train", split.train), ("held_out", split.held_out)]
    }
    assert all(len(split.held_out) == 40 for split in splits.values())
    for a, b in combinations(keys, 2):
        assert not keys[a] & keys[b], (a, b)


def test_shared_sources_starve_no_publisher(catalogues, french):
    splits = catalogues.split_publishers(catalogues.PUBLISHERS, "fr", train=None, test=40, seed=0)
    for name, split in splits.items():
        assert len(split.train) + 40 > 0.8 * len(french[name])


def test_a_split_is_the_same_in_any_order_and_process(catalogues):
    def split(names, seed=3):
        return catalogues.split_publishers(names, "fr", train=30, test=10, seed=seed)

    one, other = split(["django", "sphinx", "wagtail"]), split(["wagtail", "django", "sphinx"])
    assert one == other
    assert list(other) == ["wagtail", "django", "sphinx"]
    assert one != split(["django", "sphinx", "wagtail"], seed=4)
    assert [len(s.train) for s in one.values()] == [30, 30, 30]
    code = (
        "import examples.common.catalogues as c; print({n: (s.train, s.held_out) for n, s in "
        "c.split_publishers(['django', 'sphinx', 'wagtail'], 'fr', train=30, test=10, seed=3).items()})"
    )
    env = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12345", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == str({name: (s.train, s.held_out) for name, s in one.items()})


@pytest.mark.parametrize("language", ["de", "es", "nl", "pt_BR", "pt-br"])
def test_other_languages_work(catalogues, language):
    assert len(catalogues.read_catalogue("django", language)) > 200
    assert len(catalogues.read_catalogue("wagtail", language)) > 600


def test_errors_say_what_is_there_and_what_to_do(catalogues, monkeypatch):
    with pytest.raises(catalogues.CatalogueError, match=r"plone has no catalogue in 'xx'. It has: .*de, .*fr"):
        catalogues.read_catalogue("plone", "xx")
    with pytest.raises(catalogues.CatalogueError, match=r"unknown publisher 'debian'.*django, wagtail"):
        catalogues.read_catalogue("debian")
    with pytest.raises(catalogues.CatalogueError, match=r"django has \d+ messages of its own in 'fr'.*fewer"):
        catalogues.split_publishers(["django"], train=100_000, test=10)
    with pytest.raises(catalogues.CatalogueError, match="named twice"):
        catalogues.split_publishers(["django", "django"], train=1, test=1)
    monkeypatch.setitem(catalogues.DISTRIBUTIONS, "django", "surely-not-installed")
    with pytest.raises(catalogues.CatalogueError, match=r"pip install --no-deps django wagtail plone.app.locales"):
        catalogues.read_catalogue("django")


def test_split_alone_never_holds_out_what_another_trains_on(catalogues):
    splits = [catalogues.split_alone(name, train=200, test=16) for name in catalogues.PUBLISHERS]
    keys = [[{catalogues.normalise(source) for source, _ in part} for part in (s.train, s.held_out)] for s in splits]
    trained = set().union(*(train for train, _ in keys))
    held_out = set().union(*(apart for _, apart in keys))
    assert trained & held_out == set()
    assert [(len(s.train), len(s.held_out)) for s in splits] == [(200, 16)] * 5
    with pytest.raises(catalogues.CatalogueError, match="of 9000 to train on"):
        catalogues.split_alone("django", train=9000, test=16)
