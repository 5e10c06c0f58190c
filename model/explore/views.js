// What there is to see of a token and of the models: alternatives, attention, prediction by layer, neighbours.
"use strict";

const MAP_PIXELS = 1040; // of a saved map, at least
const SVG_LEAST = 0.004; // of attention that is drawn in an SVG file

const view = { layer: 0, head: 0, model: 0, map: null, row: 0, column: null, shown: null, reads: [] };

function startViews() {
  byId("model").addEventListener("change", () => {
    view.model = Number(byId("model").value);
    makeTiles();
    showInside();
    showToken();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showInside);
  const canvas = byId("map");
  canvas.addEventListener("pointermove", (event) => showRow(rowAt(event), columnAt(event)));
  canvas.addEventListener("click", (event) => selectRow(rowAt(event)));
  canvas.addEventListener("keydown", moveInMap);
  const strip = byId("strip");
  for (const kind of ["pointerover", "focusin"]) {
    strip.addEventListener(kind, ({ target }) => {
      if (target.dataset.t !== undefined) showRow(Number(target.dataset.t));
    });
  }
  strip.addEventListener("click", ({ target }) => {
    if (target.dataset.t !== undefined) selectRow(Number(target.dataset.t));
  });
  rove(strip, ".token");
  byId("png").addEventListener("click", savePng);
  byId("svg").addEventListener("click", saveSvg);
}

// Alternatives ----------------------------------------------------------------------------------------------------------

/** What the selected token could have been, as each model saw it. */
function showChoices() {
  const i = state.selected;
  const isEnd = i === end();
  const token = i === null ? null : tokenAt(i);
  const rows = isEnd ? state.ahead : token?.rows;
  const about = byId("choices-about");
  const predicts = plural("the model predicts", "the models predict");
  if (i === null) about.textContent = state.isBusy ? "" : "Write or read a text first, then click a token in it.";
  else if (isEnd && !rows?.length) about.textContent = "The model has not read the text to its end: press Continue.";
  else if (isEnd) about.textContent = "What may come next. Choose a token to continue from it.";
  else if (!token) about.textContent = `Token ${i} is not kept any more: the text has grown too long.`;
  else if (!rows) about.textContent = `The first token: ${predicts} what follows it.`;
  else {
    const bits = rows.map(
      ({ logprob }) => `${percent(Math.exp(logprob))}, ${(-logprob / Math.LN2).toFixed(1)} bits of surprise`,
    );
    about.textContent = `Token ${i}, ${visible(state.vocabulary[token.id])}: ${bits.join("; ")}. Choose another to take that path from here.`;
  }
  byId("choices").replaceChildren(
    ...state.models.map(({ name }, m) => {
      const items = (rows?.[m]?.top ?? []).map(([id, p]) => element("li", {}, makeChoice(i, id, p, id === token?.id)));
      const title = state.models.length > 1 ? [element("h4", {}, name)] : [];
      return element("div", {}, ...title, element("ol", { "aria-label": `Most likely tokens of ${name}` }, ...items));
    }),
  );
}

function makeChoice(i, id, p, isTaken) {
  const word = visible(state.vocabulary[id]);
  const bar = element("span", { className: "bar", "aria-hidden": "true" });
  bar.style.setProperty("--p", (100 * p).toFixed(1));
  const button = element(
    "button",
    {
      type: "button",
      className: `choice${isTaken ? " taken" : ""}`,
      "aria-label": `${word}, ${percent(p)}${isTaken ? ", taken" : ""}`,
    },
    element("code", {}, word),
    bar,
    element("span", { className: "p" }, percent(p)),
  );
  button.addEventListener("click", ({ detail }) => {
    write({ keep: i, next: [id] });
    state.isChosenByKey = state.isBusy && detail === 0;
  });
  return button;
}

// Attention -------------------------------------------------------------------------------------------------------------

function makeTiles() {
  const { n_layer: L, n_head: H } = state.models[view.model].config;
  const tiles = byId("tiles");
  tiles.style.gridTemplateColumns = `repeat(${H}, minmax(${H > 6 ? 56 : 72}px, 124px))`;
  tiles.replaceChildren();
  for (let layer = 0; layer < L; layer++) {
    for (let head = 0; head < H; head++) {
      const canvas = element("canvas", { width: 1, height: 1, "aria-hidden": "true" });
      const button = element("button", {
        type: "button",
        className: "tile",
        tabIndex: -1,
        "aria-label": `Layer ${layer}, head ${head}`,
      });
      button.append(canvas, element("span", {}, `${layer}.${head}`));
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => showMap(layer, head));
      tiles.append(button);
    }
  }
  Object.assign(view, { layer: Math.min(view.layer, L - 1), head: Math.min(view.head, H - 1) });
  moveStop(tiles, tiles.firstElementChild);
  if (!tiles.dataset.roves) rove(tiles, ".tile", () => state.models[view.model].config.n_head);
  tiles.dataset.roves = "yes";
}

