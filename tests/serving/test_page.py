"""The page at `/`: served from the package, and, where there is a browser, used in it."""

import re
from pathlib import Path

import pytest

from spikingbrain_serving.http.settings import HttpSettings

from . import browser
from .conftest import save_model
from .harness import serving


@pytest.fixture(scope="module")
def served(tmp_path_factory, tokenizer):
    directory: Path = tmp_path_factory.mktemp("page")
    model = save_model(directory / "tiny", tokenizer, spiking={"neuron": "adaptive"}, num_hidden_layers=3)
    with serving(model, HttpSettings(session_dir=directory / "sessions"), max_model_len=5000) as server:
        yield server


def test_the_page_and_all_it_names_come_from_the_package(served):
    status, page = served.ask("/")
    assert status == 200
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert [served.ask(f"/{name}")[0] for name in named if not name.startswith("data:")] == [200, 200]
    _, script = served.ask("/page/page.js")
    assert not re.search(r"https?://", page + script + served.ask("/page/page.css")[1])
    assert served.ask("/page/../server.py")[0] == 404


def test_every_element_that_the_script_asks_for_is_in_the_page(served):
    script = served.ask("/page/page.js")[1]
    ids = set(re.findall(r'id="([^"]+)"', served.ask("/")[1]))
    assert set(re.findall(r'element\("([^"]+)"\)', script)) <= ids


def say(page: browser.Page, text: str) -> None:
    page.run(f'element("input").value = {text!r}; element("limit").value = 40; element("form").requestSubmit()')
    page.wait("conversation.running === null && element('input').value === ''")


@pytest.mark.skipif(browser.find() is None, reason="no browser on this machine")
def test_a_conversation_is_held_saved_and_restored_in_a_browser(served, tmp_path):
    with browser.browsing(browser.find(), tmp_path) as page:
        page.send("Page.navigate", url=f"{served.url}/")
        page.wait("document.readyState === 'complete' && element('model').textContent === 'tiny'")
        say(page, "does it rain?")
        say(page, "and the state?")
        assert page.run("element('error').textContent") == ""
        assert page.run("document.querySelectorAll('.message').length") == 4
        assert page.run("conversation.columns.length") > 30
        assert len(set(page.run("conversation.points.map(([, bytes]) => bytes)"))) == 1
        assert int(page.run("element('cached').textContent")) > 10
        pixels = "element('raster').getContext('2d').getImageData(200, 0, 200, 300).data"
        page.wait(f"{pixels}.some((value, index) => index % 4 === 0 && value < 99)")
        page.run("element('name').value = 'first'; element('save').requestSubmit()")
        page.wait("element('sessions').textContent.includes('first')")
        page.screenshot(tmp_path / "page.png")
        tokens = page.run("conversation.tokens")
        page.run("element('new').click()")
        assert page.run("document.querySelectorAll('.message').length") == 0
        press = "[...document.querySelectorAll('#sessions li')].find((li) => li.textContent.includes('first'))"
        page.run(f"[...{press}.querySelectorAll('button')][0].click()")
        page.wait("document.querySelectorAll('.message').length === 4")
        assert page.run("conversation.tokens") in (tokens, tokens - 1)
        say(page, "go on")
        assert int(page.run("element('cached').textContent")) >= tokens - 1
        page.run(f"[...{press}.querySelectorAll('button')][1].click()")
        page.wait("element('sessions').textContent.includes('sess_')")
        page.run(f"[...{press}.querySelectorAll('button')][2].click()")
        page.wait("!element('sessions').textContent.includes('first')")
        assert page.errors == []
        assert all(address.startswith((served.url, "data:")) for address in page.addresses)
