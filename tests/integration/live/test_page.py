"""A person compares and votes on the page, in a browser."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from tests.integration.chromium import CHROMIUM, FLAGS
from tests.integration.conftest import wait_for
from tests.integration.live.conftest import Service

PROMPT = "the film was"
PATIENT_MS = 20_000
"""A burst of other work must not fail a test."""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(live: Service, browser: Browser) -> Iterator[Page]:
    """With lea's token, in a browser that has never been here; what goes wrong in it fails the test."""
    context = browser.new_context(viewport={"width": 360, "height": 740})
    context.set_default_timeout(PATIENT_MS)
    page, troubles = context.new_page(), []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append(dialog.message))
    page.goto(live.base_url)
    expect(page.locator("#token-note")).to_have_text("This server asks for a token.")
    page.fill("#token", live.labelers[0])
    page.press("#token", "Enter")
    expect(number(page, "waiting")).to_have_text(str(waiting(live)))
    yield page
    context.close()
    assert troubles == []


def test_a_person_types_a_prompt_votes_by_click_and_by_key_and_undoes(live: Service, page: Page) -> None:
    before = waiting(live)
    ask(page, PROMPT)
    for side in ("first", "second"):
        expect(page.locator(f"#{side} .text")).not_to_be_empty()
        expect(page.locator(f"#{side} .version")).to_have_text("version hidden")
    page.locator("#reason").press_sequentially("b t 1 is what I typed")  # Keys do nothing while typing.
    assert vote(page, lambda: page.click("#votes [value=second]")) == ("second", "b t 1 is what I typed")
    expect(page.locator("#second")).to_contain_text("✓ better")
    expect(page.locator("#first .version")).to_have_text("version 0")
    expect(number(page, "waiting")).to_have_text(str(before + 1))
    page.keyboard.press("u")
    expect(page.locator("#second .version")).to_have_text("version hidden")
    expect(number(page, "waiting")).to_have_text(str(before))
    assert waiting(live) == before
    assert vote(page, lambda: page.keyboard.press("ArrowLeft")) == ("first", "b t 1 is what I typed")
    expect(page.locator("#first")).to_contain_text("✓ better")
    assert waiting(live) == before + 1
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(
    ("keys", "choice"), [("1", "first"), ("2", "second"), ("0tT", "tie"), ("b", "both_bad")]
)
def test_keys_mean_what_the_page_says(page: Page, keys: str, choice: str) -> None:
    for key in keys:
        ask(page, PROMPT)
        assert vote(page, lambda key=key: page.keyboard.press(key)) == (choice, "")
        page.keyboard.press("u")
        expect(page.locator("#status")).to_contain_text("undone")


def test_a_drawn_prompt_shows_its_turns_and_no_markup(page: Page) -> None:
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    turns = [{"role": "system", "content": hostile}, {"role": "user", "content": PROMPT}]
    page.route("**/v1/comparisons/prompt", lambda route: route.fulfill(json={"messages": turns}))
    pieces = [{"side": side, "text": hostile} for side in ("first", "second")]
    shown = {"text": hostile, "finish_reason": "stop"}
    whole = {"id": "cmp-1", "object": "comparison", "first": shown, "second": shown, "identical": True}
    events = "".join(f"data: {json.dumps(event)}\n\n" for event in (*pieces, whole))
    page.route("**/v1/comparisons", lambda route: route.fulfill(body=events))
    page.keyboard.press("Escape")
    page.keyboard.press("n")
    expect(page.locator("#turns li")).to_have_text([f"System{hostile}", f"User{PROMPT}"])
    expect(page.locator("#first .text")).to_have_text(hostile)
    expect(page.locator("#votes button[value=tie]")).to_be_enabled()
    assert page.locator("#comparison img, #comparison script").count() == 0
    page.keyboard.press("1")  # Made up: the server has no such comparison.
    expect(page.locator("#status")).to_contain_text("There is no comparison")


def test_a_hostile_prompt_is_answered_as_text(page: Page) -> None:
    ask(page, "<img src=x onerror=alert(1)> the film")
    assert page.locator("#comparison img").count() == 0


def test_a_vote_whose_answer_is_lost_is_sent_again_and_counts_once(live: Service, page: Page) -> None:
    before, keys = waiting(live), []
    page.route("**/v1/preferences", losing_answers(keys, times=2))
    ask(page, PROMPT)
    page.keyboard.press("2")
    expect(page.locator("#status")).to_contain_text("Your vote is sent again.")
    expect(page.locator("#next")).to_be_visible()
    assert len(keys) == 3 and len(set(keys)) == 1
    assert waiting(live) == before + 1


def test_a_person_is_told_what_is_wrong(page: Page) -> None:
    status = page.locator("#status")
    for code, said in {403: "You may not", 409: "contradicts", 410: "too old", 429: "Too many"}.items():
        page.route("**/v1/comparisons", refusing(code))
        page.fill("#prompt", PROMPT)
        page.press("#prompt", "Control+Enter")
        expect(status).to_contain_text(said)
        page.unroute("**/v1/comparisons")
    page.route("**/v1/comparisons", lambda route: route.abort())
    page.press("#prompt", "Control+Enter")
    expect(status).to_contain_text("does not answer")


def test_a_token_lives_in_its_tab_alone(live: Service, page: Page) -> None:
    assert page.evaluate("[localStorage.length, document.cookie, location.search]") == [0, "", ""]
    page.reload()
    expect(number(page, "waiting")).to_have_text(str(waiting(live)))
    another = page.context.new_page()
    another.goto(live.base_url)
    expect(another.locator("#token-form")).to_be_visible()
    page.click("#forget")
    expect(page.locator("#token-form")).to_be_visible()
    page.fill("#token", live.user)
    page.press("#token", "Enter")
    expect(page.locator("#token-note")).to_contain_text("needs the role labeler")


def ask(page: Page, prompt: str) -> None:
    """Return when both answers can be voted on."""
    page.fill("#prompt", prompt)
    page.press("#prompt", "Control+Enter")
    wait_for(lambda: page.locator("#votes button:enabled").count() == 4, timeout_s=30, what="two answers")


def number(page: Page, name: str) -> Locator:
    return page.locator(f"#mine [data-of={name}]")


def waiting(live: Service) -> int:
    headers = {"authorization": f"Bearer {live.labelers[0]}"}
    answer = httpx.get(f"{live.base_url}/v1/preferences/mine", headers=headers, timeout=60)
    return answer.raise_for_status().json()["waiting"]


def vote(page: Page, how: Callable[[], None]) -> tuple[str, str]:
    """Choice and reason that the server keeps when the person does this."""
    with page.expect_response("**/v1/preferences") as answer:
        how()
    assert answer.value.status == 201, answer.value.text()
    expect(page.locator("#next")).to_be_visible()
    sent: Any = answer.value.request.post_data_json
    return sent["choice"], sent["reason"]


def losing_answers(keys: list[str], *, times: int) -> Callable[[Route], None]:
    """Requests arrive, and the first answers get lost."""

    def handle(route: Route) -> None:
        keys.append(route.request.headers["idempotency-key"])
        response = route.fetch()
        if len(keys) <= times:
            route.abort()
        else:
            route.fulfill(response=response)

    return handle


def refusing(code: int) -> Callable[[Route], None]:
    return lambda route: route.fulfill(status=code, json={"error": {"message": "so it is", "code": code}})
