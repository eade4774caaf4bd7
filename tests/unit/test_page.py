"""The page for people, as a browser gets it: whole, without a token, and unable to reach anything else."""

import asyncio
import re

import httpx
import pytest
from fastapi import FastAPI

from dpo_ray.config import ServingConfig
from dpo_ray.storage import Storage
from serve.guard import Abilities, guarded
from serve.page_routes import PAGE_FILES, mount_page
from serve.tokens import Tokens


@pytest.fixture
def page(storage: Storage) -> dict[str, httpx.Response]:
    """What somebody without a token gets at each path, where there are tokens."""
    tokens, app = Tokens(storage), FastAPI()
    tokens.add("ada", role="admin")
    mount_page(app)
    door = guarded(app, ServingConfig(), tokens, Abilities(64, writes_json=True))

    async def get_all() -> dict[str, httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://policy") as client:
            return {path: await client.get(path) for path in PAGE_FILES}

    return asyncio.run(get_all())


def test_anyone_gets_each_file_as_what_it_is(page: dict[str, httpx.Response]) -> None:
    assert {path: file.headers["content-type"] for path, file in page.items()} == {
        "/": "text/html; charset=utf-8",
        "/page.css": "text/css; charset=utf-8",
        "/page.js": "text/javascript; charset=utf-8",
        "/server.js": "text/javascript; charset=utf-8",
        "/icon.svg": "image/svg+xml",
    }
    assert {file.status_code for file in page.values()} == {200}


def test_a_browser_runs_nothing_but_these_files_and_puts_them_in_no_frame(
    page: dict[str, httpx.Response],
) -> None:
    for file in page.values():
        policy = file.headers["content-security-policy"].split("; ")
        assert {"default-src 'self'", "frame-ancestors 'none'", "form-action 'none'"} <= set(policy)
        assert not re.search("unsafe|https?:", " ".join(policy))
        assert file.headers["x-content-type-options"] == "nosniff"
    html = page["/"].text
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)


def test_files_name_each_other_below_any_prefix(page: dict[str, httpx.Response]) -> None:
    named = re.findall(r'(?:href|src)="([^"]+)"', page["/"].text)
    named += re.findall(r'from "\./([^"]+)"', page["/page.js"].text)
    assert {f"/{name}" for name in named} == set(PAGE_FILES) - {"/"}


def test_text_of_others_never_becomes_markup(page: dict[str, httpx.Response]) -> None:
    for path in ("/page.js", "/server.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page[path].text)


def test_the_script_finds_each_element_that_it_names(page: dict[str, httpx.Response]) -> None:
    named = set(re.findall(r'(?:\$|onSubmit)\("([\w-]+)"', page["/page.js"].text))
    assert len(named) > 15
    assert named <= set(re.findall(r'\sid="([\w-]+)"', page["/"].text))
