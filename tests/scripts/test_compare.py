"""The comparison of runs: the groups, the table, the page's data, and the page in a real browser."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import UserError
from scripts.compare import MOST_POINTS, main, page_data, read_groups, tables

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"optimizer": "gluon", "lr": 0.01, "steps": 100, "seed": 0}


def write_run(folder, end=2.0, passes=1, updates=100, every=10, **config):
    """A run whose losses fall from end + 4 to end; 64 tokens an update, and half a second."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for update in range(0, updates + 1):
        loss = end + 4 * math.exp(-update / 10)
        record = {"update": update, "tokens": 64 * update, "passes": passes * update, "seconds": 0.5 * update}
        lines.append({**record, "train_loss": loss - 0.1})
        if update % every == 0:
            lines.append({**record, "val_loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "run_name": folder.name, **config}))
    return folder


def groups_of(*folders):
    return read_groups(folders)


@pytest.fixture
def four(tmp_path):
    """Gluon with three seeds, and MVR-2 with two gradients an update."""
    runs = [write_run(tmp_path / f"gluon_seed{seed}", end=2 + seed / 10, seed=seed) for seed in range(3)]
    return [*runs, write_run(tmp_path / "mvr2", end=1.5, passes=2, optimizer="mvr2", q=0.5)]


def test_seeds_are_one_group_with_a_band(four):
    gluon, mvr2 = page_data(groups_of(*four))["groups"]
    assert (gluon["name"], gluon["seeds"], mvr2["name"], mvr2["seeds"]) == ("gluon", [0, 1, 2], "mvr2", [])
    drawn = gluon["val_loss"]
    assert drawn["update"] == list(range(0, 101, 10))
    assert [drawn[key][-1] for key in ("low", "mean", "high")] == pytest.approx([2.0, 2.1, 2.2], abs=1e-3)
    assert mvr2["val_loss"]["passes"][-1] == 200 and mvr2["val_loss"]["tokens"][-1] == 6400
    assert len(mvr2["train_loss"]["mean"]) == 101 and mvr2["train_loss"]["low"] == mvr2["train_loss"]["mean"]
    assert gluon["options"] == {"optimizer": "gluon", "q": "-"} and mvr2["options"] == {"optimizer": "mvr2", "q": "0.5"}


def test_table(four):
    lines = tables(groups_of(*four)).splitlines()
    head, gluon, mvr2 = (" ".join(line.split()) for line in lines[:3])
    assert head == "run seeds final best updates gradients tokens seconds tokens/s"
    assert gluon == "gluon 3 2.1002 ± 0.1000 2.1002 ± 0.1000 at 100 100 100 6,400 50.0 128"
    assert mvr2 == "mvr2 1 1.5002 1.5002 at 100 100 200 6,400 50.0 128"
    assert [line.split() for line in lines[4:]] == [["run", "optimizer", "q"], ["gluon", "gluon", "-"], ["mvr2", "mvr2", "0.5"]]


def test_seeds_that_are_not_equally_far(tmp_path):
    runs = [write_run(tmp_path / f"run_seed{seed}", seed=seed, updates=updates) for seed, updates in ((0, 100), (1, 30))]
    [group] = page_data(groups_of(*runs))["groups"]
    loss = f"{2 + 4 * math.exp(-3):.4f} ± 0.0000"
    assert group["val_loss"]["update"] == [0, 10, 20, 30]
    assert (group["figures"]["final"], group["figures"]["best"]) == (loss, f"{loss} at 30")
    assert group["figures"]["updates"] == "30"


def test_a_repeated_seed_is_not_a_second_seed(tmp_path):
    base = write_run(tmp_path / "a" / "run")
    again = write_run(tmp_path / "b" / "run")  # the same seed
    other = write_run(tmp_path / "c" / "run", seed=1, lr=0.02)
    assert [group.name for group in groups_of(base, again, other)] == ["a/run", "b/run", "c/run"]
    for folder in (base, again):
        (folder / "config.json").unlink()
    assert len(groups_of(base, again)) == 2


def test_seeds_of_a_study(tmp_path):
    folders = [write_run(tmp_path / arm / f"seed{s}", seed=s, optimizer=arm) for arm in ("gluon", "mvr1") for s in range(2)]
    assert [group.name for group in groups_of(*folders)] == ["gluon", "mvr1"]
    assert [group.name for group in groups_of(*folders[:2])] == ["gluon"]


def test_a_loss_that_is_not_finite(tmp_path):
    folder = write_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"update": 110, "tokens": 1, "passes": 1, "seconds": 1.0, "val_loss": NaN}\n')
    group = page_data(groups_of(folder))["groups"][0]
    assert group["val_loss"]["mean"][-1] is None and group["val_loss"]["mean"][-2] is not None
    assert group["figures"]["final"] == "not finite" and group["figures"]["best"].endswith("at 100")
    json.dumps(group, allow_nan=False)


def test_long_curves_are_averaged(tmp_path):
    drawn = page_data(groups_of(write_run(tmp_path / "run", updates=2 * MOST_POINTS)))["groups"][0]["train_loss"]
    assert MOST_POINTS / 2 < len(drawn["mean"]) <= MOST_POINTS and len({len(values) for values in drawn.values()}) == 1
    assert drawn["update"][0] == 1  # the mean of 0, 1 and 2


def test_wrong_arguments(tmp_path, four):
    good, empty = str(four[0]), tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    for words, said in [
        ([], "RUN"),
        ([str(tmp_path / "none")], "cannot read"),
        ([str(empty)], "has no finite val_loss yet"),
        ([good, "--out", "x.txt"], "ends in .html"),
        ([good, "--out", str(tmp_path / "file" / "x.html")], "cannot write"),
        ([good, "--watch", "0"], "--watch 0 must be"),
        ([str(tmp_path / "none"), "--watch"], "cannot read"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            main(words)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.slow
def test_watch_goes_on_until_the_runs_end(tmp_path):
    going, waiting = write_run(tmp_path / "going", updates=50), tmp_path / "waiting"
    waiting.mkdir()
    out = tmp_path / "page.html"
    words = [sys.executable, "-m", "scripts.compare", str(going), str(waiting), "--watch", "1", "--out", str(out)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not out.exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        assert '"reload": 1.0' in out.read_text()
        write_run(waiting)
        write_run(going)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and '"reload": 0' in out.read_text()
    assert "1 of 2 running, 1 before their first validation" in said and "0 of 2 running, 0 before" in said


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium is installed (Debian: apt-get install chromium)")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, four, tmp_path):
    out = tmp_path / "page.html"
    main([*map(str, four), "--out", str(out), "--title", "</script><b>Ours</b>"])
    page = browser.new_page()
    page.wrong, page.asked = [], []
    page.on("console", lambda message: page.wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(out.as_uri())
    yield page
    assert page.wrong == []
    assert {url for url in page.asked if not url.startswith("data:")} == {out.as_uri()}  # nothing from outside
    page.close()


def shown(page):
    """The title of the axis, and by name the last point of each line (bands have no name)."""
    return page.evaluate(
        """() => [curves.layout.xaxis.title.text, Object.fromEntries(curves.data.filter(t => t.name)
                 .map(t => [t.name, [t.x.at(-1), t.y.at(-1)]]))]"""
    )


@pytest.mark.slow
def test_the_page_in_a_browser(page):
    assert page.title() == page.inner_text("h1") == "</script><b>Ours</b>"
    line = page.locator("#curves .scatterlayer path.js-line").last.bounding_box()
    assert line["width"] > 400 and line["height"] > 100  # a drawing of some size
    axis, ends = shown(page)
    assert axis == "updates" and ends["gluon"] == [100, pytest.approx(2.1002, abs=1e-4)] and ends["mvr2"][0] == 100
    assert page.evaluate("curves.data.length") == 4  # two lines and the two edges of a band

    for label, end in [("gradient evaluations", 200), ("tokens", 6400), ("seconds", 50), ("updates", 100)]:
        page.click(f"#axis label:has-text('{label}')")
        axis, ends = shown(page)
        assert axis == label and ends["mvr2"][0] == end

    page.click("text=training")
    assert shown(page)[1]["mvr2"][1] == pytest.approx(1.4002, abs=1e-4)
    page.check("text=log loss")
    page.check("text=log horizontal")
    assert page.evaluate("[curves.layout.yaxis.type, curves.layout.xaxis.type]") == ["log", "log"]
    page.locator("[name=smooth]").fill("0.9")
    smoothed = 1.4 + sum(0.1 * 0.9 ** (100 - k) * 4 * math.exp(-k / 10) for k in range(101)) / (1 - 0.9**101)
    assert shown(page)[1]["mvr2"][1] == pytest.approx(smoothed, abs=1e-6)

    page.click("tbody button:has-text('mvr2')")
    assert list(shown(page)[1]) == ["gluon"]
    page.reload()  # keeps what was chosen
    assert list(shown(page)[1]) == ["gluon"] and page.is_checked("text=log loss")
    assert page.get_attribute("tbody button:has-text('mvr2')", "aria-pressed") == "false"
    page.click("tbody button:has-text('mvr2')")
    assert list(shown(page)[1]) == ["gluon", "mvr2"]


@pytest.mark.slow
def test_hover_zoom_and_a_phone(page):
    box = page.locator("#curves .nsewdrag").bounding_box()
    x, y = page.evaluate("[curves._fullLayout.xaxis.d2p(50), curves._fullLayout.yaxis.d2p(curves.data.at(-1).y[5])]")
    page.mouse.move(box["x"] + x, box["y"] + y)
    page.wait_for_selector(".hoverlayer .hovertext")
    assert "1.5270 at 50 updates" in page.text_content(".hoverlayer")
    page.mouse.move(box["x"] + 100, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 300, box["y"] + 150, steps=5)
    page.mouse.up()
    zoomed = page.evaluate("curves.layout.xaxis.range")
    assert 0 < zoomed[0] < zoomed[1] < 100
    page.reload()
    assert page.evaluate("curves.layout.xaxis.range") == pytest.approx(zoomed)

    page.set_viewport_size({"width": 360, "height": 700})
    page.reload()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360  # the table alone may scroll sideways
    assert page.locator("#curves").bounding_box()["width"] > 300
