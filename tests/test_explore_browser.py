"""The page of model.explore in headless Chromium: its numbers are PyTorch's, bad input is a sentence, nothing leaves.

CHROMIUM: a browser to use; without it one of the usual names, or Playwright's own, which `make browser` installs.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from small_model import TEXT, small_model, small_tokenizer
from test_bpe import RUNS, SCRIPTS

from model.config import GPTConfig
from model.explore.page import WORKER, Subject, write
from model.generate import generate
from model.gpt import GPT
from model.quantize import quantize
from model.sampling import Sampling, sample
from model.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, TrainedTokenizer

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the playwright package: make browser installs it")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def browser():
    os.environ.setdefault("PLAYWRIGHT_BROWSERS_PATH", str(ROOT / "build" / "browser"))
    with sync_api.sync_playwright() as playwright:
        usual = filter(None, [os.environ.get("CHROMIUM"), *map(shutil.which, NAMES)])
        path = next(usual, playwright.chromium.executable_path)
        if not Path(path).exists():
            pytest.skip("needs Chromium: make browser installs it, or CHROMIUM names it")
        is_root = hasattr(os, "geteuid") and os.geteuid() == 0
        browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=not is_root)
        yield browser
        browser.close()


def random_model(tokenizer: Tokenizer, **shape) -> GPT:
    """Weights large enough that every token counts, and biases and LayerNorm that are not zeros and ones."""
    torch.manual_seed(1)
    shape = {"n_positions": 48, "n_embd": 18, "n_layer": 2, "n_head": 3, "initializer_range": 0.4, **shape}
    model = GPT(GPTConfig(tokenizer.n_vocab, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def as_stored(model: GPT, weights: str) -> GPT:
    """The model with the weights that the page has."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if weights == "int8" and p.ndim == 2 and name != "transformer.wpe.weight":
                q, scale = quantize(p)
                p.copy_(q * scale[:, None])
            else:
                p.copy_(p.half())
    return model


ALL = "".join(SCRIPTS.values())
SMALL = CharTokenizer(TEXT + "&#\n\f")
MODELS = {
    "char, float16, no biases": (lambda: CharTokenizer(ALL), "float16", {"bias": False}),
    "bpe, float16, erf": (lambda: TrainedTokenizer.train([ALL], 400), "float16", {"activation_function": "gelu"}),
    "gpt2, int8": (GPT2Tokenizer, "int8", {"n_embd": 12, "n_layer": 1}),
}  # fmt: skip


class Opened:
    """A page in a browser, with what the tests ask of it."""

    def __init__(self, browser, path: Path, *, fragment: str = "", before: str = "", **options) -> None:
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(120_000)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        if before:
            self.page.add_init_script(before)
        self.page.goto(f"{path.as_uri()}{fragment}")

    def ready(self) -> Opened:
        self.page.wait_for_selector("#write:enabled")
        return self

    def fill(self, **settings) -> None:
        for name, value in settings.items():
            self.page.fill(f"#{name}", str(value))

    def press(self, button: str) -> None:
        """Press one of the buttons below the prompt, and wait until what it asks for is done."""
        self.page.click(f"#{button}")
        self.ready()

    def write(self, **settings) -> None:
        self.fill(**settings)
        self.press("write")

    @property
    def ids(self) -> list[int]:
        return self.page.evaluate("state.tokens.map((token) => token.id)")

    @property
    def status(self) -> str:
        return self.page.inner_text("#status")

    def ask(self, **message):
        """The worker's answer."""
        return self.page.evaluate("(message) => ask(message)", message)

    def close(self) -> None:
        self.page.close()
        assert self.errors == []


@pytest.fixture(scope="module", params=MODELS)
def subject(request, browser, tmp_path_factory):
    """A page, and the model and tokenizer that it holds."""
    make, weights, shape = MODELS[request.param]
    tokenizer = make()
    model = random_model(tokenizer, **shape)
    path = tmp_path_factory.mktemp("page") / "page.html"
    write(path, "a model", [Subject("a model", model)], tokenizer, weights)
    opened = Opened(browser, path).ready()
    yield opened, as_stored(model, weights), tokenizer
    opened.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The page of a small model of characters, with a context of 12, which never ends its text."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    model = small_model(SMALL)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1)
        model.transformer.wte.weight[SMALL.eot_id] = -3
    write(path, "a small model", [Subject("small", model)], SMALL, "float16")
    return path


