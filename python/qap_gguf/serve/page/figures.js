// figures.js: what two answers took, side by side, from what the server told of each.
//
// What is compared is what was measured. The first time that a picture comes, both answers encode it: for all tokens
// llama-server notes no attention, so that the pruned answer encodes once more. Later both take it from the server's cache.
// An encoder's time goes into the time to the first token on both sides or on neither.

const seconds = (ms) => (ms < 10 ? `${ms.toFixed(1)} ms` : ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`);
const MIN_TOKENS = 8; // a rate of fewer says nothing
const count = (n) => n.toLocaleString("en");

export const isCached = (told) => told.prune.n_cached >= told.prune.images.length;
export const total = (rows, name) => rows.reduce((sum, row) => sum + row[name], 0);

// first: the encoder's time on a side when the server had not seen the picture, or null.
function measure(told, other, first, otherFirst) {
  const prefill = Math.max(0, told.timings.prompt_ms - told.prune.encode_ms);
  const known = first !== null && otherFirst !== null;
  const counted = known || (isCached(told) && isCached(other));
  const encode = known ? first : told.prune.encode_ms;
  return {
    tokens: total(told.prune.images, "n_kept"),
    cells: told.usage.prompt_tokens,
    encode: counted ? encode : null,
    prefill,
    first: prefill + (counted ? encode : 0),
    rate: told.timings.predicted_n >= MIN_TOKENS ? told.timings.predicted_per_second : null,
  };
}

const ROWS = [
  ["Image tokens", "tokens", count],
  ["KV cells of the prompt", "cells", count],
  ["Image encoder", "encode", seconds],
  ["Prefill", "prefill", seconds],
  ["First token after", "first", seconds],
  ["Tokens a second", "rate", (rate) => rate.toFixed(1)],
];
const BARS = ["tokens", "cells", "encode", "prefill", "first"]; // shorter is better

function why(dense, pruned, first) {
  const [now, then] = [seconds(dense.prune.encode_ms), seconds(pruned.prune.encode_ms)];
  const scores = "The encoder's time on the right includes scores and selection.";
  if (first.dense !== null && first.pruned !== null) {
    if (!isCached(dense) && !isCached(pruned)) return `Each answer encoded the picture itself. ${scores}`;
    const fresh = isCached(dense) ? `all ${now}, kept ${then}` : `kept ${then}`;
    return `Image encoder: as measured when the picture came first; now from the server's cache (${fresh}). ${scores}`;
  }
  if (isCached(dense) && isCached(pruned)) {
    return "The server had encoded this picture before: both took it from its cache. On the right with scores and selection.";
  }
  return "The server had encoded this picture before, for one of the answers: the encoder is not counted.";
}

// Fill the table; returns {dense, pruned} as numbers.
export function tell(table, fine, runs, first, others) {
  const [dense, pruned] = [runs.dense.told, runs.pruned.told];
  const found = {
    dense: measure(dense, pruned, first.dense, first.pruned),
    pruned: measure(pruned, dense, first.pruned, first.dense),
  };
  const body = table.tBodies[0];
  body.replaceChildren();
  const fromCache = isCached(dense) && isCached(pruned) && (first.dense === null || first.pruned === null);
  for (const [title, key, form] of ROWS) {
    const name = key === "encode" && fromCache ? "Image, from the cache" : title;
    const line = body.insertRow();
    line.append(Object.assign(document.createElement("th"), { scope: "row", textContent: name }));
    const most = Math.max(found.dense[key] ?? 0, found.pruned[key] ?? 0);
    for (const side of ["dense", "pruned"]) {
      const value = found[side][key];
      const cell = line.insertCell();
      cell.className = side;
      cell.append(Object.assign(document.createElement("span"), { textContent: value === null ? "–" : form(value) }));
      if (BARS.includes(key)) {
        const bar = document.createElement("i");
        bar.style.width = `${most > 0 ? (100 * (value ?? 0)) / most : 0}%`;
        cell.append(bar);
      }
    }
  }
  table.hidden = fine.hidden = false;
  const shared = others > 0 ? ` ${others} other request${others > 1 ? "s" : ""} shared the machine meanwhile.` : "";
  fine.textContent = `One answer after the other, times by the server. ${why(dense, pruned, first)}${shared}`;
  return found;
}

// The outcome in a sentence or two.
export function verdict(found, same) {
  const times = found.dense.first / found.pruned.first;
  const saved = 1 - found.pruned.cells / found.dense.cells;
  const speed =
    times >= 1.05 ? `First token ${times.toFixed(times < 10 ? 1 : 0)} times sooner`
    : times > 0.95 ? "First token about as soon"
    : `First token ${(1 / times).toFixed(1)} times later`;
  const memory = saved > 0 ? `${Math.round(100 * saved)}\u00a0% less KV cache` : "the same KV cache";
  return `${speed}, ${memory}. ${same ? "Both answers are the same." : "The answers differ."}`;
}

export { seconds };