/** All maps, anew. */
function showInside() {
  if (!state.T || state.isBusy) return;
  worker.postMessage({ kind: "tiles", model: view.model });
  showMap(view.layer, view.head);
}

const READS = { previous: "the token before", same: "itself", first: "the first token" };

/** The small maps of a layer's heads; with those of the last layer, which head reads each of READS most. */
function showTiles({ model, layer, heads }) {
  if (model !== view.model) return;
  const { n_head: H, n_layer: L } = state.models[model].config;
  view.reads.length = layer;
  view.reads.push(heads.map(({ reads }) => reads));
  heads.forEach(({ cells, reads }, head) => {
    const tile = byId("tiles").children[layer * H + head];
    paint(tile.firstElementChild, cells, Math.sqrt(cells.length));
    if (!reads) return;
    const [what, share] = Object.entries(reads).sort((a, b) => b[1] - a[1])[0];
    tile.lastElementChild.textContent = `${layer}.${head} ${what} ${percent(share)}`;
    const all = Object.entries(READS).map(([name, words]) => `${words} ${percent(reads[name])}`);
    tile.setAttribute("aria-label", `Layer ${layer}, head ${head}: ${all.join(", ")}`);
    tile.title = all.join(", ");
  });
  if (layer < L - 1) return;
  byId("tiles-about").textContent = "What a head reads on average is said from the third token on.";
  if (!heads[0].reads) return;
  const all = view.reads.flatMap((row, l) => row.map((reads, head) => ({ name: `${l}.${head}`, reads })));
  const most = Object.entries(READS).map(([what, words]) => {
    const best = all.reduce((a, b) => (b.reads[what] > a.reads[what] ? b : a));
    return `${words}: head ${best.name}, ${percent(best.reads[what])}`;
  });
  byId("tiles-about").textContent = `Most on ${most.join("; most on ")}.`;
}

