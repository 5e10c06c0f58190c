// The page: what is asked of the worker, what is shown of its answers, the form, the link. views.js draws the models' insides.
//
// Text of the model and of the user is only ever textContent.
"use strict";

const SHOWN = 4000; // tokens that the page keeps; those before are dropped, so that long writing needs no more memory
const MOST_BITS = 10; // of surprise, in the darkest colour
const HEAT = 70; // per cent of that colour
const LINK_LENGTH = 8000; // characters of a prompt that go into the link
const DRAW_MS = 40; // between two drawings of a text that grows
const SETTINGS = ["temperature", "topK", "topP", "seed", "tokens"];

const state = {
  models: [], // {name, config}
  vocabulary: [], // a string for each id
  tokens: [], // of the text, from the one numbered `dropped`: {i, id, piece, rows}
  dropped: 0,
  start: 0, // the first token in the models' context
  T: 0, // tokens in it
  ahead: null, // for each model what may come next
  selected: null, // the number of a token, or of the place after the last
  isBusy: true,
  isChosenByKey: false, // the alternative that is being written from: the focus was on it
  number: 0, // of the reading or writing that was asked for last
};

let worker;
const arrived = []; // tokens that are not shown yet
let drawing = null; // the timer that will
const answers = []; // of the worker, waited for by `ask`

function ask(message, kind = message.kind) {
  worker.postMessage(message);
  return new Promise((resolve, reject) => answers.push({ kind, resolve, reject }));
}

function open() {
  const missing = ["Worker", "DecompressionStream", "Response"].find((name) => !(name in globalThis));
  if (missing) throw new Error(`This browser is too old for the page (it has no ${missing}): use a newer one.`);
  worker = new Worker(URL.createObjectURL(new Blob([byId("worker").textContent], { type: "text/javascript" })));
  worker.onerror = (event) =>
    fail(`The engine stopped: ${event.message || "it could not start"}. Open the page again.`);
  worker.onmessage = ({ data }) => {
    const at = answers.findIndex(({ kind }) => kind === data.kind || (data.kind === "failed" && kind === data.what));
    const [waiting] = at < 0 ? [] : answers.splice(at, 1);
    if (data.kind === "failed") (waiting?.reject ?? fail)(new Error(data.reason));
    else waiting?.resolve(data);
    receivers[data.kind]?.(data);
  };
  return readWeights();
}

/** The weights in the page, an element at a time, which is then removed: base64, gzip, safetensors. */
async function readWeights() {
  const parts = [];
  const elements = document.querySelectorAll("script.weights");
  for (const element of elements) {
    if (elements.length > 1) byId("state").textContent = `Opening: part ${parts.length + 1} of ${elements.length}`;
    const text = atob(element.textContent);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    parts.push(bytes);
    element.remove();
    await new Promise((resolve) => setTimeout(resolve)); // let the browser draw
  }
  const stream = new Blob(parts).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  worker.postMessage({ kind: "open", buffer }, [buffer]);
}

