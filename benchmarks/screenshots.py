"""Takes the pictures of a report that the README shows: `python benchmarks/screenshots.py docs/example-report.html`.

Needs Chromium on the path. The pictures go beside the page, 1400 and 800 pixels wide.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

SCOPE = "layer*/attention/rope_paged_decode"


def main() -> None:
    """Light at 1400 pixels, dark at 800."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    report = parser.parse_args().report.resolve()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for width, scheme in ((1400, "light"), (800, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.goto(report.as_uri())
            page.evaluate(f"markScope({SCOPE!r})")
            picture = report.with_name(f"{report.stem}-{width}.png")
            page.screenshot(path=picture, full_page=True)
            print(picture)
        browser.close()


if __name__ == "__main__":
    main()
