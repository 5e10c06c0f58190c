// GPT-2's forward pass, for one new token at a time, in the letters and names of model/gpt.py:
//
//   x = wte[id] + wpe[t]
//   x = x + attn(ln_1(x))           n_layer times
//   x = x + mlp(ln_2(x))
//   logits = ln_f(x) @ wte.T
//
// C: n_embd, H: heads, D: head size, V: vocabulary, N: n_positions, T: tokens read so far, L: layers.
// Activations are float64; weights are float32 (stored as float16) or int8 with a float32 scale for each row.
"use strict";

/** The tensors of a safetensors file, by name, and its metadata. float16 is widened to float32. */
function readTensors(buffer) {
  const size = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
  const { __metadata__: metadata, ...entries } = header;
  const tensors = new Map();
  for (const [name, { dtype, shape, data_offsets }] of Object.entries(entries)) {
    const [start, end] = data_offsets.map((offset) => 8 + size + offset);
    const n = shape.reduce((a, b) => a * b, 1);
    let data;
    if (dtype === "F32") data = new Float32Array(buffer, start, n);
    else if (dtype === "I8") data = new Int8Array(buffer, start, n);
    else data = widen(new Uint16Array(buffer, start, (end - start) / 2));
    tensors.set(name, data);
  }
  return { tensors, metadata };
}

/** float16, as its bits, to float32. */
function widen(bits) {
  const values = new Float32Array(1 << 16);
  for (let b = 0; b < values.length; b++) {
    const exponent = (b >> 10) & 31;
    const mantissa = b & 1023;
    // Weights that are infinite or NaN are refused when the page is written.
    const magnitude = exponent === 0 ? mantissa * 2 ** -24 : (1 + mantissa / 1024) * 2 ** (exponent - 15);
    values[b] = b & 0x8000 ? -magnitude : magnitude;
  }
  const widened = new Float32Array(bits.length);
  for (let i = 0; i < bits.length; i++) widened[i] = values[bits[i]];
  return widened;
}

/** y = W x + b.  W: (n_out, n_in) by rows, scale: (n_out) of int8 or null, b: (n_out) or null. */
class Linear {
  constructor(weight, scale, bias, n_in) {
    this.weight = weight;
    this.scale = scale;
    this.bias = bias;
    this.n_in = n_in;
    this.n_out = weight.length / n_in;
    this.measured = null; // `lengths`, once they were asked for
  }

  /** x: (n_in) -> y: (n_out), Float64Array both. */
  forward(x, y = new Float64Array(this.n_out)) {
    const { weight, scale, bias, n_in, n_out } = this;
    let n = 0;
    // Eight rows at a time: x is read once for them, and their sums do not wait for one another.
    for (; n + 8 <= n_out; n += 8) {
      const i0 = n * n_in;
      const i1 = i0 + n_in;
      const i2 = i1 + n_in;
      const i3 = i2 + n_in;
      const i4 = i3 + n_in;
      const i5 = i4 + n_in;
      const i6 = i5 + n_in;
      const i7 = i6 + n_in;
      let s0 = 0;
      let s1 = 0;
      let s2 = 0;
      let s3 = 0;
      let s4 = 0;
      let s5 = 0;
      let s6 = 0;
      let s7 = 0;
      for (let k = 0; k < n_in; k++) {
        const value = x[k];
        s0 += weight[i0 + k] * value;
        s1 += weight[i1 + k] * value;
        s2 += weight[i2 + k] * value;
        s3 += weight[i3 + k] * value;
        s4 += weight[i4 + k] * value;
        s5 += weight[i5 + k] * value;
        s6 += weight[i6 + k] * value;
        s7 += weight[i7 + k] * value;
      }
      y[n] = s0;
      y[n + 1] = s1;
      y[n + 2] = s2;
      y[n + 3] = s3;
      y[n + 4] = s4;
      y[n + 5] = s5;
      y[n + 6] = s6;
      y[n + 7] = s7;
    }
    for (; n < n_out; n++) {
      let sum = 0;
      for (let k = 0; k < n_in; k++) sum += weight[n * n_in + k] * x[k];
      y[n] = sum;
    }
    if (scale) for (n = 0; n < n_out; n++) y[n] *= scale[n];
    if (bias) for (n = 0; n < n_out; n++) y[n] += bias[n];
    return y;
  }

  /** The length of every row of W: (n_out). */
  lengths() {
    if (this.measured) return this.measured;
    const { weight, scale, n_in, n_out } = this;
    const y = new Float64Array(n_out);
    for (let n = 0; n < n_out; n++) {
      for (let i = n * n_in; i < (n + 1) * n_in; i++) y[n] += weight[i] * weight[i];
      y[n] = Math.sqrt(y[n]) * (scale ? scale[n] : 1);
    }
    this.measured = y;
    return y;
  }