@pytest.fixture
def opened(browser, small):
    opened = Opened(browser, small).ready()
    yield opened
    opened.close()


# --- the numbers are PyTorch's ----------------------------------------------------------------------------------------


def test_logits_are_pytorchs(subject):
    opened, model, tokenizer = subject
    ids = tokenizer.encode(SCRIPTS["Greek"])[: min(40, max(4, 20_000 // tokenizer.n_vocab))]
    answer = opened.page.evaluate(
        "async (m) => (await ask(m)).logits.map((l) => [...l])", {"kind": "logits", "model": 0, "ids": ids}
    )
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0][0]
    assert (torch.tensor(answer) - expected).abs().max() < 1e-4 < expected.abs().max()


def test_greedy_ids_are_pytorchs_beyond_the_context(subject):
    opened, model, tokenizer = subject
    prompt = tokenizer.encode(SCRIPTS["Latin"][:20])
    expected = [*generate(model, prompt, tokens=200, temperature=0, stop_id=tokenizer.eot_id)]
    opened.write(prompt=SCRIPTS["Latin"][:20], temperature=0, tokens=200)
    assert opened.ids == prompt + expected and len(expected) > 40


def test_ids_of_texts_are_those_of_the_tokenizer(subject):
    opened, _, tokenizer = subject
    noise = random.Random(0).randbytes(3000).decode(errors="replace")
    white = " a  b   c\n\nd\n e\t\tf  \n\n\n    g \x85\xa0\u2003x\ufeff y\u2028 z\x1c\r\n"
    texts = (
        [*SCRIPTS.values(), ALL]
        if tokenizer.name == "char"
        else [*SCRIPTS.values(), noise, white, *RUNS, "", "\ud800 a"]
    )
    found = [opened.page.evaluate("async (m) => (await ask(m)).ids", {"kind": "encode", "prompt": t}) for t in texts]
    assert found == [tokenizer.encode(text) for text in texts]


def test_text_is_that_of_the_tokenizer(subject):
    opened, _, tokenizer = subject
    opened.fill(prompt=SCRIPTS["Japanese"][:14])
    opened.press("read")
    pieces = opened.page.evaluate("state.tokens.map((token) => token.piece)")
    assert (
        len(pieces) == len(tokenizer.encode(SCRIPTS["Japanese"][:14])) and "".join(pieces) == SCRIPTS["Japanese"][:14]
    )


def test_probabilities_are_pytorchs(subject):
    opened, model, tokenizer = subject
    text = SCRIPTS["Latin"][:30]
    ids = tokenizer.encode(text)
    opened.fill(prompt=text)
    opened.press("read")
    with torch.no_grad():
        logprobs = model(torch.tensor([ids]))[0][0].log_softmax(-1)
    rows = opened.page.evaluate("state.tokens.slice(1).map((token) => token.rows[0])")
    assert [row["logprob"] for row in rows] == pytest.approx(logprobs[range(len(ids) - 1), ids[1:]].tolist(), abs=1e-4)
    top = logprobs[len(ids) - 1].topk(10)
    ahead = opened.page.evaluate("state.ahead[0].top")
    assert [p for _, p in ahead] == pytest.approx(top.values.exp().tolist(), abs=1e-4)
    total = sum(row["logprob"] for row in rows)
    assert f"log-probability {total:.1f} nats" in opened.page.inner_text(".totals")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.6},
        {"temperature": 1.7, "top_k": 300, "top_p": 0.9},
    ],
)
def test_ids_are_drawn_as_model_sampling_draws_them(browser, settings):
    page = browser.new_page()
    page.add_script_tag(content="\n".join((ROOT / "model" / "explore" / name).read_text() for name in WORKER))
    logits, uniforms = torch.randn(1, 400).mul(3).expand(50, -1), torch.rand(50, dtype=torch.float64)
    sampling = Sampling(**settings)
    js = {"temperature": sampling.temperature, "topK": sampling.top_k or 0, "topP": sampling.top_p}
    found = page.evaluate(
        "([logits, uniforms, settings]) => uniforms.map((u) => draw(Float64Array.from(logits), settings, u))",
        [logits[0].tolist(), uniforms.tolist(), js],
    )
    assert found == sample(logits, sampling, uniforms).tolist()
    spread = page.evaluate("Array.from({length: 4000}, (_, i) => uniform(7, i))")
    assert min(spread) >= 0 and max(spread) < 1 and abs(sum(spread) / 4000 - 0.5) < 0.02 and len(set(spread)) == 4000
    page.close()


