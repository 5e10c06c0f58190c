// The page's worker: it holds the models and the text, and answers the page's messages. A message names a kind and gets
// answers of the kinds that are posted here.
"use strict";

const PAUSE_MS = 12; // of work between two looks at the messages that have arrived
const UNDRAWN = 8; // messages with tokens that the page may be behind
const ALTERNATIVES = 10; // tokens that are listed for each place
const LENS = 5; // tokens of a layer's prediction
const NEIGHBOURS = 8;
const TILE = 64; // cells of a side

class Cancelled extends Error {}

let tokenizer;
let models = [];
let text;
let job = 0; // the newest reading or writing; an older one ends at its next pause
let tilesJob = 0; // likewise; reading and writing end them
let lensJob = 0;
let running = Promise.resolve();
let undrawn = 0;
let wake = () => {}; // what waits for the page to draw

/**
 * A text as every model reads it. start: the first token that is still in the models' context of N tokens; T: how many
 * from there they have read. Where reading was stopped, `ahead` is empty and both are what they happened to be.
 */
class Text {
  constructor() {
    this.readings = models.map(({ gpt }) => new Reading(gpt));
    this.N = Math.min(...models.map(({ gpt }) => gpt.config.n_positions));
    this.half = Math.max(1, Math.floor(this.N / 2));
    this.ids = [];
    this.start = 0;
    this.ahead = []; // for each model what may come next; empty where it has not read to the end
  }

  get T() {
    return this.readings[0].T;
  }

  /**
   * Where the context of a text of n tokens starts. Positions are learned, so the context cannot slide: each time it is
   * full it begins anew with its last half (model/generate.py). It depends on n alone, whatever was read before.
   */
  startOf(n) {
    const step = this.N + 1 - this.half;
    return Math.max(0, Math.ceil((n - this.N) / step)) * step;
  }

  /** Go back to the first n tokens. */
  async keep(n, pause) {
    this.ids.length = n;
    if (n !== this.start + this.T || !this.ahead.length) await this.read(n, pause);
  }

  /** Add a token -> for each model its log-probability and what was likely there; null for the first. */
  async push(id, pause) {
    const rows = this.ids.length
      ? this.ahead.map(({ logits, logSum, top }) => ({ logprob: logits[id] - logSum, top }))
      : null;
    this.ids.push(id);
    try {
      await this.read(this.ids.length - 1, pause);
    } catch (error) {
      this.ids.pop();
      throw error;
    }
    return rows;
  }

  /** Read to the end of the text. known: how many of its first tokens are those that were there before. */
  async read(known, pause) {
    const n = this.ids.length;
    const start = this.startOf(n);
    const end = start === this.start ? Math.min(known, start + this.T) : start; // of what need not be read again
    const first = Math.max(start, Math.min(end, n - 1)); // the last one again, for what comes next
    Object.assign(this, { start, ahead: [] });
    for (const reading of this.readings) reading.T = first - start;
    let states = [];
    for (let i = first; i < n; i++) {
      await pause(i - first, n - first);
      states = this.readings.map((reading) => reading.read(this.ids[i]));
    }
    this.ahead = states.map((x, m) => forecast(this.readings[m].model.logits(x)));
  }
}

/** logits: (V) -> the logarithm of the sum of their exponentials, and the most likely tokens. */
function forecast(logits) {
  const [best] = topk(logits, 1);
  const logSum = best === undefined ? NaN : logits[best] + Math.log(sumExp(logits, logits[best]));
  if (!Number.isFinite(logSum)) throw new Error("The model's logits are not numbers: its weights are damaged.");
  const top = topk(logits, ALTERNATIVES).map((id) => [id, Math.exp(logits[id] - logSum)]);
  return { logits, logSum, top };
}

function sumExp(logits, most) {
  let sum = 0;
  for (const logit of logits) sum += Math.exp(logit - most);
  return sum;
}