/** Draw an n by n map, the square root of each share as brightness, which shows small ones too. */
function paint(canvas, p, n) {
  canvas.width = canvas.height = Math.max(n, 1);
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.width);
  const [from, to] = isDark()
    ? [
        [28, 36, 49],
        [132, 200, 255],
      ]
    : [
        [242, 244, 248],
        [18, 60, 140],
      ];
  for (let i = 0; i < n * n; i++) {
    const share = Math.sqrt(Math.min(p[i], 1));
    for (let channel = 0; channel < 3; channel++)
      image.data[4 * i + channel] = from[channel] + share * (to[channel] - from[channel]);
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

function isDark() {
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

/** The full map of a head. */
async function showMap(layer, head) {
  Object.assign(view, { layer, head });
  const { n_head: H } = state.models[view.model].config;
  for (const [at, tile] of [...byId("tiles").children].entries()) {
    tile.setAttribute("aria-pressed", String(at === layer * H + head));
  }
  byId("map-title").textContent = `Attention, layer ${layer}, head ${head}`;
  if (!state.T || state.isBusy) return;
  const map = await ask({ kind: "map", model: view.model, layer, head });
  if (map.layer !== view.layer || map.head !== view.head || map.model !== view.model) return;
  map.tokens = Array.from({ length: map.T }, (_, t) => tokenAt(map.start + t)); // the text may change meanwhile
  view.map = map;
  paint(byId("map"), map.p, map.T);
  byId("map").setAttribute(
    "aria-label",
    `Attention map of layer ${layer}, head ${head}: ${map.T} tokens; arrow keys choose a row and a column, Enter selects`,
  );
  for (const id of ["png", "svg"]) byId(id).disabled = false;
  makeStrip();
  showRow(inContext(state.selected) - map.start);
}

/** The token itself, or the nearest that the model still sees. */
function inContext(i) {
  return Math.max(state.start, Math.min(i ?? Infinity, state.start + state.T - 1));
}

/** Whether the text still has token t of the map. */
function isCurrent(t) {
  const token = view.map?.tokens[t];
  return token !== undefined && token === tokenAt(view.map.start + t);
}

/** Make token t of the map the selected one. */
function selectRow(t) {
  if (isCurrent(t)) select(view.map.start + t);
}

/** The arrow keys in the map: up and down to another token, left and right to one that it reads. */
function moveInMap(event) {
  const { map } = view;
  if (!map || event.altKey || event.ctrlKey || event.metaKey) return;
  const down = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key] ?? 0;
  const right = { ArrowRight: 1, ArrowLeft: -1 }[event.key] ?? 0;
  if (event.key === "Enter") selectRow(view.row);
  else if (!down && !right) return;
  event.preventDefault();
  const row = Math.max(0, Math.min(map.T - 1, view.row + down));
  const column = view.column ?? (right ? row + (right < 0 ? 1 : 0) : null);
  showRow(row, column === null ? null : Math.max(0, Math.min(row, column + right)));
}

/** The name of token t of the map. */
function nameInMap(t) {
  return visible(state.vocabulary[view.map.tokens[t]?.id] ?? "");
}

function makeStrip() {
  const spans = view.map.tokens.map((token, t) => {
    const span = element("span", { className: "token", tabIndex: t ? -1 : 0, role: "button" }, token?.piece ?? "");
    span.dataset.t = t;
    span.setAttribute("aria-label", nameInMap(t));
    if (token?.piece.startsWith("\n")) span.classList.add("line");
    else if (!token?.piece) span.classList.add("empty");
    return span;
  });
  byId("strip").replaceChildren(...spans);
}

/** Say what a token reads, and shade the text by it. row: from 0, in the map. column: of the cell that is pointed at. */
function showRow(row, column = null) {
  const { map } = view;
  if (!map || !(row >= 0 && row < map.T)) return;
  const p = map.p.subarray(row * map.T, row * map.T + row + 1);
  const name = (t) => `${nameInMap(t)} (${map.start + t})`;
  const order = Array.from(p.keys()).sort((a, b) => p[b] - p[a]);
  const strongest = order.slice(0, 4).map((t) => `${name(t)} ${percent(p[t])}`);
  const cell = column !== null && column <= row ? `; here ${name(column)} ${percent(p[column])}` : "";
  byId("map-about").textContent = `Token ${name(row)} reads ${strongest.join(", ")}${cell}.`;
  view.column = column;
  if (row === view.row && view.shown === map) return;
  Object.assign(view, { row, shown: map });
  [...byId("strip").children].forEach((span, t) => {
    span.style.setProperty("--heat", t <= row ? (HEAT * Math.sqrt(p[t])).toFixed(0) : "0");
    span.classList.toggle("selected", t === row);
  });
}

function rowAt({ offsetY, target }) {
  return view.map ? Math.max(0, Math.min(view.map.T - 1, Math.floor((offsetY / target.clientHeight) * view.map.T))) : 0;
}

function columnAt({ offsetX, target }) {
  return view.map ? Math.floor((offsetX / target.clientWidth) * view.map.T) : 0;
}

function fileName(ending) {
  const { model, layer, head } = view.map;
  const which = state.models.length > 1 ? `${state.models[model].name.replace(/[^\p{L}\p{N}]+/gu, "-")}-` : "";
  return `attention-${which}layer-${layer}-head-${head}.${ending}`;
}

function save(blob, name) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function savePng() {
  const scale = Math.max(1, Math.round(MAP_PIXELS / view.map.T));
  const canvas = element("canvas", { width: scale * view.map.T, height: scale * view.map.T });
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(byId("map"), 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) => save(blob, fileName("png")));
}

