"""The picture of a report: small, the same for the same numbers, with the texts as text."""

from examples.common.report import write_picture

ROUNDS = [
    {"round": i, "participants": {"a": {"held_out_before": 5.0 - i, "held_out_after": 4.0 - i}, "b": {}}}
    for i in (1, 2)
]
GIVEN = {
    "title": "two & one",
    "summary_rows": [{"publisher": "a", "chrf_before": 10.5, "chrf_after": 30.25}, {"publisher": "b"}],
    "samples": [
        {"participant": "a", "prompt": "first", "before": "x\n\ny", "after": "<b>", "reference": "word " * 40},
        {"participant": "a", "prompt": "second", "before": "", "after": "", "reference": ""},
    ],
    "history_json": {"rounds": ROUNDS},
}


def test_a_picture_of_a_report(tmp_path):
    write_picture(tmp_path / "new" / "a.svg", **GIVEN)
    write_picture(tmp_path / "b.svg", **GIVEN)
    picture = (tmp_path / "new" / "a.svg").read_text(encoding="utf-8")
    assert picture == (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert len(picture) < 60_000
    for text in ("two &amp; one", "10.5", "30.2", "first", "x y", "&lt;b&gt;", "word word …"):
        assert text in picture, text
    assert "second" not in picture, "one sample a participant"
