"""The report in a real headless browser; skipped where there is none. `make demo-report-check` wants one."""

import pytest

from modicum.report.html import Report
from tests.report.browser import NoBrowserError, browser, problems
from tests.report.pages import full_report


@pytest.fixture(scope="module")
def running():
    try:
        with browser() as opened:
            yield opened
    except NoBrowserError as missing:
        pytest.skip(str(missing))


def test_every_kind_of_block(running, tmp_path):
    path = tmp_path / "report.html"
    full_report().write(path)
    assert problems(running, path) == []


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ("<img src='https://modicum.invalid/a.png' alt='a'>", "a.png"),
        ("<script>console.error('oh')</script>", "Content Security Policy"),
        ("<p style='width: 2000px'>wide</p>", "P  reaches to"),
        ("<p style='color: #eee; background: #fff'>pale</p>", "P  has a contrast of 1.1"),
        ("<img src='data:image/png;base64,AAAA' alt='torn'>", "a picture did not load: torn"),
    ],
)
def test_what_is_wrong_is_found(running, tmp_path, broken, found):
    path = tmp_path / "report.html"
    report = Report("A title", "")
    report.section("A section").text("text")
    path.write_text(report.render().replace("</section>", f"{broken}</section>"))
    assert any(found in problem for problem in problems(running, path))
