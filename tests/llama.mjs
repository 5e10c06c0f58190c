// What llama.cpp makes of a GGUF file, through node-llama-cpp:  node tests/llama.mjs FOLDER < question > answer
// FOLDER: where npm installed it. question: {file, texts, prompts, tokens, context}, prompts as ids.
// answer: {ids, texts, greedy}: of each text its ids and their text again, of each prompt the ids that follow it, up to
// an end of text.
import fs from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const entry = path.resolve(process.argv[2], "node_modules/node-llama-cpp/dist/index.js");
const {getLlama} = await import(pathToFileURL(entry));
const {file, texts, prompts, tokens, context: contextSize} = JSON.parse(fs.readFileSync(0, "utf8"));

// The prebuilt library on one core, whose threads would spin while they wait; nothing is downloaded or compiled.
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath: file});
// Keys and values in float32 (type 0), where llama.cpp's default is float16, and so is its flash attention.
const exact = {experimentalKvCacheKeyType: 0, experimentalKvCacheValueType: 0, flashAttention: false};
const context = await model.createContext({contextSize, threads: 1, ...exact});
const sequence = context.getSequence();
const ids = texts.map((text) => model.tokenize(text));
const greedy = [];
for (const prompt of prompts) {
  await sequence.clearHistory();
  const found = [];
  for await (const id of sequence.evaluate(prompt, {temperature: 0})) {
    if (found.push(id) === tokens) break;
  }
  greedy.push(found);
}
console.log(JSON.stringify({ids, texts: ids.map((some) => model.detokenize(some)), greedy}));
await llama.dispose();
