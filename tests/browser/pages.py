"""Aim's interface as `make ui` starts it, and its pages in a headless Chromium without network."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.tracking.views import HOST

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
WAIT_S = 120


@dataclass(frozen=True)
class Pages:
    """Aim's pages in a browser."""

    driver: Any
    address: str
    screenshots: Path

    def open(self, path: str) -> None:
        """Go to a page."""
        self.driver.get(self.address + path)

    def texts(self, selector: str) -> list[str]:
        """The texts of the elements that a CSS selector finds, without the empty ones."""
        script = "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent.trim())"
        return list(filter(None, self.driver.execute_script(script, selector)))

    def attributes(self, selector: str, expression: str) -> list[Any]:
        """The value of a JavaScript expression for each `element` that a CSS selector finds."""
        script = f"return [...document.querySelectorAll(arguments[0])].map(element => {expression})"
        return self.driver.execute_script(script, selector)

    def wait(self, found: Callable[[], bool], what: str) -> None:
        """Wait until `found`; fail with what the page shows instead."""
        end = time.monotonic() + WAIT_S
        while not found():
            assert time.monotonic() < end, f"no {what}:\n{self.driver.find_element('tag name', 'body').text}"
            time.sleep(0.2)

    def errors(self) -> list[str]:
        """Messages of mistakes, and of pages with nothing to show."""
        boxes = self.texts(".NotificationContainer, .MuiAlert-root, .IllustrationBlock")
        return boxes + re.findall("Something went wrong", self.driver.page_source)

    def save(self, name: str) -> None:
        """Save a screenshot, after the bar that tells of the query has faded out."""
        self.wait(lambda: self.attributes(".ProgressBar", "1") == [], "end of the query")
        assert self.driver.save_screenshot(str(self.screenshots / f"{name}.png"))

    def wait_until_indexed(self, count: int) -> None:
        """Wait until Aim is up and shows that many runs; then close its advertisement."""
        from selenium.common.exceptions import WebDriverException

        def is_indexed() -> bool:
            try:
                self.open("/runs")
            except WebDriverException:  # not up yet
                return False
            time.sleep(2)
            return len(self.texts(".RunNameColumn__runName")) == count

        self.wait(is_indexed, f"{count} runs")
        self.driver.execute_script("localStorage.setItem('communityPopupSeen', 'true')")


@contextmanager
def interface(root: Path, environment: Mapping[str, str], port: int) -> Iterator[str]:
    """Where the interface of a project answers; it ends with the block."""
    command = [sys.executable, "-m", "dsv3.tracking.views", "--port", str(port)]
    process = subprocess.Popen(
        command,
        cwd=root,
        env=dict(environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield f"http://{HOST}:{port}"
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def browser(address: str, screenshots: Path) -> Iterator[Pages]:
    """A headless Chromium without network, to look at what answers at `address`."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    closed = f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {HOST}"
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1440,900",
        "--hide-scrollbars",
        closed,
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Pages(driver, address, screenshots)
    finally:
        driver.quit()
