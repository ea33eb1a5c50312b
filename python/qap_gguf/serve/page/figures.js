// figures.js: what two answers took, side by side, from what the server told of each.
//
// The kept tokens are asked first: their encode also notes the attention, so that all others take the picture from the
// server's cache, and what a first request costs besides is not laid at the other's door. An encode that was saved is
// counted on its side too, as measured when the picture came first: the times to the first token differ by the prefill.

const seconds = (ms) => (ms < 10 ? `${ms.toFixed(1)} ms` : ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`);
const MIN_TOKENS = 8; // a rate of fewer says nothing
const count = (n) => n.toLocaleString("en");

export const isCached = (told) => told.prune.n_cached >= told.prune.images.length;
export const total = (rows, name) => rows.reduce((sum, row) => sum + row[name], 0);

// encoded: the encoder's time when the server last encoded this picture for this page, or null.
function measure(told, encoded) {
  const encode = isCached(told) ? (encoded ?? told.prune.encode_ms) : told.prune.encode_ms;
  const prefill = Math.max(0, told.timings.prompt_ms - told.prune.encode_ms);
  return {
    tokens: total(told.prune.images, "n_kept"),
    cells: told.usage.prompt_tokens,
    encode,
    prefill,
    first: encode + prefill,
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

function why(dense, pruned, encoded) {
  if (!isCached(dense)) return "Each answer encoded the picture itself, the one from the kept tokens with scores and selection.";
  if (!isCached(pruned)) {
    return "The picture was encoded once, scores and selection included; that time stands on both sides.";
  }
  const now = `kept: ${seconds(pruned.prune.encode_ms)} with scores and selection`;
  if (encoded === null) return `The server had encoded this picture before: it came from the cache (${now}).`;
  return `The encoder's time is that of when the picture came first. Now it came from the server's cache (${now}).`;
}

// Fill the table; returns {dense, pruned} as numbers. encoded: as for measure(); others: requests of others meanwhile.
export function tell(table, fine, runs, encoded, others) {
  const [dense, pruned] = [runs.dense.told, runs.pruned.told];
  const found = { dense: measure(dense, encoded), pruned: measure(pruned, encoded) };
  const body = table.tBodies[0];
  body.replaceChildren();
  const fromCache = encoded === null && isCached(dense) && isCached(pruned);
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
  fine.textContent = `One answer after the other, times by the server. ${why(dense, pruned, encoded)}${shared}`;
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