def attention(model: GPT, ids: list[int], layer: int) -> torch.Tensor:
    """The attention probabilities of a layer, (H, T, T), by PyTorch."""
    found = []
    hook = model.transformer.h[layer].attn.c_attn.register_forward_hook(lambda *call: found.append(call[2]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    hook.remove()
    q, k, _ = found[0][0].unflatten(-1, (3, model.config.n_head, -1)).permute(1, 2, 0, 3)  # (H, T, D) each
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def test_maps_lens_and_neighbours_are_pytorchs(subject):
    opened, model, tokenizer = subject
    text, layer, head = SCRIPTS["Latin"][:40], model.config.n_layer - 1, 1
    ids = tokenizer.encode(text)
    opened.fill(prompt=text)
    opened.press("read")
    found = opened.page.evaluate(
        "async (m) => [...(await ask(m)).p]", {"kind": "map", "model": 0, "layer": layer, "head": head}
    )
    expected = attention(model, ids, layer)[head]
    assert (torch.tensor(found).view_as(expected) - expected).abs().max() < 1e-5

    lens = opened.ask(kind="lens", model=0, i=len(ids) - 1)["layers"]
    assert len(lens) == model.config.n_layer + 1
    ahead = opened.page.evaluate("state.ahead[0].top")
    assert [p for _, p in lens[-1]["top"]] == pytest.approx(
        [p for _, p in ahead[:5]]
    )  # the last layer's is the model's
    with torch.no_grad():
        x = model.transformer.wte.weight[ids[-1]] + model.transformer.wpe.weight[len(ids) - 1]
        first = (model.transformer.ln_f(x) @ model.transformer.wte.weight.T).softmax(-1).topk(5)
    assert [p for _, p in lens[0]["top"]] == pytest.approx(first.values.tolist(), abs=1e-4)
    assert lens[0]["norm"] == pytest.approx(x.norm().item(), rel=1e-5)

    near = opened.ask(kind="neighbours", model=0, i=2)
    wpe = model.transformer.wpe.weight
    cosines = torch.cosine_similarity(wpe[2], wpe).index_fill(0, torch.tensor(2), -2).topk(8)
    assert [row for row, _ in near["positions"]] == cosines.indices.tolist()
    assert [cosine for _, cosine in near["positions"]] == pytest.approx(cosines.values.tolist(), abs=1e-5)


# --- what a reader does -----------------------------------------------------------------------------------------------


def test_another_path_is_taken_from_a_token(opened):
    opened.write(prompt="CHAPTER I", tokens=3)
    before = opened.ids
    opened.page.click(".text .token >> nth=9")
    assert "Token 9" in opened.page.inner_text("#choices-about")
    assert opened.page.locator("#choices .taken").count() <= 1
    other = opened.page.locator("#choices .choice:not(.taken)").first
    word = other.locator("code").inner_text()
    opened.fill(tokens=2)
    other.click()
    opened.ready()
    assert opened.ids[:9] == before[:9] and len(opened.ids) == 12
    assert opened.page.inner_text(".text .token >> nth=9").strip() == word.replace("␣", "").strip()


def test_same_seed_same_text_and_write_on(opened):
    opened.write(prompt="out", tokens=30, seed=5, topK=0)
    first = opened.ids
    opened.write(seed=6)
    assert opened.ids != first
    opened.write(seed=5, tokens=10)
    opened.fill(tokens=20)
    opened.press("more")
    assert opened.ids == first


def test_same_seed_same_text_from_any_token_beyond_the_context(opened):
    """The context starts where the length of the text says, not where reading began: the model reads 12 tokens."""
    opened.write(prompt="out", tokens=40, seed=5, topK=0)
    first = opened.ids
    for keep in (3, 8, 12, 13, 14, 19, 20, 30, 42):
        opened.page.evaluate("(n) => write({ keep: n, next: [] }, 43 - n)", keep)
        opened.ready()
        assert opened.ids == first, keep


def test_text_that_has_changed_takes_no_other_path(opened):
    opened.write(prompt="out", tokens=30)
    opened.page.evaluate("write({ keep: 10, next: [0] }, 0); write({ keep: 20, next: [0] }, 0)")
    opened.ready()
    assert opened.status == "The text has changed meanwhile: choose again." and len(opened.ids) == 11


def test_link_restores_prompt_and_settings(browser, small, opened):
    opened.write(prompt="out & a\n#", tokens=7, seed=9, temperature=1.5, topK=3, topP=0.9)
    again = Opened(browser, small, fragment=opened.page.evaluate("location.hash")).ready()
    assert again.page.input_value("#prompt") == "out & a\n#"
    again.press("write")
    assert again.ids == opened.ids and len(again.ids) == 16
    again.close()
    odd = Opened(browser, small, fragment="#prompt=a&topK=x&seed=-1&tokens=1e99&constructor=1").ready()
    values = [odd.page.input_value(f"#{name}") for name in ("prompt", "topK", "seed", "tokens")]
    assert values == ["a", "40", "1", "200"]
    odd.fill(prompt="out " * 2500)
    odd.page.click("#link")
    odd.page.wait_for_selector("#status:has-text('the prompt is too long for a link')")
    assert odd.page.evaluate("location.hash.startsWith('#temperature=')")
    odd.close()


def test_two_models_read_the_same_text(browser, tmp_path):
    tokenizer = small_tokenizer()
    other = small_model(tokenizer)
    with torch.no_grad():
        other.transformer.ln_f.weight.mul_(0.5)
    models = [Subject("first", small_model(tokenizer)), Subject("second", other)]
    write(tmp_path / "page.html", "two", models, tokenizer, "float16")
    opened = Opened(browser, tmp_path / "page.html").ready()
    opened.page.select_option("#writer", "1")
    opened.write(prompt="CHAPTER", temperature=0, tokens=4)
    as_stored(other, "float16")
    ids = tokenizer.encode("CHAPTER")
    assert opened.ids == [*ids, *generate(other, ids, tokens=4, temperature=0)]
    panes = opened.page.locator(".pane")
    assert panes.count() == 2 and panes.nth(0).inner_text().splitlines()[0] == "first"
    assert panes.nth(0).locator(".totals").inner_text() != panes.nth(1).locator(".totals").inner_text()
    assert opened.page.locator("#choices h4").all_inner_texts() == ["first", "second"]
    opened.page.select_option("#colour", "difference")
    assert not opened.page.is_visible("#legend-surprise")
    assert opened.page.evaluate("document.querySelectorAll('.text .token[style*=hue]').length") > 0
    opened.page.select_option("#model", "1")
    assert opened.ask(kind="map", model=1, layer=0, head=0)["model"] == 1
    link = opened.page.evaluate("location.hash")
    opened.close()
    again = Opened(browser, tmp_path / "page.html", fragment=link).ready()
    assert again.page.input_value("#writer") == "1"
    again.fill(tokens=1_000_000)
    again.page.click("#write")  # the other model's maps are asked for while this one writes
    for model in "1010":
        again.page.wait_for_timeout(30)
        again.page.select_option("#model", model)
    again.press("stop")
    again.press("more") if len(again.ids) < 8 else again.press("read")
    again.page.wait_for_selector("#strip .token.selected")
    again.close()


def test_maps_are_saved(opened):
    opened.write(prompt="out\fagain", tokens=2)
    opened.page.click(".tile >> nth=3")
    opened.page.wait_for_selector("#png:enabled")
    for kind in ("png", "svg"):
        with opened.page.expect_download() as download:
            opened.page.click(f"#{kind}")
        assert download.value.suggested_filename == f"attention-layer-1-head-1.{kind}"
        data = Path(download.value.path()).read_bytes()
        if kind == "png":
            assert data.startswith(b"\x89PNG")
        else:
            svg = ElementTree.fromstring(data)
            titles = [title.text for title in svg.iter("{http://www.w3.org/2000/svg}title")]
            assert any("reads" in title for title in titles) and any(r"\u{c} reads" in title for title in titles)


def test_map_says_what_a_token_reads(opened):
    opened.write(prompt="out again", tokens=2)
    opened.page.wait_for_selector("#strip .token.selected")
    opened.page.focus("#map")
    opened.page.keyboard.press("ArrowUp")
    assert re.match(r"Token \S+ \(9\) reads ", opened.page.inner_text("#map-about"))
    opened.page.keyboard.press("ArrowLeft")
    opened.page.keyboard.press("ArrowLeft")
    assert re.search(r"; here \S+ \(8\) ", opened.page.inner_text("#map-about"))
    opened.page.keyboard.press("Enter")
    assert "Token 9, " in opened.page.inner_text("#choices-about")
    opened.page.hover("#strip .token >> nth=4")
    assert opened.page.inner_text("#map-about").startswith("Token a (4) reads ")


def test_keyboard_moves_in_the_text(opened):
    opened.write(prompt="out again", tokens=2)
    opened.page.focus(".text .token[tabindex='0']")
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowLeft", "Enter"):
        opened.page.keyboard.press(key)
    assert "Token 1, u" in opened.page.inner_text("#choices-about")
    opened.page.focus(".tile[tabindex='0']")
    for keys, where in ((("End",), "layer 1, head 1"), (("Home", "ArrowDown"), "layer 1, head 0")):
        for key in (*keys, "Enter"):
            opened.page.keyboard.press(key)
        assert opened.page.inner_text("#map-title") == f"Attention, {where}"
    opened.page.focus("#choices .choice >> nth=2")
    opened.page.keyboard.press("Enter")
    opened.page.wait_for_selector(".text .token.selected:focus")


def test_short_text_has_no_averages(opened):
    opened.fill(prompt="ou")
    opened.press("read")
    opened.page.wait_for_selector("#tiles-about:has-text('from the third token on')")
    assert opened.page.inner_text(".tile >> nth=0") == "0.0"


def test_everything_has_a_name(opened):
    opened.write(prompt="out", tokens=5)
    unnamed = opened.page.evaluate("""
      [...document.querySelectorAll("button, input, select, textarea, canvas, [role=button], [role=group]")]
        .filter((e) => !(e.ariaLabel || e.ariaHidden || e.labels?.length || e.textContent.trim()))
        .map((e) => e.outerHTML)""")
    assert unnamed == []


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1200, "light")])
def test_nothing_jumps_and_nothing_is_too_wide(browser, small, width, scheme):
    opened = Opened(browser, small, viewport={"width": width, "height": 800}, color_scheme=scheme).ready()
    where = "['#panes', '#choices-title', '#tiles'].map((id) => document.querySelector(id).getBoundingClientRect().top)"
    opened.write(prompt="out", tokens=1)
    before = opened.page.evaluate(where)
    opened.write(prompt="out", tokens=300)
    assert opened.page.evaluate(where) == before
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    opened.close()


