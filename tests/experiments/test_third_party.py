"""The table of other people's optimizers, on classes that need no package."""

import pytest

from experiments import third_party
from tests.helpers.train_runs import write_data

MODULE = "tests.helpers.any_optimizers"


@pytest.mark.slow
def test_a_row_says_what_a_class_does(tmp_path, monkeypatch):
    write_data(tmp_path / "data")
    monkeypatch.setattr(third_party, "_TINY", third_party._TINY | {"text": ""})

    def row(name: str) -> list[str]:
        found = third_party.row(f"{MODULE}:{name}", tmp_path / name, 60)
        return [found["trains"], found["resumes"], found["ranks"], found["note"]]

    assert row("Sam") == ["yes", "yes", "yes", ""]
    assert row("Hidden") == [
        "yes",
        "refused",
        "yes",
        "a run could not resume, because part of its state is not in its state_dict()",
    ]
    assert row("Frozen")[:3] == ["refused", "", ""]
    assert row("RanksDiffer") == ["yes", "yes", "refused", "equal gradients give other weights on each rank"]


def test_the_page_has_its_table():
    page = third_party.PAGE.read_text()
    table = page.partition(third_party.BEGIN)[2].partition(third_party.END)[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 50 and all(line.split(" | ")[2] in ("yes", "no", "refused") for line in rows)
    failed = sum(line.split(" | ")[2] == "no" or line.split(" | ")[3] == "no" for line in rows)
    assert failed <= 0.05 * len(rows)
