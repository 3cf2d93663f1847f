"""The page of `mlmkit serve` and its `/docs`, in a real browser against the real server."""

import re
import shutil
import socket
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from serving import Server, running

from mlmkit.serve.middleware import PROBES
from mlmkit.tokenizer import Tokenizer

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("fastapi", reason="the server's packages are not installed")
expect = sync_api.expect

Open = Callable[..., Any]
Servers = dict[str, Server]
Artifact = Callable[[str], Path]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LEVELS = (1, 2, 3, 4, 6, 8)  # nats
TOKEN = "a-secret"
EXAMPLE = "O rato [MASK] a roupa do rei."
CARD = f"""---
language: pt
widget:
- text: The rat <mask> the king.
- text: {EXAMPLE}
---
# A model
"""
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""


@pytest.fixture(scope="module")
def servers(
    served: Callable[..., Server], artifact: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    """WordPiece, byte-level BPE, and one with a model card, a token, and room for a single request."""
    folder = shutil.copytree(artifact("bert"), tmp_path_factory.mktemp("carded") / "carded")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    with running(folder, "--token", TOKEN, "--max-requests", "1") as guarded:
        yield {"bert": served("bert"), "roberta": served("roberta"), "guarded": guarded}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, servers: Servers) -> Iterator[Open]:
    """Opens a server's page, where nothing may go wrong but the HTTP statuses `expected`, a pattern."""
    opened: list[tuple[Any, list[str], str]] = []

    def open_(name: str = "bert", *, expected: str = "-", **options: Any) -> Any:
        options = {"viewport": {"width": 1200, "height": 800}, "reduced_motion": "reduce"} | options
        page = browser.new_context(**options).new_page()
        page.set_default_timeout(10_000)
        page.add_init_script(WATCH)
        faults: list[str] = []
        page.on("console", lambda message: faults.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        opened.append((page, faults, expected))
        page.goto(servers[name].url)
        if name != "guarded":
            page.wait_for_selector("#insert-mask:enabled")
        return page

    yield open_
    for page, faults, expected in opened:
        assert page.evaluate("violations") == []
        assert [fault for fault in faults if not re.search(f"status of ({expected})", fault)] == []
        page.context.close()


def ask(server: Server, path: str, text: str, **parameters: Any) -> Any:
    """The API's own answer, without the page."""
    return server.ask(path, {"inputs": text, "parameters": parameters}).json


def fill_in(page: Any, text: str) -> None:
    """Type a text, ask, and wait for the answer."""
    page.fill("#fill-text", text)
    page.click("#fill-button")
    expect(page.locator("#fill-status")).to_have_text(re.compile(r" in \d"))


def score(page: Any, text: str) -> None:
    page.click("#tab-score")
    page.fill("#score-text", text)
    page.click("#score-button")
    page.wait_for_selector("#score-results:not([hidden])")


def read_back(tokenizer: Tokenizer, text: str, *, whole: bool = False) -> str:
    """The text as the model reads it, which is how the API writes `sequence`: with special tokens unless `whole`."""
    return tokenizer.decode(tokenizer.encode_control(text).ids, skip_special_tokens=whole)


def percent(probability: float) -> str:
    value = 100 * probability
    return "< 0.01 %" if 0 < value < 0.01 else f"{value:.2f} %" if value < 10 else f"{value:.1f} %"


def bars(page: Any) -> list[list[tuple[str, str, float]]]:
    """For each mask its candidates as they are shown: token, probability, the bar's width in pixels."""
    return page.evaluate("""() => [...document.querySelectorAll(".mask")].map((mask) =>
        [...mask.querySelectorAll(".candidate")].map((row) => [
            row.querySelector(".token-name").textContent, row.querySelector(".probability").textContent,
            row.querySelector(".bar").getBoundingClientRect().width]))""")


def check_bars(shown: list[list[tuple[str, str, float]]], answer: list[list[dict[str, Any]]]) -> None:
    assert [[row[:2] for row in mask] for mask in shown] == [
        [[token["token_str"].replace(" ", "␣"), percent(token["score"])] for token in mask] for mask in answer
    ]
    widths = [row[2] for mask in shown for row in mask]
    scores = [token["score"] for mask in answer for token in mask]
    for width, value in zip(widths, scores, strict=True):
        assert width / max(widths) == pytest.approx(value / max(scores), abs=0.02)


def fill_mask(page: Any, text: str, mask: str, index: int, candidates: list[dict[str, Any]]) -> list[str]:
    """The page's own texts, with each candidate instead of a mask."""
    return page.evaluate(
        """async ([text, mask, index, candidates]) => {
            const { fillMask } = await import("/static/text.js");
            return candidates.map((candidate) => {
                const { start, end, filled } = fillMask(text, mask, index, candidates, candidate);
                return text.slice(0, start) + filled + text.slice(end);
            });
        }""",
        [text, mask, index, candidates],
    )


def styles(page: Any, selector: str) -> list[tuple[str, str, str]]:
    """Text, colour and background of each element."""
    return page.eval_on_selector_all(
        selector,
        "all => all.map((n) => [n.textContent, getComputedStyle(n).color, getComputedStyle(n).backgroundColor])",
    )


def test_a_mask_by_button_and_by_key_is_filled_with_a_click(
    open_page: Open, servers: Servers, artifact: Artifact
) -> None:
    page, tokenizer = open_page(), Tokenizer.from_folder(artifact("bert"))
    page.fill("#fill-text", "Return a old object of the ")
    page.evaluate("document.getElementById('fill-text').setSelectionRange(9, 13)")  # "old ", as a double click has it
    page.click("#insert-mask")
    page.keyboard.press("End")
    page.keyboard.press("Alt+m")
    page.keyboard.type(".")
    text = "Return a [MASK] object of the [MASK]."
    assert page.input_value("#fill-text") == text

    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".candidate")
    answer = ask(servers["bert"], "/fill-mask", text, top_k=5)
    check_bars(bars(page), answer)
    assert re.fullmatch(r"2 masks in \d+(\.\d)? m?s", page.inner_text("#fill-status"))
    assert page.locator(".mask").nth(1).locator(".context .blank:not(.other)").inner_text() == "2"

    page.locator(".mask").nth(1).locator(".candidate").nth(2).click()
    expect(page.locator(".mask")).to_have_count(1)
    left = page.input_value("#fill-text")
    assert read_back(tokenizer, left) == answer[1][2]["sequence"]
    check_bars(bars(page), [ask(servers["bert"], "/fill-mask", left, top_k=5)])

    # The focus went on to the mask that was left: keys alone do the rest, and take it back.
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#fill-status")).to_have_text("Every mask is filled.")
    second = ask(servers["bert"], "/fill-mask", left)[1]
    assert read_back(tokenizer, page.input_value("#fill-text"), whole=True) == second["sequence"]
    page.keyboard.press("Enter")  # on "Undo"
    page.wait_for_selector(".candidate")
    assert page.input_value("#fill-text") == left
    page.click(".candidate")
    page.click("#score-it")
    expect(page.locator("#tokens")).to_have_text(page.input_value("#fill-text"))


