"""What the examples print."""

from examples.common.translation import print_results


def test_line_breaks_of_an_answer_stay_under_its_own_beginning(capsys):
    sample = {"participant": "a", "prompt": "Page locked", "before": "one\n\ntwo", "after": "x", "reference": "y"}
    print_results([], [sample])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-6:] == [
        "  a: Page locked",
        "    before    one",
        " " * 14,
        " " * 14 + "two",
        "    after     x",
        "    reference y",
    ]