/** The map as an SVG file: a square for each share of at least SVG_LEAST, with the two tokens as its title. */
function saveSvg() {
  const { T, p } = view.map;
  const make = (tag, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const svg = make("svg", {
    viewBox: `0 0 ${T} ${T}`,
    width: MAP_PIXELS,
    height: MAP_PIXELS,
    "shape-rendering": "crispEdges",
  });
  svg.append(make("rect", { width: T, height: T, fill: "#f2f4f8" }));
  for (let row = 0; row < T; row++) {
    for (let column = 0; column <= row; column++) {
      const share = p[row * T + column];
      if (share < SVG_LEAST) continue;
      const opacity = Math.sqrt(share).toFixed(2);
      const cell = make("rect", { x: column, y: row, width: 1, height: 1, fill: "#123c8c", "fill-opacity": opacity });
      if (T <= 256) {
        const title = make("title", {});
        title.textContent = `${nameInMap(row)} reads ${nameInMap(column)}, ${percent(share)}`;
        cell.append(title);
      }
      svg.append(cell);
    }
  }
  save(new Blob([new XMLSerializer().serializeToString(svg)], { type: "image/svg+xml" }), fileName("svg"));
}

// A token: prediction by layer, neighbours --------------------------------------------------------------------------------

/** Lens and neighbours of the selected token, or the last. */
async function showToken() {
  if (!state.T || state.isBusy) return;
  const i = inContext(state.selected);
  if (isCurrent(i - view.map?.start)) showRow(i - view.map.start);
  const model = view.model;
  try {
    showLens(await ask({ kind: "lens", model, i }));
    showNeighbours(await ask({ kind: "neighbours", model, i }));
  } catch {
    // the text has changed meanwhile, and asks anew
  }
}

function code(id) {
  return element("code", {}, visible(state.vocabulary[id]));
}

function cells(tag, ...contents) {
  return contents.map((content) => element(tag, {}, ...[content].flat()));
}

function showLens({ i, next, layers }) {
  const about =
    next === undefined ? "the next token, not written yet" : `${visible(state.vocabulary[next])}, which follows`;
  byId("lens-about").textContent =
    `Read at token ${i}, ${visible(state.vocabulary[tokenAt(i)?.id] ?? "")}: the residual stream after each layer, put through the final LayerNorm and the output head; what it would predict in place of ${about}. |x|: the length of the residual stream; |attn|, |mlp|: of what attention and MLP add.`;
  const head = ["after", "most likely", "second", "third", "fourth", "fifth"];
  if (next !== undefined) head.push("what follows");
  head.push("|x|", "|attn|", "|mlp|");
  const rows = layers.map(({ top, next: p, norm, written }, layer) => {
    const row = element("tr", {}, element("th", { scope: "row" }, layer ? `layer ${layer - 1}` : "embedding"));
    for (const [id, share] of top) {
      const cell = element("td", {}, code(id), element("small", {}, ` ${percent(share)}`));
      cell.style.setProperty("--heat", (HEAT * share).toFixed(0));
      row.append(cell);
    }
    const lengths = [norm, ...(written ?? [])].map((length) => length.toPrecision(3));
    row.append(...cells("td", ...(p === null ? [] : [percent(p)]), ...lengths, ...(written ? [] : ["", ""])));
    return row;
  });
  byId("lens").replaceChildren(
    element("thead", {}, element("tr", {}, ...cells("th", ...head))),
    element("tbody", {}, ...rows),
  );
}

function showNeighbours({ i, tokens, positions, position }) {
  byId("neighbours-about").textContent =
    `Of token ${i}, ${visible(state.vocabulary[tokenAt(i)?.id] ?? "")}, at position ${position}: the embeddings that point most in the same direction, by the cosine of the angle.`;
  const row = (title, found, show) => {
    const items = found.map(([at, cosine]) => [show(at), element("small", {}, cosine.toFixed(2))]);
    return element("tr", {}, element("th", { scope: "row" }, title), ...cells("td", ...items));
  };
  byId("neighbours").replaceChildren(
    element("tbody", {}, row("token", tokens, code), row("position", positions, String)),
  );
}