  /** Row n of W as an embedding: (n_in). */
  row(n) {
    const scale = this.scale ? this.scale[n] : 1;
    return Float64Array.from(this.weight.subarray(n * this.n_in, (n + 1) * this.n_in), (w) => w * scale);
  }
}

/** y = (x - mean) / sqrt(variance + epsilon) * weight + bias */
class LayerNorm {
  constructor(weight, bias, epsilon) {
    this.weight = weight;
    this.bias = bias;
    this.epsilon = epsilon;
  }

  forward(x) {
    const C = x.length;
    let mean = 0;
    for (const value of x) mean += value / C;
    let variance = 0;
    for (const value of x) variance += (value - mean) ** 2 / C;
    const rstd = 1 / Math.sqrt(variance + this.epsilon);
    return x.map((value, c) => (value - mean) * rstd * this.weight[c] + (this.bias ? this.bias[c] : 0));
  }
}

/** GELU by its tanh approximation, which GPT-2 was trained with. */
function geluTanh(h) {
  return 0.5 * h * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (h + 0.044715 * h ** 3)));
}

/** GELU by the error function (Abramowitz and Stegun 7.1.26, error below 2e-7). */
function geluErf(h) {
  const u = Math.abs(h) / Math.SQRT2;
  const t = 1 / (1 + 0.3275911 * u);
  const series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  const erf = 1 - series * Math.exp(-u * u);
  return 0.5 * h * (1 + Math.sign(h) * erf);
}

/** The weights of a model. find: the tensor of a name, or null. */
class GPT {
  constructor(config, find) {
    const { n_embd: C, layer_norm_epsilon: epsilon } = config;
    const linear = (name, n_in) => {
      return new Linear(find(`${name}.weight`), find(`${name}.weight.scale`), find(`${name}.bias`), n_in);
    };
    const norm = (name) => new LayerNorm(find(`${name}.weight`), find(`${name}.bias`), epsilon);
    this.config = config;
    this.gelu = config.activation_function === "gelu_new" ? geluTanh : geluErf;
    this.wte = linear("transformer.wte", C);
    this.wpe = linear("transformer.wpe", C);
    this.h = Array.from({ length: config.n_layer }, (_, layer) => ({
      ln_1: norm(`transformer.h.${layer}.ln_1`),
      c_attn: linear(`transformer.h.${layer}.attn.c_attn`, C),
      attn_c_proj: linear(`transformer.h.${layer}.attn.c_proj`, C),
      ln_2: norm(`transformer.h.${layer}.ln_2`),
      c_fc: linear(`transformer.h.${layer}.mlp.c_fc`, C),
      mlp_c_proj: linear(`transformer.h.${layer}.mlp.c_proj`, 4 * C),
    }));
    this.ln_f = norm("transformer.ln_f");
  }

  /** A state of the residual stream, (C) -> logits, (V). */
  logits(x) {
    return this.wte.forward(this.ln_f.forward(x));
  }
}

/** What a model has read: keys and values, and what there is to look at. */
class Reading {
  constructor(model) {
    const { n_positions: N, n_embd: C, n_layer: L } = model.config;
    this.model = model;
    this.T = 0;
    const perLayer = () => Array.from({ length: L }, () => new Float32Array(N * C));
    this.q = perLayer();
    this.k = perLayer();
    this.v = perLayer();
    this.stream = [new Float32Array(N * C), ...perLayer()]; // x after the embedding, and after each layer
    this.written = Array.from({ length: L }, () => new Float32Array(N * 2)); // norms of what attn and mlp add to x
    this.scores = new Float64Array(N); // of one token, overwritten by the next
  }

  /** Read one more token -> its state after the last layer, (C). */
  read(id) {
    const { model } = this;
    const C = model.config.n_embd;
    const t = this.T++;
    const position = model.wpe.row(t);
    const x = model.wte.row(id).map((value, c) => value + position[c]);
    this.stream[0].set(x, t * C);
    model.h.forEach((block, layer) => {
      this.written[layer][2 * t] = add(x, this.attention(block, layer, t, block.ln_1.forward(x)));
      this.written[layer][2 * t + 1] = add(x, mlp(block, block.ln_2.forward(x), model.gelu));
      this.stream[layer + 1].set(x, t * C);
    });
    return x;
  }

  /** Read one more token -> the logits of the next, (V). */
  forward(id) {
    return this.model.logits(this.read(id));
  }