def test_candidates_as_many_as_chosen_and_none_for_a_text_that_has_changed(open_page: Open, servers: Servers) -> None:
    page, text = open_page("roberta"), "The value of <mask> is <mask>."
    fill_in(page, text)
    with page.expect_response("**/fill-mask"):
        page.select_option("#top-k", "20")
    expect(page.locator(".candidate")).to_have_count(40)
    check_bars(bars(page), ask(servers["roberta"], "/fill-mask", text, top_k=20))
    page.type("#fill-text", "!")
    assert page.evaluate("document.getElementById('fill-results').inert")
    assert page.inner_text("#fill-status") == "The text has changed since."


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_every_candidate_is_put_where_the_model_reads_it(
    name: str, open_page: Open, servers: Servers, artifact: Artifact
) -> None:
    page, server, tokenizer = open_page(name), servers[name], Tokenizer.from_folder(artifact(name))
    mask, special = tokenizer.mask_token, tokenizer.special_ids
    for text in (f"A function {mask} the value.", f"{mask} of the class", f"the re{mask} (of {mask})", f"a {mask}"):
        answer = ask(server, "/fill-mask", text, top_k=100)
        for index, candidates in enumerate([answer] if isinstance(answer[0], dict) else answer):
            for filled, candidate in zip(fill_mask(page, text, mask, index, candidates), candidates, strict=True):
                token = candidate["token_str"]
                if "\ufffd" in token or not token.strip() or candidate["token"] in special:
                    continue  # a part of a character, which the page does not offer; no word
                # Two spaces, where the token brings one and the user typed one, become one.
                meant = re.sub(" +", " ", candidate["sequence"]).strip().removeprefix("##")
                assert read_back(tokenizer, filled, whole=text.count(mask) == 1).strip() == meant, (text, candidate)


def test_tokens_that_bring_or_drop_a_space(open_page: Open) -> None:
    cases = [
        ("un [MASK] it", "##able", "un able it", "unable it"),
        ("[MASK] it", "##able", "able it", "able it"),
        ("a [MASK].", " cat", "a cat.", "a cat."),
        ("a[MASK].", " cat", "a cat.", "a cat."),
        ("a\n[MASK].", " cat", "a cat.", "a\ncat."),
        ("[MASK] it", " The", " The it", "The it"),
        ("Ear [MASK] is", "th", "Earth is", "Earth is"),
        ("a b[MASK]", "c", "a b c", "a b c"),
        ("a [MASK]", "##", "a ##", "a ##"),
        ("東京[MASK]", "都", "東 京 都", "東京都"),
        ('"[MASK]"', "word", '" word "', '"word"'),
        ("a 😀 [MASK]", ".", "a 😀.", "a 😀."),
    ]
    page = open_page()
    for text, token, sequence, expected in cases:
        other = sequence.replace(token.removeprefix("##").strip(), "@", 1)
        candidates = [{"token_str": token, "sequence": sequence}, {"token_str": "@", "sequence": other}]
        assert fill_mask(page, text, "[MASK]", 0, candidates)[0] == expected