const receivers = {
  opened({ models, vocabulary }) {
    Object.assign(state, { models, vocabulary });
    byId("state").hidden = true;
    byId("panes").replaceChildren(...models.map(makePane));
    const isComparison = models.length > 1;
    for (const id of ["writer-label", "model-label", "legend-difference"]) byId(id).hidden = !isComparison;
    for (const id of ["writer", "model"]) {
      byId(id).replaceChildren(...models.map(({ name }, m) => element("option", { value: m }, name)));
    }
    restoreWriter();
    makeTiles();
    setBusy(false);
    showChoices();
  },

  reading({ done, of }) {
    say(`Reading again: ${done.toLocaleString("en")} of ${of.toLocaleString("en")} tokens`);
  },

  /** The text now has its first n tokens only. */
  kept({ n }) {
    drawTokens();
    state.ahead = null;
    if (n < state.dropped) Object.assign(state, { tokens: [], dropped: n });
    state.tokens.length = Math.min(state.tokens.length, n - state.dropped);
    for (const text of document.querySelectorAll(".text")) {
      while (text.childElementCount > state.tokens.length) text.lastElementChild.remove();
    }
    if (state.selected !== null && state.selected > n) select(null);
    showTotals();
  },

  tokens({ tokens, start }) {
    state.start = start;
    arrived.push(...tokens);
    drawing ??= setTimeout(drawTokens, DRAW_MS);
  },

  done({ ending, isError, written, seconds, start, T, ahead, number }) {
    drawTokens();
    if (number !== state.number) return; // another has been asked for meanwhile
    Object.assign(state, { start, T, ahead });
    document.querySelectorAll(".text").forEach((text, m) => {
      text.append(makeToken({ i: end(), piece: "", rows: null, isEnd: true }, m));
    });
    const speed = written > 1 ? `${written} written, ${Math.round(written / seconds)} a second.` : "";
    const unseen =
      start > 0 && ahead.length
        ? ` ${plural("The model sees", "The models see")} the last ${T.toLocaleString("en")}.`
        : "";
    say(isError ? ending : `${end().toLocaleString("en")} tokens. ${speed}${unseen} ${ending}`, isError);
    setBusy(false);
    if (!isError || end()) select(Math.min(state.selected ?? end(), end()));
    if (state.isChosenByKey) document.querySelector(".text .token.selected")?.focus();
    state.isChosenByKey = false;
    showInside();
  },

  tiles: showTiles,
};

/** Show the tokens that have arrived. Not each as it comes: to lay a long text out takes longer than to write a token. */
function drawTokens() {
  clearTimeout(drawing);
  drawing = null;
  if (!arrived.length) return;
  const tokens = arrived.splice(0);
  state.tokens.push(...tokens);
  document.querySelectorAll(".text").forEach((text, m) => {
    const isAtEnd = text.scrollTop + text.clientHeight > text.scrollHeight - 40;
    text.append(...tokens.map((token) => makeToken(token, m)));
    const surplus = text.childElementCount - SHOWN;
    for (let i = 0; i < surplus; i++) text.firstElementChild.remove();
    if (isAtEnd) text.scrollTop = text.scrollHeight;
  });
  const surplus = Math.max(0, state.tokens.length - SHOWN);
  state.tokens.splice(0, surplus);
  state.dropped += surplus;
  showTotals();
  say(`${end().toLocaleString("en")} tokens`);
  worker.postMessage({ kind: "drawn" });
}

const plural = (one, many) => (state.models.length > 1 ? many : one);

/** The number of tokens of the text. */
function end() {
  return state.dropped + state.tokens.length;
}

/** The token numbered i; undefined if it is not shown any more, or is the place after the last. */
function tokenAt(i) {
  return state.tokens[i - state.dropped];
}

// Writing ---------------------------------------------------------------------------------------------------------------

/** message: prompt, or keep and next; see the worker's `write`. tokens: how many to write, none only to read. */
function write(message, tokens = settings().tokens) {
  if (!byId("form").reportValidity()) return;
  if (tokens) select(null);
  setBusy(true);
  say("Reading …");
  const writer = Number(byId("writer").value || 0);
  worker.postMessage({
    kind: "write",
    ...message,
    tokens,
    settings: settings(),
    writer,
    shown: state.dropped,
    number: ++state.number,
  });
  rememberLink();
}

function settings() {
  return Object.fromEntries(SETTINGS.map((name) => [name, Number(byId(name).value)]));
}

function setBusy(isBusy) {
  state.isBusy = isBusy;
  byId("status").setAttribute("aria-busy", String(isBusy)); // no screen reader is to read every count of tokens
  for (const id of ["write", "read"]) byId(id).disabled = isBusy;
  byId("more").disabled = isBusy || end() === 0;
  byId("stop").disabled = !isBusy || !state.models.length;
}

function say(words, isWrong = false) {
  byId("status").textContent = words;
  byId("status").classList.toggle("wrong", Boolean(isWrong));
}

