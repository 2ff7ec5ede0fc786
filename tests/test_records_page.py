"""Tests of records/index.html in Debian's Chromium, headless, opened from disk."""

import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

import leaderboard
from fabricate import ROOT, SOURCE, Site, log_text
from record import Repository

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
SECOND = SOURCE.replace("nn.Linear(8, 8)", "nn.Linear(8, 16)").replace("import torch\n", "import torch\n# a\n# b\n")
LIGHT, DARK = [11, 95, 191], [108, 176, 255]  # the first curve's colour


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    """Three records of one track, one of another, and a log that is ranked nowhere."""
    site = Site(tmp_path_factory.mktemp("site"))
    site.add(site.logs(), name="First", readme="The <b>first</b> one.")
    site.add(site.logs(day=2, source=SECOND, step_seconds=0.4, loss=1.5, args={"layers": "s s"}), name="Second")
    site.add(site.logs(day=3, source=SECOND.replace("recompile_limit = 64", "recompile_limit = 99"),
                       script="train_hybrid.py"), name="Hybrid")
    big = {"val_tokens": 4096, "val_row_tokens": 1024, "target": 3.28}
    site.add(site.logs(day=4, dataset="big", args=big), name="Big")
    (site.records / "evidence").mkdir()
    (site.records / "evidence" / "2026-11-03T00-00-00Z_train_gpt_00000000.txt").write_text(log_text(dataset="wiki"))
    leaderboard.write(leaderboard.generate(site.repository))
    return site