# --- what can go wrong ------------------------------------------------------------------------------------------------


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "<b>&amp;",
    "{{7*7}}",
    "javascript:alert(1)",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_never_markup(browser, tmp_path, text):
    tokenizer = CharTokenizer(text)
    path = tmp_path / "page.html"
    write(
        path,
        text,
        [Subject(text, random_model(tokenizer)), Subject("b", random_model(tokenizer))],
        tokenizer,
        "float16",
    )
    opened = Opened(browser, path).ready()
    opened.page.on("dialog", lambda dialog: opened.errors.append(dialog.message))
    opened.write(prompt=text, tokens=40)
    assert (
        opened.page.evaluate("document.querySelectorAll('.text img, .text b, .text script, #choices b, h3 b').length")
        == 0
    )
    assert opened.page.inner_text("h1") == opened.page.inner_text(".pane h3 >> nth=0") == text
    assert "".join(opened.page.locator(".pane:first-child .token").all_text_contents()).startswith(text)
    opened.close()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("out ☃ again", 'not among them: "☃" (U+2603)'),
        ("☃🙂éあж中", "and 1 more"),
        ("\ud800", "(U+D800)"),
        ("out\x00", "(U+0000)"),
        ("out again out again", "19 tokens, and this model reads at most 12: shorten it"),
        ("a" * 100_000, "100,000 tokens, and this model reads at most 12: shorten it"),
        ("☃" * 100_000, "(U+2603)"),
        ("‮‏\u200b", "U+200B"),
    ],
)
def test_bad_prompt_is_a_sentence(opened, prompt, words):
    opened.fill(tokens=3)
    opened.page.evaluate("(prompt) => { byId('prompt').value = prompt; }", prompt)  # `fill` refuses half a character
    opened.press("write")
    assert words in opened.status
    opened.write(prompt="out")
    assert len(opened.ids) == 6