function fail(reason) {
  byId("state").hidden = false;
  byId("state").textContent = reason.message ?? reason;
  byId("state").classList.add("wrong");
}

// The text --------------------------------------------------------------------------------------------------------------

function makePane({ name }, m) {
  const text = element("div", {
    className: "text",
    role: "group",
    "aria-label": `Text, read by ${name}; arrow keys move`,
  });
  rove(text, ".token");
  text.addEventListener("scroll", () => {
    if (!text.matches(":hover, :focus-within")) return; // it follows the other, or the text that grows
    for (const other of document.querySelectorAll(".text")) other.scrollTop = text.scrollTop;
  });
  text.addEventListener("click", ({ target }) => {
    if (target.dataset.i !== undefined) select(Number(target.dataset.i));
  });
  const title = state.models.length > 1 ? [element("h3", {}, name)] : [];
  return element(
    "section",
    { className: "pane" },
    ...title,
    element("p", { className: "totals", id: `totals-${m}` }),
    text,
  );
}

function makeToken({ i, id, piece, rows, isEnd }, m) {
  const span = element("span", { className: "token", role: "button", tabIndex: -1 }, piece);
  span.dataset.i = i;
  if (piece.startsWith("\n")) span.classList.add("line");
  if (isEnd) span.classList.add("end");
  else if (piece === "") span.classList.add("empty");
  const p = rows ? `, ${percent(Math.exp(rows[m].logprob))}` : "";
  span.setAttribute("aria-label", isEnd ? "the next token" : `${visible(state.vocabulary[id])}${p}`);
  span.title = isEnd ? "what may come next" : `token ${i}: ${visible(state.vocabulary[id])}${p}`;
  colour(span, rows, m);
  return span;
}

/** Shade a token by its surprise, or by the difference between the two models. */
function colour(span, rows, m) {
  if (!rows) return;
  let bits = -rows[m].logprob / Math.LN2;
  span.style.removeProperty("--hue");
  if (byId("colour").value === "difference" && state.models.length > 1) {
    const gain = (rows[1].logprob - rows[0].logprob) / Math.LN2;
    if (gain > 0) span.style.setProperty("--hue", "var(--s0)");
    bits = 2 * Math.abs(gain);
  }
  span.style.setProperty("--heat", ((Math.min(bits, MOST_BITS) / MOST_BITS) * HEAT).toFixed(0));
}

/** Log-probability and surprise of all tokens that are shown. */
function showTotals() {
  for (const m of state.models.keys()) {
    let total = 0;
    let n = 0;
    for (const { rows } of state.tokens) {
      if (!rows) continue;
      total += rows[m].logprob;
      n++;
    }
    const each = total / n;
    const since = state.dropped ? `; ${state.dropped.toLocaleString("en")} earlier tokens are not kept` : "";
    byId(`totals-${m}`).textContent = n
      ? `log-probability ${total.toFixed(1)} nats; ${(-each / Math.LN2).toFixed(2)} bits a token; perplexity ${Math.exp(-each).toPrecision(3)}${since}`
      : "";
  }
}

/** Make the token numbered i the one that everything on the page is about; null for none. */
function select(i) {
  state.selected = i;
  for (const old of document.querySelectorAll(".text .token.selected")) {
    old.classList.remove("selected");
    old.removeAttribute("aria-current");
  }
  for (const text of document.querySelectorAll(".text")) {
    const span = text.children[i - state.dropped];
    if (i !== null && span) {
      span.classList.add("selected");
      span.setAttribute("aria-current", "true");
      moveStop(text, span);
    }
  }
  showChoices();
  if (!state.isBusy) showToken();
}

// Keyboard: one stop in a group, the arrows move in it --------------------------------------------------------------------