def test_errors_are_the_servers_own_line(open_page: Open, servers: Servers) -> None:
    page = open_page(expected="422")
    page.fill("#fill-text", "no blank here")
    page.click("#fill-button")
    page.wait_for_selector("#fill-status.error")
    assert page.inner_text("#fill-status") == ask(servers["bert"], "/fill-mask", "no blank here")["error"]


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_score_colours_each_token_and_shows_the_apis_figures(name: str, open_page: Open, servers: Servers) -> None:
    page, text = open_page(name), "A <b>list</b> 😀 is\n  an  object, é."
    score(page, text)
    for variant in ("within-word", "original"):
        with page.expect_response("**/score"):
            page.check(f"[value={variant}]")
        answer = ask(servers[name], "/score", text, pll=variant, per_token=True)
        expect(page.locator("#score-figures data").first).to_have_attribute("value", str(answer["pseudo_perplexity"]))
        figures = page.eval_on_selector_all("#score-figures data", "all => all.map((n) => [n.value, n.textContent])")
        assert float(figures[1][0]) == answer["pseudo_log_likelihood"]
        assert figures[3] == [str(answer["tokens"])] * 2
        assert float(figures[0][1].replace(",", "")) == pytest.approx(answer["pseudo_perplexity"], rel=0.01)

        assert page.text_content("#tokens") == text  # as typed: the tags and the white space too
        assert page.locator("#tokens b").count() == 0
        shades = [shade for _, _, shade in styles(page, "#legend span")]
        expected: list[list[Any]] = []
        for token in answer["per_token"]:
            span, nats = (token["start"], token["end"]), -token["log_prob"]
            if expected and expected[-1][0] == span:  # the bytes of one character
                expected[-1][1] += nats
            else:
                expected.append([span, nats])
        assert [(shown, shade) for shown, _, shade in styles(page, "#tokens .token")] == [
            (text[start:end].strip() or text[start:end], shades[sum(nats >= level for level in LEVELS)])
            for (start, end), nats in expected
        ]
        assert page.locator("#token-rows tr").count() == answer["tokens"]


def test_token_details_by_keyboard_and_on_to_fill(open_page: Open, servers: Servers) -> None:
    page, text = open_page(), "the old object is new."
    score(page, text)
    tokens = ask(servers["bert"], "/score", text, per_token=True)["per_token"]
    assert page.locator("#tokens [tabindex='0']").count() == 1
    page.focus("#tokens [tabindex='0']")
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    begin, end, log_prob = (tokens[-2][name] for name in ("start", "end", "log_prob"))
    detail = page.inner_text("#token-detail")
    assert detail.startswith(text[begin:end]) and f"{-log_prob:.2f} nats" in detail
    assert page.evaluate("document.activeElement.tabIndex") == 0
    page.keyboard.press("Enter")
    page.wait_for_selector("#panel-fill:not([hidden]) .candidate")
    assert page.input_value("#fill-text") == text[:begin] + "[MASK]" + text[end:]


def test_a_newer_request_ends_the_older(open_page: Open) -> None:
    page = open_page()
    page.route("**/score", lambda route: None if "first" in route.request.post_data else route.continue_())
    page.click("#tab-score")
    page.fill("#score-text", "first")
    page.click("#score-button")
    page.fill("#score-text", "second")
    with page.expect_event("requestfailed") as failed:
        page.click("#score-button")
    page.wait_for_selector(".token")
    assert failed.value.failure == "net::ERR_ABORTED" and page.text_content("#tokens") == "second"
    assert not page.locator("#score-status.error").count()
    page.unroute_all(behavior="ignoreErrors")


def test_the_models_card(open_page: Open, servers: Servers) -> None:
    page, url = open_page(), servers["bert"].url
    page.click("#tab-model")
    page.wait_for_selector("#model-card h2")
    card = page.inner_text("#model-card")
    info = servers["bert"].ask("/info").json
    for value in (info["fingerprint"], info["architecture"], *info["files"], *info["files"].values()):
        assert value in card
    assert f"{info['limits']['queue_tokens']:,}" in card
    assert f"curl {url}/fill-mask" in card and f'InferenceClient("{url}/fill-mask")' in card