/** The next id, by the rules of model/sampling.py. u: uniform in [0, 1). */
function draw(logits, { temperature, topK, topP }, u) {
  if (temperature === 0) return topk(logits, 1)[0];
  const isCut = topK > 0 && topK < logits.length;
  const ids = isCut || topP < 1 ? topk(logits, isCut ? topK : logits.length) : Array.from(logits.keys());
  const p = softmax(Float64Array.from(ids, (id) => logits[id] / Math.max(temperature, 1e-30)));
  let n = ids.length;
  if (topP < 1) {
    let before = 0;
    for (n = 0; n < ids.length && before < topP; n++) before += p[n];
  }
  const total = p.subarray(0, n).reduce((a, b) => a + b, 0);
  let sum = 0;
  for (let i = 0; i < n; i++) {
    sum += p[i];
    if (sum > u * total) return ids[i];
  }
  return ids[n - 1];
}

/** A number in [0, 1) for place i of a text: the same for the same seed. (MurmurHash3's last step, twice.) */
function uniform(seed, i) {
  const mix = (h) => {
    h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
    h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
    return (h ^ (h >>> 16)) >>> 0;
  };
  const high = mix(mix(seed + 0x9e3779b9) ^ Math.imul(i + 1, 0x9e3779b1));
  const low = mix(high ^ 0x7f4a7c15);
  return (high * 2 ** 21 + (low >>> 11)) / 2 ** 53;
}

/** Let the messages that have arrived be handled. A timer would wait for 4 ms. */
const channel = new MessageChannel();
const resting = [];
channel.port1.onmessage = () => resting.shift()();
function breathe() {
  return new Promise((resolve) => {
    resting.push(resolve);
    channel.port2.postMessage(null);
  });
}

/** Read a prompt, or the text up to a token and then `next`, and write `tokens` more. */
async function write({ prompt, keep, next, tokens, settings, writer, shown, number }, mine) {
  let last = performance.now();
  let batch = [];
  const flush = () => {
    if (!batch.length) return;
    postMessage({ kind: "tokens", tokens: batch, start: text.start });
    batch = [];
    undrawn++;
  };
  const pause = async (done = 0, of = 1) => {
    if (performance.now() - last >= PAUSE_MS) {
      flush();
      if (of > 1) postMessage({ kind: "reading", done, of });
      await breathe();
      while (undrawn > UNDRAWN && mine === job) await new Promise((resolve) => (wake = resolve));
      last = performance.now();
    }
    if (mine !== job) throw new Cancelled();
  };
  let ending = "";
  let isError = false;
  let written = 0;
  let began = performance.now();
  try {
    if (keep > text.ids.length) throw new Error("The text has changed meanwhile: choose again.");
    const ids = prompt === undefined ? [...text.ids.slice(0, keep), ...next] : encode(prompt);
    const common = shared(ids, text.ids);
    const n = common < shown ? 0 : common; // the page does not have the tokens before `shown`
    postMessage({ kind: "kept", n });
    await text.keep(n, pause);
    const stream = new TextStream(tokenizer);
    for (const id of text.ids.slice(-8)) stream.feed(id); // a character may have begun there
    const push = async (id) => {
      const i = text.ids.length;
      const rows = await text.push(id, pause);
      batch.push({ i, id, piece: stream.feed(id), rows });
    };
    for (const id of ids.slice(n)) await push(id);
    began = performance.now();
    for (; written < tokens; written++) {
      await pause();
      const id = draw(text.ahead[writer].logits, settings, uniform(settings.seed, text.ids.length));
      if (id === tokenizer.eotId) {
        ending = "The model ended the text here; to continue it, choose another next token.";
        break;
      }
      await push(id);
    }
  } catch (error) {
    isError = !(error instanceof Cancelled);
    ending = isError ? error.message : "Stopped.";
  }
  flush();
  postMessage({ kind: "kept", n: text.ids.length });
  const ahead = text.ahead.map(({ top }) => ({ top }));
  const seconds = (performance.now() - began) / 1000;
  postMessage({ kind: "done", ending, isError, written, seconds, start: text.start, T: text.T, ahead, number });
}