  /** Attention of token t, whose normalised residual stream is x, to itself and the tokens before: (C) -> (C). */
  attention(block, layer, t, x) {
    const { n_embd: C, n_head: H } = this.model.config;
    const D = C / H;
    const qkv = block.c_attn.forward(x);
    this.q[layer].set(qkv.subarray(0, C), t * C);
    this.k[layer].set(qkv.subarray(C, 2 * C), t * C);
    this.v[layer].set(qkv.subarray(2 * C), t * C);
    const v = this.v[layer];
    const o = new Float64Array(C);
    for (let head = 0; head < H; head++) {
      const p = this.probabilities(layer, head, t);
      for (let j = 0; j <= t; j++) {
        const share = p[j];
        const from = j * C + head * D;
        for (let d = 0; d < D; d++) o[head * D + d] += share * v[from + d];
      }
    }
    return block.attn_c_proj.forward(o);
  }

  /** How much token t reads from each of the tokens 0 .. t: softmax(q k / sqrt(D)), (t + 1), until the next call. */
  probabilities(layer, head, t) {
    const { n_embd: C, n_head: H } = this.model.config;
    const D = C / H;
    const q = this.q[layer].subarray(t * C + head * D, t * C + (head + 1) * D);
    const k = this.k[layer];
    const scores = this.scores.subarray(0, t + 1);
    for (let j = 0; j <= t; j++) {
      const from = j * C + head * D;
      let score = 0;
      for (let d = 0; d < D; d++) score += q[d] * k[from + d];
      scores[j] = score / Math.sqrt(D);
    }
    return softmax(scores);
  }

  /** The whole map of a head: (T, T), row t is what token t reads. */
  map(layer, head) {
    const p = new Float32Array(this.T * this.T);
    for (let t = 0; t < this.T; t++) p.set(this.probabilities(layer, head, t), t * this.T);
    return p;
  }

  /**
   * A map in at most `size` by `size` cells: every few tokens what one reads, summed over the tokens of a cell.
   * reads: how much these tokens read of the one before, themselves and the first, on average, from the third token on;
   * null for a shorter text.
   */
  tile(layer, head, size) {
    const n = Math.min(this.T, size);
    const cells = new Float32Array(n * n);
    const reads = { previous: 0, same: 0, first: 0 };
    let counted = 0;
    for (let row = 0; row < n; row++) {
      const t = Math.floor(((row + 1) * this.T) / n) - 1;
      const p = this.probabilities(layer, head, t);
      for (let j = 0; j <= t; j++) cells[row * n + Math.floor((j * n) / this.T)] += p[j];
      if (t < 2) continue;
      counted++;
      reads.previous += p[t - 1];
      reads.same += p[t];
      reads.first += p[0];
    }
    for (const what of Object.keys(reads)) reads[what] /= counted;
    return { cells, reads: counted ? reads : null };
  }

  /** The residual stream of token t after the embedding (layer 0) or after a layer, (C). */
  state(layer, t) {
    const C = this.model.config.n_embd;
    return Float64Array.from(this.stream[layer].subarray(t * C, (t + 1) * C));
  }
}

function mlp(block, x, gelu) {
  return block.mlp_c_proj.forward(block.c_fc.forward(x).map(gelu));
}

/** x += y -> the norm of y. */
function add(x, y) {
  for (let c = 0; c < x.length; c++) x[c] += y[c];
  return norm(y);
}

function norm(x) {
  return Math.sqrt(x.reduce((sum, value) => sum + value * value, 0));
}

/** In place: scores become the probabilities. */
function softmax(scores) {
  let most = -Infinity;
  for (let i = 0; i < scores.length; i++) if (scores[i] > most) most = scores[i];
  let total = 0;
  for (let i = 0; i < scores.length; i++) total += scores[i] = Math.exp(scores[i] - most);
  for (let i = 0; i < scores.length; i++) scores[i] /= total;
  return scores;
}

/** The rows of an embedding that point most in the direction of row n: [[row, cosine], ...]. */
function neighbours(embedding, n, count) {
  const cosines = embedding.forward(embedding.row(n));
  const lengths = embedding.lengths();
  for (let i = 0; i < embedding.n_out; i++) cosines[i] /= lengths[i] * lengths[n] || 1;
  return topk(cosines, count + 1)
    .filter((i) => i !== n)
    .slice(0, count)
    .map((i) => [i, cosines[i]]);
}

/** The indices of the k largest values, largest first, of equal ones the first. */
function topk(values, k) {
  if (k > 256) {
    const order = Array.from(values.keys());
    return order.sort((a, b) => values[b] - values[a] || a - b).slice(0, k);
  }
  const best = [];
  let least = -Infinity;
  for (let i = 0; i < values.length; i++) {
    if (best.length === k && !(values[i] > least)) continue;
    let place = best.length;
    while (place > 0 && values[i] > values[best[place - 1]]) place--;
    best.splice(place, 0, i);
    if (best.length > k) best.pop();
    if (best.length === k) least = values[best[k - 1]];
  }
  return best;
}