BAD_SETTINGS = {
    "temperature": ["-1", ""],
    "topK": ["-3", "1.5"],
    "topP": ["0", "2"],
    "seed": ["4294967296"],
    "tokens": ["0", "1e9"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_SETTINGS.items() for value in values]
)
def test_bad_setting_is_refused_by_its_field(opened, name, value):
    opened.fill(**{name: value})
    opened.page.click("#write")
    assert opened.ids == [] and opened.page.evaluate(f"document.querySelector('#{name}:invalid') !== null")
    opened.write(**{name: "1"})
    assert opened.ids


def test_empty_prompt_begins_with_the_end_of_text(opened):
    opened.write(prompt="", tokens=2)
    assert opened.ids[0] == SMALL.eot_id and opened.page.get_attribute(".text .token", "aria-label") == "⟨end-of-text⟩"


def test_stop_and_long_texts(opened):
    """The page keeps its last tokens, and says so; what it has dropped is read anew where it is needed."""
    opened.fill(prompt="out", tokens=1_000_000, topK=0, temperature=2)
    opened.page.click("#write")
    opened.page.wait_for_selector(".totals:has-text('earlier tokens are not kept')")
    opened.press("stop")
    assert "Stopped." in opened.status and len(opened.ids) == 4000, opened.status
    assert opened.page.locator(".text .token").count() == 4001
    opened.page.click(".text .token.end")
    opened.write(prompt="out a", tokens=2)
    assert len(opened.ids) == 7 and opened.page.inner_text(".text").startswith("out a")