/** columns: of the items, where they are a table. */
function rove(group, selector, columns = () => 1) {
  group.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const row = columns();
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: row, ArrowUp: -row, Home: -Infinity, End: Infinity };
    const step = steps[event.key];
    const items = [...group.querySelectorAll(selector)];
    const at = items.indexOf(document.activeElement);
    if (at < 0) return;
    if (event.key === "Enter" || event.key === " ") items[at].click();
    else if (step) focusOn(group, items[Math.max(0, Math.min(items.length - 1, at + step))]);
    else return;
    event.preventDefault();
  });
}

function moveStop(group, item) {
  for (const old of group.querySelectorAll("[tabindex='0']")) old.tabIndex = -1;
  item.tabIndex = 0;
}

function focusOn(group, item) {
  moveStop(group, item);
  item.focus();
}

// The link --------------------------------------------------------------------------------------------------------------

/** -> whether the prompt is short enough for a link. */
function rememberLink() {
  const prompt = byId("prompt").value;
  const holdsPrompt = prompt.length <= LINK_LENGTH;
  const names = state.models.length > 1 ? [...SETTINGS, "writer"] : SETTINGS;
  const values = names.map((name) => [name, byId(name).value]);
  if (holdsPrompt) values.unshift(["prompt", prompt]);
  history.replaceState(null, "", `#${new URLSearchParams(values)}`);
  return holdsPrompt;
}

/** Restore what a link holds; what it cannot hold is left as it is. */
function restoreLink() {
  const values = new URLSearchParams(location.hash.slice(1));
  if (values.has("prompt")) byId("prompt").value = values.get("prompt");
  for (const name of SETTINGS) {
    const input = byId(name);
    const before = input.value;
    if (values.has(name)) input.value = values.get(name);
    if (!input.checkValidity()) input.value = before;
  }
  restoreWriter();
}

/** The same for the model that writes: there is none to choose before the page is open. */
function restoreWriter() {
  const writer = new URLSearchParams(location.hash.slice(1)).get("writer");
  if ([...byId("writer").options].some(({ value }) => value === writer)) byId("writer").value = writer;
}

async function copyLink() {
  const without = rememberLink() ? "" : " It holds the settings only: the prompt is too long for a link.";
  try {
    await navigator.clipboard.writeText(location.href);
    say(`The link is in the clipboard.${without}`);
  } catch {
    say(`The link is in the address bar: copy it from there.${without}`);
  }
}

// Small things ----------------------------------------------------------------------------------------------------------

function byId(id) {
  return document.getElementById(id);
}

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const SEEN_AS = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };
const UNSEEN = /[ \p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\uFFFE\uFFFF]/gu; // not all of them are allowed in an SVG file

/** A token in a list: its spaces, line breaks and control characters can be seen. */
function visible(token) {
  return token.replace(UNSEEN, (char) => SEEN_AS[char] ?? `\\u{${char.codePointAt(0).toString(16)}}`) || "(nothing)";
}

function percent(p) {
  if (p >= 0.0995) return `${(100 * p).toFixed(0)} %`;
  return p >= 0.001 ? `${(100 * p).toFixed(1)} %` : `${(100 * p).toPrecision(1)} %`.replace("e-", " · 10^-");
}

function start() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    write({ prompt: byId("prompt").value });
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !state.isBusy) byId("form").requestSubmit();
  });
  byId("read").addEventListener("click", () => write({ prompt: byId("prompt").value }, 0));
  byId("more").addEventListener("click", () => write({ keep: end(), next: [] }));
  byId("stop").addEventListener("click", () => worker.postMessage({ kind: "stop" }));
  byId("link").addEventListener("click", copyLink);
  byId("colour").addEventListener("change", () => {
    byId("legend-surprise").hidden = byId("colour").value === "difference";
    document.querySelectorAll(".text").forEach((text, m) => {
      for (const span of text.children) colour(span, tokenAt(Number(span.dataset.i))?.rows, m);
    });
  });
  addEventListener("hashchange", restoreLink);
  restoreLink();
  startViews();
  open().catch(fail);
}

try {
  start();
} catch (error) {
  fail(error);
}