/** The ids of a prompt. Error for one that the model cannot read. */
function encode(prompt) {
  const ids = tokenizer.encode(prompt);
  if (ids.length > text.N) {
    const most = text.N.toLocaleString("en");
    throw new Error(
      `The text has ${ids.length.toLocaleString("en")} tokens, and this model reads at most ${most}: shorten it.`,
    );
  }
  return ids.length ? ids : [tokenizer.eotId];
}

/** How many ids two texts begin with alike. */
function shared(a, b) {
  let n = 0;
  while (n < a.length && n < b.length && a[n] === b[n]) n++;
  return n;
}

/** The maps of all heads, small, a layer a message. */
async function tiles({ model }, mine) {
  const reading = text.readings[model];
  for (const layer of reading.model.h.keys()) {
    const heads = [];
    for (let head = 0; head < reading.model.config.n_head; head++) {
      heads.push(reading.tile(layer, head, TILE));
      await breathe();
      if (mine !== tilesJob) return;
    }
    postMessage({ kind: "tiles", model, layer, heads });
  }
}

/** What the residual stream of a token would predict after each layer, and how long it is. */
async function lens({ model, i }, mine) {
  const reading = text.readings[model];
  const t = i - text.start;
  const next = text.ids[i + 1];
  const layers = [];
  for (const layer of reading.stream.keys()) {
    const x = reading.state(layer, t);
    const { logits, logSum, top } = forecast(reading.model.logits(x));
    const written = layer ? Array.from(reading.written[layer - 1].subarray(2 * t, 2 * t + 2)) : null;
    const p = next === undefined ? null : Math.exp(logits[next] - logSum);
    layers.push({ top: top.slice(0, LENS), next: p, norm: norm(x), written });
    await breathe();
    if (mine !== lensJob) throw new Error("Another token was chosen.");
  }
  postMessage({ kind: "lens", model, i, next, layers });
}

const handlers = {
  open({ buffer }) {
    const { tensors, metadata } = readTensors(buffer);
    const page = JSON.parse(metadata.page);
    tokenizer = makeTokenizer(page.tokenizer);
    models = page.models.map(({ name, config, shared }, m) => {
      const same = new Set(shared); // tensors that are those of the first model
      const find = (tensor) => tensors.get(`${same.has(tensor) ? 0 : m}.${tensor}`) ?? null;
      return { name, config, gpt: new GPT(config, find) };
    });
    text = new Text();
    const vocabulary = Array.from(tokenizer.bytes.keys(), (id) => showToken(tokenizer, id));
    postMessage({ kind: "opened", models: models.map(({ name, config }) => ({ name, config })), vocabulary });
  },
  write(message) {
    const mine = ++job;
    tilesJob++;
    lensJob++;
    wake();
    running = running.then(() => write(message, mine));
  },
  stop() {
    job++;
    wake();
  },
  /** The page has shown the tokens that it was sent. */
  drawn() {
    undrawn = 0;
    wake();
  },
  tiles: (message) => tiles(message, ++tilesJob),
  map({ model, layer, head }) {
    const reading = text.readings[model];
    const p = reading.map(layer, head);
    postMessage({ kind: "map", model, layer, head, T: reading.T, start: text.start, p }, [p.buffer]);
  },
  lens: (message) => lens(message, ++lensJob),
  neighbours({ model, i }) {
    const { wte, wpe } = models[model].gpt;
    const tokens = neighbours(wte, text.ids[i], NEIGHBOURS);
    const positions = neighbours(wpe, i - text.start, NEIGHBOURS);
    postMessage({ kind: "neighbours", model, i, tokens, positions, position: i - text.start });
  },
  /** For the tests: ids of a text, and all logits of some ids. */
  encode: ({ prompt }) => postMessage({ kind: "encode", ids: tokenizer.encode(prompt) }),
  logits({ model, ids }) {
    const reading = new Reading(models[model].gpt);
    postMessage({ kind: "logits", logits: ids.map((id) => Float64Array.from(reading.forward(id))) });
  },
};

addEventListener("message", async ({ data }) => {
  try {
    await handlers[data.kind](data);
  } catch (error) {
    postMessage({ kind: "failed", what: data.kind, reason: error.message });
  }
});
