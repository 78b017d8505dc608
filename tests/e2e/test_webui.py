"""`lvllm webui` in a browser, with the demo model and with a server that misbehaves as told."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from lvllm.serving.background import free_port
from tests.chat.fake_server import WAIT, Answer, FakeServer, serving
from tests.e2e.server import Server
from tests.e2e.warm_process import ROOT

KEY = "sk-only-for-the-server"
LVLLM = str(Path(sys.executable).with_name("lvllm"))
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium: apt install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """Headless Chromium, which notes all requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for one in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(one)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield found
    found.quit()


class Page:
    """The page as a visitor sees it."""

    def __init__(self, browser: webdriver.Chrome, url: str, width: int = 1200) -> None:
        self.browser = browser
        self.url = url
        browser.set_window_size(width, 860)
        browser.get(url)
        self.until(lambda: self.one("#question textarea").is_enabled())

    def until(self, condition: Callable[[], Any]) -> Any:
        """The first true value of `condition`. What is not there yet counts as untrue."""
        waiting = WebDriverWait(self.browser, WAIT, 0.05, ignored_exceptions=[Exception])
        try:
            return waiting.until(lambda _: condition())
        except TimeoutException:
            raise AssertionError(f"the page shows {self.one('body').text!r}") from None

    def one(self, selector: str) -> WebElement:
        return self.all(selector)[-1]

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def send(self, text: str) -> None:
        def typed() -> bool:
            # While an answer ends, the button to stop is there, and the field is made anew.
            if not self.one("#question button.submit-button").is_displayed():
                return False
            field = self.one("#question textarea")
            field.clear()
            field.send_keys(text)
            return field.get_attribute("value") == text

        self.until(typed)
        self.one("#question textarea").send_keys(Keys.ENTER)

    def set_temperature(self, value: str) -> None:
        self.click("#settings button")
        selector = '#settings input[placeholder="the server\'s"]'
        field = self.until(lambda: (one := self.all(selector)[0]).is_displayed() and one)
        field.send_keys(value)
        self.click("#settings button")

    def answer(self, wanted: str) -> str:
        """The last answer, once it contains `wanted`."""
        found: str = self.until(lambda: wanted in (text := self.last()) and text)
        return found

    def answers(self) -> list[str]:
        return [row.text for row in self.all("#chat .bot-row")]

    def last(self) -> str:
        return self.answers()[-1]

    def click(self, selector: str, which: int = -1) -> None:
        def clicked() -> bool:
            self.all(selector)[which].click()
            return True

        self.until(clicked)


