"""`lvllm webui` in a browser, with the demo model and with a server that misbehaves as told."""

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from lvllm.chat.client import Client
from lvllm.errors import LvllmError
from lvllm.serving.launch import DEMO
from lvllm.serving.progress import Weights
from lvllm.webui import site
from tests.chat.fake_server import WAIT, Answer, FakeServer, serving
from tests.e2e.server import END_SECONDS, START_SECONDS
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
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield found
    found.quit()


class Page:
    """The page as a visitor sees it. Whatever the visitor does, the page may be slow to follow."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser = browser
        browser.set_window_size(1200, 860)
        browser.get(url)

    def until(self, condition: Callable[[], Any], seconds: float = WAIT) -> Any:
        """The first true value of `condition`. What is not there yet counts as untrue."""
        waiting = WebDriverWait(self.browser, seconds, 0.05, ignored_exceptions=[Exception])
        try:
            return waiting.until(lambda _: condition())
        except TimeoutException:
            raise AssertionError(f"the page shows {self.one('body').text!r}") from None

    def one(self, selector: str) -> WebElement:
        return self.all(selector)[-1]

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def listens(self) -> bool:
        """Whether a question can be asked: while an answer comes, there is a button to stop it."""
        submit, field = self.one("#question button.submit-button"), self.one("#question textarea")
        return submit.is_displayed() and field.is_enabled()

    def send(self, text: str) -> None:
        """Ask a question, once the answer before it has ended."""
        self.until(self.listens)
        asked = self.asked(text)

        def typed() -> bool:
            field = self.one("#question textarea")
            field.clear()
            field.send_keys(text)
            return field.get_attribute("value") == text

        def shown() -> bool:
            return self.asked(text) > asked

        def sent() -> bool:
            # gradio makes the field anew when an answer ends, and a text may be lost with it.
            self.until(typed)
            self.one("#question textarea").send_keys(Keys.ENTER)
            self.until(shown, WAIT / 4)
            return True

        self.until(lambda: shown() or sent())

    def asked(self, text: str) -> int:
        """How many questions are this text, which is one line."""
        return sum(row.text.splitlines().count(text) for row in self.all("#chat .user-row"))

    def set(self, values: dict[str, str]) -> None:
        """Open the settings, fill in fields by their labels, and close the settings."""
        self.click("#settings button")
        for label, value in values.items():
            field = self.until(partial(self.setting, label))
            field.clear()
            field.send_keys(value)
        self.click("#settings button")

    def setting(self, label: str) -> WebElement | None:
        """The field with that label, once it can be seen."""
        within = f"//*[@id='settings']//label[.//span[normalize-space()='{label}']]"
        path = f"{within}//*[self::input or self::textarea]"
        field = self.browser.find_element(By.XPATH, path)
        return field if field.is_displayed() else None

    def answer(self, *wanted: str) -> str:
        """The last answer, once it has ended and contains all that is `wanted`."""

        def found() -> str:
            text = self.last()
            return text if self.listens() and all(part in text for part in wanted) else ""

        said: str = self.until(found)
        return said

    def coming(self, wanted: str) -> None:
        """Wait until the last answer contains `wanted`, and perhaps goes on."""
        self.until(lambda: wanted in self.last())

    def answers(self) -> list[str]:
        return [row.text for row in self.all("#chat .bot-row")]

    def last(self) -> str:
        return self.answers()[-1]

    def click(self, selector: str, which: int = -1) -> None:
        def clicked() -> bool:
            self.all(selector)[which].click()
            return True

        self.until(clicked)


@pytest.fixture(scope="module")
def others() -> Iterator[socket.socket]:
    """Where all requests to other machines would come."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        yield proxy