@pytest.fixture
def open_page(browser):
    """Opens an index.html; at the end there must have been no message, no error and no other request."""
    contexts, messages, requests = [], [], []

    def open_page(path, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert messages == [] and all(url.split("#")[0].endswith("/index.html") for url in requests)
    assert len(requests) == len(contexts)


@pytest.fixture
def page(open_page, site):
    return open_page(site.records / "index.html")


def pixels(page, holder: str, colour: list[int]) -> int:
    """How many pixels of a chart have about this colour."""
    page.wait_for_timeout(100)  # charts draw in the next frame
    return page.evaluate("""([holder, colour]) => {
        const canvas = document.querySelector(`#${holder} canvas`);
        const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
        copy.drawImage(canvas, 0, 0);
        const {data} = copy.getImageData(0, 0, canvas.width, canvas.height);
        let count = 0;
        for (let i = 0; i < data.length; i += 4)
            count += data[i + 3] > 200 && colour.every((value, k) => Math.abs(data[i + k] - value) < 12);
        return count;
    }""", [holder, colour])


def fits(page) -> bool:
    """Nothing makes the page wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_leaderboard(page):
    tables = page.locator("#tables table")
    assert tables.count() == 2
    rows = tables.nth(1).locator("tbody tr").all_inner_texts()
    assert [row.split("\t")[0] for row in rows] == ["1", "2", "3"]
    assert "Second" in rows[0] and "train_hybrid.py" in rows[2] and "2026-11-01" in rows[1]


@pytest.mark.parametrize("holder", ["by-seconds", "by-tokens"])
def test_curves_are_drawn_for_chosen_records(page, holder):
    page.select_option("#track", "sample")
    boxes = page.locator("#chosen input")
    assert boxes.count() == 3 and pixels(page, holder, LIGHT) > 50
    boxes.nth(0).focus()
    page.keyboard.press("Space")
    assert pixels(page, holder, LIGHT) == 0
    for i in (1, 2):
        boxes.nth(i).uncheck()
    assert "nothing chosen" in page.locator(f"#{holder} .uplot").get_attribute("aria-label")
    boxes.nth(0).check()
    assert pixels(page, holder, LIGHT) > 50
    page.locator(f"#{holder} .u-over").hover()
    expect(page.locator(f"#{holder} .readout")).to_contain_text("Second: train ")


def test_unranked_logs_have_curves_too(page):
    page.select_option("#track", "evidence")
    expect(page.locator("#chosen label")).to_have_count(1)
    assert pixels(page, "by-tokens", LIGHT) > 50


def test_difference_of_two_records(page):
    page.select_option("#old", "sample/2026-11-01_First")
    page.select_option("#new", "sample/2026-11-02_Second")
    summary = page.locator("#diff-summary")
    expect(summary).to_have_text("Changed: docstring (+2 −0), Architecture (+1 −1). "
                                 'Arguments: --layers from "s l" to "s s".')
    rows = page.locator("#diff tr:not(.fold)")
    changed = rows.filter(has=page.locator("ins"))
    assert changed.locator("del").all_inner_texts() == ["8"] and changed.locator("ins").all_inner_texts() == ["16"]
    assert changed.locator("td").count() == 4 and "nn.Linear(8, 8)" in changed.locator("td").nth(1).inner_text()
    folded, shown = page.locator("#diff .fold button"), rows.count()
    assert shown < len(SECOND.splitlines())
    assert folded.last.inner_text().endswith("unchanged lines: Training [same]")
    while folded.count():
        folded.first.focus()
        page.keyboard.press("Enter")
    assert rows.count() == len(SECOND.splitlines())
    assert rows.filter(has_text="</script> in a script must not end the page's").count() == 1

    page.click("#swap")
    expect(summary).to_contain_text("Changed: docstring (+0 −2)")
    page.select_option("#old", "sample/2026-11-02_Second")
    page.select_option("#new", "sample/2026-11-02_Second")
    expect(summary).to_contain_text("The same run twice")
    page.select_option("#old", "sample/2026-11-01_First")
    page.select_option("#new", "big/2026-11-04_Big")
    expect(summary).to_have_text("The two scripts are equal.")


def test_history_and_the_public_reference(page, open_page):
    expect(page.locator("#histories h3")).to_have_text(["Big to 3.28", "Sample to 1.8"])
    rows = page.locator("#histories table").last.locator("tbody tr").all_inner_texts()
    assert [row.split("\t")[-1] for row in rows] == ["First", "Second"]  # the hybrid was never the fastest
    page = open_page(ROOT / "records" / "index.html")
    expect(page.locator("#histories")).to_contain_text("public speedrun, 8 x H100, published by others")
    published = page.locator("#histories details")
    published.locator("summary").click()
    expect(published).to_contain_text("github.com/KellerJordan/modded-nanogpt")
    assert published.locator("tbody tr").count() == 91


def test_evidence_opens_from_the_leaderboard(page):
    page.locator("#tables a", has_text="Hybrid").click()
    evidence = page.locator("details[open]")
    expect(evidence).to_have_count(1)
    expect(evidence).to_contain_text("Changes sections marked [same]: Setup [same].")
    expect(evidence).to_contain_text("First entry of train_hybrid.py on this hardware.")
    assert evidence.locator("tbody tr").count() == 3
    evidence.locator("button", has_text="Show the difference from Second").click()
    assert page.input_value("#old") == "sample/2026-11-02_Second"
    assert page.input_value("#new") == "sample/2026-11-03_Hybrid"
    expect(page.locator("#diff-summary")).to_contain_text("Changed: Setup [same] (+1 −1)")


def test_texts_are_no_markup(page, site):
    first = page.locator("details", has_text="First, 2026-11-01")
    assert "The <b>first</b> one." in first.text_content()
    links = first.locator("a").evaluate_all("all => all.map(a => decodeURI(new URL(a.href).pathname))")
    assert len(links) == 4 and all((site.records / link).is_file() for link in links)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(open_page, site, scheme):
    page = open_page(site.records / "index.html", 390, scheme)
    page.select_option("#track", "sample")
    assert fits(page) and pixels(page, "by-seconds", DARK if scheme == "dark" else LIGHT) > 50
    assert page.evaluate("document.querySelector('#by-seconds canvas').getBoundingClientRect().right < innerWidth")
    page.select_option("#old", "sample/2026-11-01_First")
    page.select_option("#new", "sample/2026-11-02_Second")
    row = page.locator("#diff tr", has=page.locator("ins"))
    assert row.locator("td").count() == 2  # one column: old above new
    for details in page.locator("details").all():
        details.evaluate("element => element.open = true")
    assert fits(page)
    page.set_viewport_size({"width": 1280, "height": 900})
    expect(row.locator("td")).to_have_count(4)
    page.set_viewport_size({"width": 390, "height": 900})
    expect(row.locator("td")).to_have_count(2)
    page.wait_for_timeout(100)
    assert fits(page)


def test_dark_mode_follows_the_system(page):
    page.select_option("#track", "sample")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(252, 252, 251)" and pixels(page, "by-seconds", DARK) == 0
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) == "rgb(20, 23, 26)"
    assert pixels(page, "by-seconds", DARK) > 50 and pixels(page, "by-seconds", LIGHT) == 0
    assert page.locator("#histories .uplot").count() == 1  # redrawn, not doubled


def test_an_empty_leaderboard(open_page, tmp_path):
    site = Site(tmp_path)
    leaderboard.write(leaderboard.generate(site.repository))
    page = open_page(site.records / "index.html")
    assert page.locator("#tables").inner_text().count("No record yet.") == 2 and fits(page)


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_of_what_has_landed(open_page, width):
    page = open_page(ROOT / "records" / "index.html", width)
    repository = Repository()
    assert page.locator("#records details").count() == len(repository.landed) + len(repository.evidence)
    assert fits(page) and page.locator("#by-seconds canvas").count() == 1