@contextmanager
def webui(server: str) -> Iterator[str]:
    """`lvllm webui` for the server at this URL. Yields the page's URL."""
    port = free_port()
    command = [LVLLM, "webui", "--url", server, "--port", str(port)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OPENAI_API_KEY": KEY},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        said = process.stderr.readline()
        assert f"http://127.0.0.1:{port}/" in said, said + process.stderr.read()
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def fake() -> Iterator[tuple[FakeServer, str]]:
    """A server that answers as a test tells it, and the URL of a page for it."""
    with serving() as server, webui(server.url) as url:
        yield server, url


def test_a_conversation_until_the_server_is_killed(
    browser: webdriver.Chrome, tmp_path: Path
) -> None:
    server = Server(tmp_path / "log", "--config", "config.yaml")
    with ExitStack() as stack:
        with server:
            url = stack.enter_context(webui(server.ready().url))
            page = Page(browser, url)
            page.set_temperature("0")
            page.send("What is 47 + 38?")
            said = page.answer("path: ")
            assert "85" in said
            # There is no rate if all tokens come at once, as those of so fast a model may.
            assert re.search(r"\d+ tokens · the first after \d+ ms( · [\d.]+ tokens/s)? · ", said)
            assert said.endswith("path: CPU")
            page.send("What is 20 + 22?")
            page.until(lambda: len(page.answers()) == 2)
            assert "42" in page.answer("path: ")
            before = page.last()  # It ends with times, which the next answer hardly has again.
            page.click("#chat button[aria-label=Retry]")
            again = page.until(
                lambda: (said := page.answers()[1]) != before and "path: " in said and said
            )
            assert "42" in again
            assert len(page.answers()) == 2
        page.send("Are you there?")
        page.answer(f"no server answers at {server.url}")


def test_stop_keeps_what_came(browser: webdriver.Chrome, fake: tuple[FakeServer, str]) -> None:
    server, url = fake
    server.answers = [Answer(["again "], ends="endless"), Answer(["fine"])]
    server.client_left.clear()
    page = Page(browser, url)
    page.send("go on")
    page.answer("again again")
    page.click("#question button.stop-button")
    assert server.client_left.wait(WAIT)
    page.send("and now?")
    page.answer("fine")
    (_, asked), (_, stopped), (_, now) = server.messages()
    assert (asked, now) == ("go on", "and now?")
    assert stopped.startswith("again again ")


def test_a_server_that_says_nothing_can_be_stopped(
    browser: webdriver.Chrome, fake: tuple[FakeServer, str]
) -> None:
    server, url = fake
    server.answers = [Answer(ends="silent"), Answer(["fine"])]
    server.client_left.clear()
    page = Page(browser, url)
    page.send("never mind")
    page.until(lambda: not server.answers[1:])
    page.click("#question button.stop-button")
    assert server.client_left.wait(WAIT)
    page.send("hello")
    page.answer("fine")
    assert server.messages() == [("user", "hello")]


def test_edit_asks_anew_from_there(browser: webdriver.Chrome, fake: tuple[FakeServer, str]) -> None:
    server, url = fake
    server.answers = [Answer(["one"]), Answer(["two"]), Answer(["three"])]
    page = Page(browser, url)
    page.send("first")
    page.answer("tokens")
    page.send("second")
    page.until(lambda: len(page.all("#chat .bot-row")) == 2 and "tokens" in page.last())
    page.until(lambda: page.one("#question textarea").is_enabled())
    page.click("#chat button[aria-label=Edit]", 0)
    area = page.until(lambda: page.one("#chat textarea"))
    area.send_keys(Keys.CONTROL, "a")
    area.send_keys("changed")
    page.click("#chat button[aria-label=Submit]")
    page.until(lambda: "three" in page.last())
    assert server.messages() == [("user", "changed")]
    assert len(page.all("#chat .bot-row")) == 1


def test_failures_are_one_line_and_the_page_goes_on(
    browser: webdriver.Chrome, fake: tuple[FakeServer, str]
) -> None:
    server, url = fake
    full = "the context has 128 tokens"
    server.answers = [
        Answer(["half"], ends="dead"),
        Answer(status=400, body={"error": {"message": full}}),
        Answer(["whole"]),
    ]
    page = Page(browser, url)
    page.send("first")
    said = page.answer("broke off before the end of its answer")
    assert said.startswith("half\n")
    page.send("second")
    assert "\n" not in page.answer(f"answered with 400: {full}")
    page.send("third")
    page.answer("whole")
    assert server.messages() == [("user", "third")]


def test_a_long_answer_in_a_narrow_window(
    browser: webdriver.Chrome, fake: tuple[FakeServer, str]
) -> None:
    server, url = fake
    words = [f"word{number} " for number in range(4000)]
    server.answers = [Answer([*words, "x" * 500], tokens=4001)]
    page = Page(browser, url, width=360)
    page.send("a long one")
    page.answer("4001 tokens")
    assert "word3999" in page.last()
    overflow = "return document.documentElement.scrollWidth - window.innerWidth"
    assert browser.execute_script(overflow) <= 0  # type: ignore[no-untyped-call]
    assert page.one("#question button.submit-button").is_displayed()


def test_thinking_and_calls_and_pictures(
    browser: webdriver.Chrome, fake: tuple[FakeServer, str], tmp_path: Path
) -> None:
    server, url = fake
    call = {"index": 0, "function": {"name": "weather", "arguments": '{"place": "Bonn"}'}}
    server.answers = [
        Answer([{"reasoning": "a thought"}, "an answer", {"tool_calls": [call]}])  # type: ignore[dict-item]
    ]
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    page = Page(browser, url)
    page.one("#question input[type=file]").send_keys(str(tmp_path / "picture.png"))
    page.until(lambda: page.one("#question img").is_displayed())
    page.send("what is it?")
    said = page.answer("tokens")
    assert "Thinking" in said
    assert "a thought" not in said  # It is folded.
    assert "an answer" in said
    assert "Calls\nweather" in said
    assert '{"place": "Bonn"}' in said
    picture, text = server.requests[-1]["messages"][-1]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")
    assert text == {"type": "text", "text": "what is it?"}


def test_the_page_asks_nobody_else_and_does_not_know_the_key(
    browser: webdriver.Chrome, fake: tuple[FakeServer, str]
) -> None:
    server, url = fake
    server.answers = [Answer(["fine"])]
    browser.get_log("performance")  # type: ignore[no-untyped-call]
    page = Page(browser, url)
    page.send("hello")
    page.answer("fine")
    events = [
        json.loads(entry["message"])["message"]
        for entry in browser.get_log("performance")  # type: ignore[no-untyped-call]
    ]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert len(asked) > 10
    assert not [one for one in asked if not one.startswith((url, "data:", "blob:"))]
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    for path in ("", "config", "gradio_api/info"):
        with urlopen(url + path, timeout=WAIT) as answer:
            assert KEY not in answer.read().decode()
    assert KEY not in browser.page_source


def test_it_listens_on_this_machine_only(fake: tuple[FakeServer, str]) -> None:
    port = f":{int(fake[1].rstrip('/').rpartition(':')[2]):04X}"
    lines = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    listening = [fields for line in lines.splitlines() if (fields := line.split())[3] == "0A"]
    assert [one[1] for one in listening if one[1].endswith(port)] == [f"0100007F{port}"]
