// Text to token ids and back, with the ids of model/tokenizer.py: one id a character, or byte pairs.
"use strict";

// How GPT-2 splits text before byte pairs are merged. JavaScript's \s is not Unicode's White_Space.
const WORDS = new RegExp(
  "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+" +
    "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+",
  "gu",
);
const REMEMBERED = 20_000; // words whose ids are kept,
const REMEMBERED_LENGTH = 64; // of at most so many characters

/** fields: the content of tokenizer.json. */
function makeTokenizer(fields) {
  return fields.name === "char" ? new CharTokenizer(fields.chars) : new BytePairTokenizer(fields.tokens);
}

/** One id per character, in code point order, and the end-of-text id after the last. */
class CharTokenizer {
  constructor(chars) {
    const alphabet = Array.from(chars);
    this.eotId = alphabet.length;
    this.ids = new Map(alphabet.map((char, id) => [char, id]));
    this.bytes = [...alphabet.map((char) => new TextEncoder().encode(char)), new Uint8Array()];
  }

  /** Error names the characters that have no id. */
  encode(text) {
    const chars = Array.from(text);
    const unknown = [...new Set(chars.filter((char) => !this.ids.has(char)))];
    if (unknown.length) {
      const some = unknown.slice(0, 5).map((char) => `${JSON.stringify(char)} (U+${codePoint(char)})`);
      const more = unknown.length > 5 ? ` and ${unknown.length - 5} more` : "";
      const known = `this model knows ${this.eotId} characters only`;
      throw new Error(`These characters are not among them: ${some.join(", ")}${more}; ${known}. Remove them.`);
    }
    return chars.map((char) => this.ids.get(char));
  }
}

function codePoint(char) {
  return char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
}

/** Byte-level BPE: any text has ids. The bytes of a token are the characters U+0000 to U+00FF of a string here. */
class BytePairTokenizer {
  /** tokens: in GPT-2's printable form, "Ġthe" for " the", by id; without the end of text. */
  constructor(tokens) {
    const byteOf = printableBytes();
    const raw = tokens.map((token) => Array.from(token, (char) => String.fromCharCode(byteOf.get(char))).join(""));
    this.ranks = new Map(raw.map((token, id) => [token, id]));
    this.eotId = tokens.length;
    this.bytes = [...raw.map((token) => Uint8Array.from(token, (char) => char.charCodeAt(0))), new Uint8Array()];
    this.known = new Map();
  }

  encode(text) {
    const ids = [];
    for (const [word] of text.matchAll(WORDS)) {
      let found = this.known.get(word);
      if (!found) {
        found = this.merge(Array.from(new TextEncoder().encode(word), (byte) => String.fromCharCode(byte)));
        if (this.known.size < REMEMBERED && word.length <= REMEMBERED_LENGTH) this.known.set(word, found);
      }
      for (const id of found) ids.push(id);
    }
    return ids;
  }

  /**
   * Merge the neighbours that make the token of lowest rank, the first of equal ones, until none make a token -> ids.
   * In B log B steps for a word of B bytes: a text without spaces is one word.
   */
  merge(parts) {
    const B = parts.length;
    const next = parts.map((_, i) => i + 1); // where the part after a part is
    const previous = parts.map((_, i) => i - 1);
    const rankAt = (i) => (next[i] < B ? this.ranks.get(parts[i] + parts[next[i]]) : undefined);
    const heap = new Heap(); // of rank * B + place
    const offer = (i) => {
      const rank = i < 0 ? undefined : rankAt(i);
      if (rank !== undefined) heap.push(rank * B + i);
    };
    for (let i = 0; i < B; i++) offer(i);
    while (heap.size) {
      const least = heap.pop();
      const i = least % B;
      if (parts[i] === null || rankAt(i) !== (least - i) / B) continue; // merged meanwhile
      const j = next[i];
      parts[i] += parts[j];
      parts[j] = null;
      next[i] = next[j];
      if (next[i] < B) previous[next[i]] = i;
      offer(previous[i]);
      offer(i);
    }
    return parts.filter((part) => part !== null).map((part) => this.ranks.get(part));
  }
}

/** Numbers, of which the least comes out first: a binary heap. */
class Heap {
  constructor() {
    this.values = [];
  }

  get size() {
    return this.values.length;
  }

  push(value) {
    const { values } = this;
    let i = values.length;
    for (let up = (i - 1) >> 1; i > 0 && values[up] > value; up = (i - 1) >> 1) {
      values[i] = values[up];
      i = up;
    }
    values[i] = value;
  }

  pop() {
    const { values } = this;
    const least = values[0];
    const last = values.pop();
    const n = values.length;
    let i = 0;
    for (let down = 1; down < n; down = 2 * i + 1) {
      if (down + 1 < n && values[down + 1] < values[down]) down++;
      if (values[down] >= last) break;
      values[i] = values[down];
      i = down;
    }
    if (n) values[i] = last;
    return least;
  }
}

/** GPT-2's printable form of the bytes: visible in Latin-1, or a character from U+0100 on -> byte by character. */
function printableBytes() {
  const isVisible = (byte) => (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte !== 0xad);
  const byteOf = new Map();
  let hidden = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    byteOf.set(String.fromCharCode(isVisible(byte) ? byte : hidden++), byte);
  }
  return byteOf;
}

/** The text of ids, a piece for each: a character whose bytes are several ids is in the last of their pieces. */
class TextStream {
  constructor(tokenizer) {
    this.tokenizer = tokenizer;
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  }

  feed(id) {
    return this.decoder.decode(this.tokenizer.bytes[id], { stream: true });
  }
}

/** A token on its own, for lists: its text, or its bytes if they are a part of a character. */
function showToken(tokenizer, id) {
  if (id === tokenizer.eotId) return "⟨end-of-text⟩";
  const bytes = tokenizer.bytes[id];
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return Array.from(bytes, (byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
  }
}
