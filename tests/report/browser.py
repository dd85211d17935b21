"""A report opened in a real headless browser, at the widths of a telephone and a desk, on light paper and dark.

    python tests/report/browser.py REPORT.html [--screenshots FOLDER]

Needs playwright, and a browser: its own (`playwright install chromium`), or the system's.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTHS, SCHEMES = (390, 1440), ("light", "dark")
SYSTEM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# Everything that sticks out of the window, but for what scrolls by itself, and pictures that did not load.
LAYOUT = """() => {
  const wide = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > wide)
    found.push(`the page is ${document.documentElement.scrollWidth} pixels wide`);
  for (const element of document.querySelectorAll('main *')) {
    const { right, width } = element.getBoundingClientRect();
    if (width && right > wide + 1 && !element.closest('.scroll'))
      found.push(`${element.tagName} ${element.className} reaches to ${Math.round(right)}`);
  }
  for (const image of document.images)
    if (!image.complete || !image.naturalWidth) found.push(`a picture did not load: ${image.alt}`);
  return found;
}"""

# Of every piece of text, its contrast (WCAG 2.2, 1.4.3) with the first opaque background behind it.
CONTRAST = """() => {
  const numbers = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
  const light = (colour) => numbers(colour).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor, alpha = numbers(colour)[3];
      if (alpha === undefined || alpha === 1) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = new Set(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const element = node.parentElement;
    if (!node.textContent.trim() || element.closest('.skip')) continue;
    const [a, b] = [getComputedStyle(element).color, paper(element)].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.add(`${element.tagName} ${element.className} has a contrast of ${ratio.toFixed(2)}`);
  }
  return [...found];
}"""


class NoBrowserError(RuntimeError):
    """Nothing to open a page with."""


@contextmanager
def browser() -> Iterator[Any]:
    """A running browser.

    Raises:
        NoBrowserError: playwright or a browser is missing.
    """
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise NoBrowserError("playwright is not installed: run `pip install playwright`") from None
    with sync_playwright() as playwright:
        system = next(filter(None, map(shutil.which, SYSTEM)), None)
        try:
            running = playwright.chromium.launch(executable_path=system)
        except Error as error:
            reason = str(error).splitlines()[0]
            raise NoBrowserError(
                f"no browser could be started ({reason}): run `playwright install chromium`, or install chromium"
            ) from None
        try:
            yield running
        finally:
            running.close()


def problems(running: Any, report: Path, screenshots: Path | None = None) -> list[str]:
    """What is wrong with a page, in sentences; empty for a good one."""
    found: list[str] = []
    address = report.absolute().as_uri()
    for width in WIDTHS:
        for scheme in SCHEMES:
            page = running.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            seen: list[str] = []
            page.on("console", lambda message, seen=seen: seen.append(f"console {message.type}: {message.text}"))
            page.on("pageerror", lambda error, seen=seen: seen.append(f"error: {error}"))
            page.on("request", lambda request, seen=seen: seen.append(f"request: {request.url[:100]}"))
            page.goto(address, wait_until="load")
            # The page itself has to be asked for, and pictures that it carries are asked for in name only.
            seen = [one for one in seen if one != f"request: {address[:100]}" and not one.startswith("request: data:")]
            seen += page.evaluate(LAYOUT) + page.evaluate(CONTRAST)
            found += [f"{width} pixels, {scheme}: {one}" for one in seen]
            if screenshots is not None:
                screenshots.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=screenshots / f"{report.stem}-{width}-{scheme}.png", full_page=True)
            page.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Open a report in a headless browser and say what is wrong with it.")
    parser.add_argument("report", type=Path)
    parser.add_argument("--screenshots", type=Path)
    arguments = parser.parse_args()
    try:
        with browser() as running:
            found = problems(running, arguments.report, arguments.screenshots)
    except NoBrowserError as missing:
        sys.exit(str(missing))
    print("\n".join(found) or f"{arguments.report}: nothing wrong at {WIDTHS} pixels, light and dark")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