@contextmanager
def webui(*arguments: str, **environment: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`lvllm webui ARGUMENTS` on a free port. Yields the page's URL, once it is known."""
    process = subprocess.Popen(
        [LVLLM, "webui", "--port", "0", *arguments],
        cwd=ROOT,
        env=os.environ | {"OPENAI_API_KEY": KEY} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = ""
    try:
        while (address := re.search(r"http://127\.0\.0\.1:\d+/ ", said)) is None:
            line = process.stderr.readline()
            assert line, said
            said += line
        yield address[0].strip(), process
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's folder for temporary files."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def fake(others: socket.socket, temporary: Path) -> Iterator[tuple[FakeServer, str]]:
    """A server that answers as a test tells it, and the URL of a page for it."""
    settings = {
        "HTTPS_PROXY": f"http://127.0.0.1:{others.getsockname()[1]}",
        "TMPDIR": str(temporary),
    }
    with serving() as server, webui("--url", server.url, **settings) as (url, _):
        yield server, url
    assert list(temporary.iterdir()) == []


def test_the_demo_model_from_loading_until_its_server_is_killed(
    browser: webdriver.Chrome,
) -> None:
    with webui() as (url, process):
        page = Page(browser, url)
        page.until(lambda: page.one("#text").text == "Starting the server")
        page.until(page.listens, START_SECONDS)
        page.set({"Temperature": "0"})
        page.send("What is 47 + 38?")
        said = page.answer("path: CPU")
        assert "85" in said
        # On a busy machine all tokens may come in one piece, and there is no rate.
        rate = r"(\d+\.\d tokens/s|all after \d+ ms)"
        assert re.search(rf"\d+ tokens · the first after \d+ ms · {rate} · path: CPU$", said)
        page.send("What is 20 + 22?")
        page.until(lambda: len(page.answers()) == 2)
        assert "42" in page.answer("path: CPU")
        (guardian,) = psutil.Process(process.pid).children()
        os.killpg(guardian.pid, signal.SIGKILL)
        page.send("Are you there?")
        page.answer("no server answers at http://127.0.0.1:", "lvllm serve")


def test_a_start_that_fails_says_the_same_line_in_the_page(browser: webdriver.Chrome) -> None:
    # vLLM refuses this after some seconds, so that the page is open by then.
    with webui(str(DEMO), "--max-model-len", "1000000") as (url, process):
        page = Page(browser, url)
        shown = page.until(
            lambda: page.all("body.failed") and page.one("#text").text, START_SECONDS
        )
        _, errors = process.communicate(timeout=END_SECONDS)
        assert process.returncode == 1
    assert f"lvllm: {shown}" in errors


def test_the_bytes_of_the_weights_until_the_chat(
    browser: webdriver.Chrome, fake: tuple[FakeServer, str]
) -> None:
    from lvllm.webui.answering import Answering
    from lvllm.webui.page import application, page

    server, _ = fake
    with site.serving("127.0.0.1", 0) as shown:
        seen = Page(browser, shown.url)
        seen.until(lambda: seen.one("#text").text == "Starting the server")
        assert seen.one("#bar").get_dom_attribute("value") is None
        shown.loading.show(Weights(45, "1.15 GiB", "2.55 GiB"))
        seen.until(lambda: seen.one("#text").text == "Loading the weights: 1.15 GiB of 2.55 GiB")
        assert seen.one("#bar").get_dom_attribute("value") == "45"
        shown.loading.show(Weights(100, "2.55 GiB", "2.55 GiB"))
        seen.until(lambda: "All weights are loaded (2.55 GiB)" in seen.one("#text").text)
        shown.open(application(page(Answering(Client(server.url)), ["a/model"], "")))
        server.answers = [Answer(["fine"])]
        seen.send("hello")
        seen.answer("fine")


@pytest.mark.parametrize("line", ["LK_THREADS=0 is <b>not</b> allowed", "of\ntwo lines"])
def test_a_failure_is_text_in_the_page(browser: webdriver.Chrome, line: str) -> None:
    with pytest.raises(LvllmError), site.serving("127.0.0.1", 0) as shown:  # noqa: PT012
        page = Page(browser, shown.url)
        page.until(lambda: page.one("#seconds").text)
        raise LvllmError(line)
    page.until(lambda: page.all("body.failed"))
    assert page.one("#text").text == line
    assert not page.one("#bar").is_displayed()


def test_a_program_that_ends_while_it_loads(browser: webdriver.Chrome) -> None:
    with site.serving("127.0.0.1", 0) as shown:
        page = Page(browser, shown.url)
        page.until(lambda: page.one("#seconds").text)
    page.until(lambda: page.one("#text").text == "lvllm webui has ended")


def test_stop_keeps_what_came(browser: webdriver.Chrome, fake: tuple[FakeServer, str]) -> None:
    server, url = fake
    server.answers = [Answer(["again "], ends="endless"), Answer(["fine"])]
    server.client_left.clear()
    page = Page(browser, url)
    page.send("go on")
    page.coming("again again")
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


@pytest.fixture
def asked_twice(browser: webdriver.Chrome, fake: tuple[FakeServer, str]) -> Page:
    """A page with two questions and their answers; the server has a third one."""
    server, url = fake
    server.answers = [Answer(["one"]), Answer(["two"]), Answer(["three"])]
    page = Page(browser, url)
    page.send("first")
    page.answer("one", "tokens")
    page.send("second")
    page.answer("two", "tokens")
    return page


def test_retry_asks_the_same_again(asked_twice: Page, fake: tuple[FakeServer, str]) -> None:
    page, (server, _) = asked_twice, fake
    page.click("#chat button[aria-label=Retry]")
    page.answer("three", "tokens")
    assert server.messages() == [("user", "first"), ("assistant", "one"), ("user", "second")]
    assert len(page.answers()) == 2


def test_edit_asks_anew_from_there(asked_twice: Page, fake: tuple[FakeServer, str]) -> None:
    page, (server, _) = asked_twice, fake

    def changed() -> bool:
        if not page.all("#chat textarea"):
            page.all("#chat button[aria-label=Edit]")[0].click()
        area = page.one("#chat textarea")
        area.clear()
        area.send_keys("changed")
        return area.get_attribute("value") == "changed"

    page.until(changed)
    page.click("#chat button[aria-label=Submit]")
    page.answer("three", "tokens")
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
    browser: webdriver.Chrome, fake: tuple[FakeServer, str], request: pytest.FixtureRequest
) -> None:
    server, url = fake
    words = [f"word{number} " for number in range(4000)]
    server.answers = [Answer([*words, "x" * 500], tokens=4001)]
    page = Page(browser, url)
    phone = {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": False}
    # A window of Chromium's own has at least 500 pixels.
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    request.addfinalizer(
        lambda: browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    )
    page.send("a long one")
    page.answer("4001 tokens")
    assert "word3999" in page.last()
    widths = "return [window.innerWidth, document.documentElement.scrollWidth]"
    assert browser.execute_script(widths) == [360, 360]  # type: ignore[no-untyped-call]
    assert page.one("#question button.submit-button").is_displayed()


def test_what_is_set_is_sent(browser: webdriver.Chrome, fake: tuple[FakeServer, str]) -> None:
    server, url = fake
    server.answers = [Answer(["yes"])]
    tool = {"type": "function", "function": {"name": "weather"}}
    page = Page(browser, url)
    page.until(page.listens)
    page.set(
        {
            "System prompt": "Be brief.",
            "Tools": json.dumps([tool]),
            "Temperature": "0.25",
            "Top-p": "0.75",
            "Top-k": "7",
            "Most tokens of an answer": "33",
            "Seed": "5",
        }
    )
    page.send("do you see it?")
    page.answer("yes")
    sent = server.requests[-1]
    assert [one["content"] for one in sent["messages"]] == ["Be brief.", "do you see it?"]
    wanted = {"temperature": 0.25, "top_p": 0.75, "top_k": 7, "max_tokens": 33, "seed": 5}
    assert {name: sent.get(name) for name in wanted} == wanted
    assert sent["tools"] == [tool]


def test_thinking_and_calls_and_pictures(
    browser: webdriver.Chrome, fake: tuple[FakeServer, str], temporary: Path, tmp_path: Path
) -> None:
    server, url = fake
    call = {"index": 0, "function": {"name": "weather", "arguments": '{"place": "Bonn"}'}}
    server.answers = [
        Answer([{"reasoning": "a thought"}, "an answer", {"tool_calls": [call]}])  # type: ignore[dict-item]
    ]
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    page = Page(browser, url)
    page.until(page.listens)
    page.one("#question input[type=file]").send_keys(str(tmp_path / "picture.png"))
    page.until(lambda: page.one("#question img").is_displayed())
    page.send("what is it?")
    page.answer("Thinking", "an answer", "Calls\nweather", '{"place": "Bonn"}', "tokens")
    page.until(lambda: "a thought" not in page.last())  # It is folded.
    picture, text = server.requests[-1]["messages"][-1]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")
    assert text == {"type": "text", "text": "what is it?"}
    (pictures,) = temporary.glob("lvllm-webui-*")
    assert pictures.stat().st_mode & 0o077 == 0
    assert list(pictures.rglob("picture.png"))


def test_the_page_asks_nobody_else_and_does_not_know_the_key(
    browser: webdriver.Chrome, fake: tuple[FakeServer, str], others: socket.socket
) -> None:
    server, url = fake
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        picture = f"http://127.0.0.1:{stranger.getsockname()[1]}/what-was-said.png"
        answer = f"fine ![]({picture}) <img src='{picture}'>\n\n```python\nprint()\n```\n$$x$$\n"
        server.answers = [Answer([answer])]
        browser.get_log("performance")  # type: ignore[no-untyped-call]
        browser.get_log("browser")  # type: ignore[no-untyped-call]
        page = Page(browser, url)
        page.send("hello")
        page.answer("fine", "tokens")
        page.until(lambda: page.all("#chat .katex") and page.all("#chat code .token"))
        assert not select.select([stranger, others], [], [], 0)[0]
    events = [
        json.loads(entry["message"])["message"]
        for entry in browser.get_log("performance")  # type: ignore[no-untyped-call]
    ]
    of_pages = [event["params"] for event in events if event["method"].startswith("Network.")]
    asked = {
        params["requestId"]: params["request"]["url"] for params in of_pages if "request" in params
    }
    refused = [asked[one["requestId"]] for one in of_pages if one.get("blockedReason") == "csp"]
    assert len(asked) > 10
    assert set(refused) == {picture}
    strangers = [one for one in asked.values() if not one.startswith((url, "data:", "blob:"))]
    assert set(strangers) == {picture}
    # The policy takes nothing away from the page itself.
    complaints = [
        entry["message"]
        for entry in browser.get_log("browser")  # type: ignore[no-untyped-call]
        if "Content Security Policy" in entry["message"] and picture not in entry["message"]
    ]
    assert complaints == []
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    for path in ("", "config", "gradio_api/info"):
        with urlopen(url + path, timeout=WAIT) as said:
            assert KEY not in said.read().decode()
    assert KEY not in browser.page_source


def test_no_other_page_can_show_this_one(
    browser: webdriver.Chrome, fake: tuple[FakeServer, str], tmp_path: Path
) -> None:
    around = tmp_path / "around.html"
    around.write_text(f"<iframe src='{fake[1]}' onload='document.title = `loaded`'></iframe>")
    browser.get(around.as_uri())
    waiting = WebDriverWait(browser, WAIT, 0.05)
    waiting.until(lambda _: browser.title == "loaded")
    browser.switch_to.frame(0)
    assert not browser.find_elements(By.CSS_SELECTOR, "gradio-app")
    browser.switch_to.default_content()


def test_it_listens_on_this_machine_only(fake: tuple[FakeServer, str]) -> None:
    port = f":{int(fake[1].rstrip('/').rpartition(':')[2]):04X}"
    lines = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    listening = [fields for line in lines.splitlines() if (fields := line.split())[3] == "0A"]
    assert [one[1] for one in listening if one[1].endswith(port)] == [f"0100007F{port}"]