def test_the_token_is_asked_for_and_load_is_said_kindly(open_page: Open, servers: Servers) -> None:
    page = open_page("guarded", expected="401|429")
    page.wait_for_selector("#token-form:not([hidden])")
    page.keyboard.type("wrong")  # the field has the focus
    page.keyboard.press("Enter")
    expect(page.locator("#token-message")).to_have_text("The server did not accept this token")
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_selector("#insert-mask:enabled")
    assert page.is_hidden("#token-form")
    assert page.input_value("#fill-text") == EXAMPLE
    assert page.get_attribute("#fill-text", "lang") == page.get_attribute("#tokens", "lang") == "pt"
    page.reload()
    fill_in(page, "a [MASK]")
    assert page.is_hidden("#token-form")
    card = page.text_content("#model-card")
    assert TOKEN not in card and "$MLMKIT_TOKEN" in card and EXAMPLE in card

    half = f"POST /score HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 99\r\n\r\n{{"
    with socket.create_connection(("127.0.0.1", servers["guarded"].port)) as slow:
        slow.sendall(half.encode())  # it takes the only slot while the server waits for its body
        page.click("#fill-button")
        page.wait_for_selector("#fill-status.error")
    assert page.inner_text("#fill-status") == "The server is busy just now. Please try again in 1 second."


def test_without_a_card_no_example_is_shown(open_page: Open) -> None:
    page = open_page("roberta")
    assert page.input_value("#fill-text") == page.input_value("#score-text") == ""
    assert page.get_attribute("#fill-text", "placeholder") == "Write a text with <mask> where a word is missing."
    assert page.get_attribute("#fill-text", "lang") == ""


def test_the_reference_has_locks_where_the_token_is_needed_and_a_request_that_works(
    open_page: Open, servers: Servers
) -> None:
    page = open_page("guarded", expected="401")
    page.goto(f"{servers['guarded'].url}/docs")
    page.wait_for_selector(".opblock")
    assert EXAMPLE in page.inner_text(".info")
    paths, locked = (
        page.eval_on_selector_all(f"{blocks} .opblock-summary-path", "all => all.map((n) => n.dataset.path)")
        for blocks in (".opblock", ".opblock:has(.authorization__btn)")
    )
    assert locked == [path for path in paths if path not in PROBES]
    page.click(".authorize")
    page.fill(".auth-container input", TOKEN)
    page.click(".auth-btn-wrapper .authorize")
    page.click(".auth-btn-wrapper .btn-done")
    for button in (".opblock-summary-control", ".try-out__btn", ".execute"):
        page.click(f".opblock:has([data-path='/fill-mask']) {button}")
    page.wait_for_selector(".live-responses-table")
    assert page.locator(".live-responses-table .response-col_status").nth(1).inner_text() == "200"


def test_tabs_by_keyboard_alone(open_page: Open) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    order = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "Home", "End"):
        page.keyboard.press(key)
        chosen = page.evaluate("document.activeElement.id")
        order.append(chosen.removeprefix("tab-"))
        assert page.get_attribute(f"#{chosen}", "aria-selected") == "true"
        assert page.locator("[role=tab][aria-selected=true]").count() == 1
        shown = page.eval_on_selector_all("[role=tabpanel]:not([hidden])", "all => all.map((n) => n.id)")
        assert shown == [chosen.replace("tab", "panel")]
    assert order == ["score", "model", "fill", "model", "fill", "model"]


def test_a_phone_scrolls_in_one_direction(open_page: Open) -> None:
    page = open_page(viewport={"width": 360, "height": 740})
    long = "m" * 40
    fill_in(page, f"{long} [MASK] [MASK]")
    score(page, f"the <b> {long}")
    page.click("summary")
    for tab in ("fill", "score", "model"):
        page.click(f"#tab-{tab}")
        assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read_and_told_apart_without_hue(scheme: str, open_page: Open) -> None:
    page = open_page(color_scheme=scheme)
    page.wait_for_selector("#legend span", state="attached")

    def luminance(colour: str) -> float:
        """WCAG 2.2, relative luminance."""
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(first: str, second: str) -> float:
        low, high = sorted((luminance(first), luminance(second)))
        return (high + 0.05) / (low + 0.05)

    shades = styles(page, "#legend span")
    assert len(shades) == len(LEVELS) + 1
    assert min(contrast(ink, ground) for _, ink, ground in shades) >= 4.5
    lights = [luminance(ground) for _, _, ground in shades]
    steps = [(b + 0.05) / (a + 0.05) for a, b in pairwise(lights)]
    assert all(step < 1 / 1.1 for step in steps) if scheme == "light" else all(step > 1.1 for step in steps)

    page.wait_for_selector("#fill-button:enabled")
    assert contrast(styles(page, "#model-line")[0][1], styles(page, "body")[0][2]) >= 4.5
    assert contrast(*styles(page, "#fill-button")[0][1:]) >= 4.5