def test_no_request_leaves_the_page(opened):
    opened.write(prompt="out", tokens=5)
    assert all(url.startswith(("file:", "blob:")) for url in opened.requests) and opened.requests
    blocked = opened.page.evaluate("""async () => {
      const found = [];
      addEventListener("securitypolicyviolation", (event) => found.push(event.effectiveDirective));
      await fetch("https://example.com/").catch(() => {});
      for (const [tag, name] of [["img", "src"], ["script", "src"], ["iframe", "src"]]) {
        const element = document.createElement(tag);
        element[name] = "https://example.com/";
        document.body.append(element);
      }
      const inline = document.createElement("script");
      inline.textContent = "globalThis.injected = 1";
      document.body.append(inline);
      await new Promise((resolve) => setTimeout(resolve, 50));
      return [[...new Set(found)].sort(), globalThis.injected ?? 0];
    }""")
    assert blocked == [["connect-src", "frame-src", "img-src", "script-src-elem"], 0]


@pytest.mark.parametrize("missing", ["DecompressionStream", "Worker"])
def test_old_browser_is_told(browser, small, missing):
    opened = Opened(browser, small, before=f"delete globalThis.{missing}")
    opened.page.wait_for_selector("#state.wrong")
    assert f"too old for the page (it has no {missing})" in opened.page.inner_text("#state")
    opened.close()


def test_without_scripts_the_page_says_what_it_needs(browser, small):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(small.as_uri())
    assert "scripts turned off" in page.inner_text("#state")
    context.close()
