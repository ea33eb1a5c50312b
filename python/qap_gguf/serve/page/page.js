// page.js: the page's parts and what they do. server.js asks, picture.js draws, figures.js compares.
import { isCached, seconds, tell, total, verdict } from "./figures.js";
import { draw, drawable, find, gradient, range } from "./picture.js";
import { answer, call, othersNow, setKey, takePicture, Told } from "./server.js";

const MAX_TOKENS = 256;
const SAMPLE_QUESTION = "What is in row 2, column 4?";
const SETTLED_MS = 300; // K has not moved for so long
const part = (id) => document.getElementById(id);

const state = {
  settings: null,
  picture: null, // {blob, uri, width, height, note}
  asked: { keep_ratio: 0.25 }, // what is to be kept: n_keep or keep_ratio
  n: null, // tokens of the picture that can be kept, once an answer told
  rows: [], // of the last pruned answer
  runs: {}, // dense, pruned: {told, text, question}
  encoded: null, // ms of the encoder when it last encoded this picture for us
  running: null, // AbortController
};

// --- words ---

function showError(error) {
  if (error.name === "AbortError") return;
  part("error").textContent = error instanceof Told ? error.message : `The page failed: ${error.message}`;
  part("error").hidden = false;
  if (!(error instanceof Told)) console.error(error);
}

const clearError = () => (part("error").hidden = true);

const SCORES = {
  error: "Quantization error: what a token loses when its numbers are rounded to a few bits.",
  outlier: "Outliers: how far a token's numbers spread, which makes them hard to round.",
  semantic: "Relevance: the attention that a token gets inside the image encoder.",
};

function wordsOf(view, marked) {
  if (!state.rows.length) return "After the first answer you see here which patches were kept, and why.";
  if (!drawable(state.rows)) return "This model's tokens form no grid that could be shown.";
  const kept = `${marked} of ${state.n} patches kept`;
  const tiles = state.rows.length > 1 ? ` The model cut the picture into ${state.rows.length} pieces, shown in their order.` : "";
  if (view === "plain") return `The picture. ${kept}.`;
  if (view === "kept") return `${kept}, by ${state.settings.select}; the dark ones never reach the language model.${tiles}`;
  const limits = range(state.rows, view);
  if (!limits) return "This picture has more tokens than the server tells scores for.";
  const flat = limits[0] === limits[1] && view === "semantic" ? " This model gives no such signal." : "";
  const alpha = state.rows[0].alpha;
  const words = view === "total" ? `Total: ${alpha} × relevance + ${+(1 - alpha).toFixed(3)} × sensitivity to rounding.` : SCORES[view];
  return `${words}${flat} Outlined: kept.${tiles}`;
}

const number = (value) => String(+value.toPrecision(3));

function redraw() {
  const view = document.querySelector("input[name=view]:checked").value;
  const marked = draw(part("overlay"), state.rows, view);
  const words = wordsOf(view, view === "plain" ? total(state.rows, "n_kept") : marked);
  part("legend").textContent = words;
  part("overlay").setAttribute("aria-label", words);
  const limits = view in SCORES || view === "total" ? range(state.rows, view) : null;
  part("scale").hidden = !limits;
  if (limits) {
    part("low").textContent = Math.abs(limits[0]) < limits[1] / 1000 ? "0" : number(limits[0]);
    part("high").textContent = number(limits[1]);
  }
}

function showUnder(event) {
  if (!drawable(state.rows)) return;
  const box = part("overlay").getBoundingClientRect();
  const found = find(state.rows, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  if (!found) return;
  const { row, token, column, line } = found;
  const words = [`Line ${line + 1}, column ${column + 1}`, row.indices.includes(token) ? "kept" : "dropped"];
  for (const name of ["error", "outlier", "semantic", "total"]) {
    if (row.scores) words.push(`${name} ${number(row.scores[name][token])}`);
  }
  part("legend").textContent = row.padding?.includes(token) ? `${words[0]}: padding` : words.join(" · ");
}

// --- K ---

function showK() {
  const { n_keep: k, keep_ratio: ratio } = state.asked;
  const percent = (value) => `${value < 10 ? +value.toFixed(1) : Math.round(value)}\u00a0%`;
  const words =
    state.n !== null ? `${k} of ${state.n} tokens · ${percent((100 * k) / state.n)}`
    : k !== undefined ? `${k} tokens`
    : `${percent(100 * ratio)} of the tokens`;
  part("k-told").textContent = words;
  part("k").setAttribute("aria-valuetext", words);
}

function moveK() {
  const value = Number(part("k").value);
  state.asked = state.n !== null ? { n_keep: value } : { keep_ratio: value / 100 };
  showK();
}

// The slider counts tokens once it is known how many there are; before that it counts per cent.
function setN(n, kept) {
  const slider = part("k");
  if (n === null && state.n !== null) {
    state.asked = { keep_ratio: state.asked.n_keep / state.n };
    slider.max = 100;
    slider.value = Math.round(100 * state.asked.keep_ratio);
  } else if (n !== null) {
    state.asked = { n_keep: kept };
    slider.max = n;
    slider.value = kept;
  }
  state.n = n;
  showK();
}

// --- the picture ---

async function usePicture(file) {
  clearError();
  try {
    const picture = await takePicture(file, state.settings);
    stop();
    if (part("picture").src) URL.revokeObjectURL(part("picture").src);
    Object.assign(state, { picture, rows: [], runs: {}, encoded: null });
    setN(null);
    part("picture").src = URL.createObjectURL(picture.blob);
    part("note").textContent = picture.note;
    part("note").hidden = !picture.note;
    part("empty").hidden = true;
    part("stage").hidden = false;
    part("views").disabled = true;
    for (const side of ["dense", "pruned"]) clearCard(side);
    part("verdict").hidden = part("figures").hidden = part("fine").hidden = true;
    fitStage();
    part("question").focus({ preventScroll: true });
  } catch (error) {
    showError(error);
  }
}

// The stage has the shape of what the model saw, and the picture lies on it where the model saw it.
function fitStage() {
  const told = state.rows.length === 1 && state.rows[0].content;
  const [columns, lines] = told ? state.rows[0].grid : [1, 1];
  const [left, top, width, height] = told || [0, 0, 1, 1];
  const aspect = (state.picture.width / state.picture.height) * (height / lines / (width / columns));
  part("stage").style.setProperty("--aspect", aspect);
  const sides = { left: left / columns, top: top / lines, width: width / columns, height: height / lines };
  for (const [side, share] of Object.entries(sides)) part("picture").style[side] = `${100 * share}%`;
  redraw();
}

// --- answers ---

function clearCard(side) {
  const card = part(side);
  card.className = `answer ${side}`;
  card.querySelector(".text").textContent = "";
  card.querySelector(".first").textContent = "";
  part(`${side}-title`).textContent = side === "dense" ? "All tokens" : "Kept tokens";
}

async function run(side, question, signal) {
  clearCard(side);
  delete state.runs[side];
  const card = part(side);
  const [text, first] = [card.querySelector(".text"), card.querySelector(".first")];
  const begun = performance.now();
  const clock = setInterval(() => (first.textContent = seconds(performance.now() - begun)), 100);
  card.classList.add("busy");
  try {
    const told = await answer({
      uri: state.picture.uri,
      question,
      prune: side === "dense" ? null : { ...state.asked, indices: true, scores: true },
      maxTokens: Math.min(MAX_TOKENS, state.settings.max_tokens ?? MAX_TOKENS),
      signal,
      onText: (piece) => (text.textContent += piece),
      askForKey,
    });
    if (!text.textContent) text.textContent = "(no words)";
    state.runs[side] = { told, text: text.textContent, question };
    if (!isCached(told)) state.encoded = told.prune.encode_ms;
    return told;
  } finally {
    clearInterval(clock);
    first.textContent = "";
    card.classList.remove("busy");
  }
}

function learn(side, told) {
  const n = total(told.prune.images, "n_tokens");
  if (side === "dense") {
    part("dense-title").textContent = `All ${n} tokens`;
    return;
  }
  const padding = told.prune.images.reduce((sum, row) => sum + (row.padding?.length ?? 0), 0);
  state.rows = told.prune.images;
  const kept = total(state.rows, "n_kept");
  setN(n - padding, kept);
  part("pruned-title").textContent = `${kept} tokens kept`;
  part("views").disabled = !drawable(state.rows);
  fitStage();
}

async function ask(sides, question) {
  clearError();
  stop();
  const controller = new AbortController();
  state.running = controller;
  part("go").textContent = "Stop";
  part("verdict").hidden = part("figures").hidden = part("fine").hidden = true;
  try {
    const others = await othersNow();
    for (const side of sides) {
      part("running").textContent = side === "dense" ? "Answering from all tokens …" : "Answering from the kept tokens …";
      learn(side, await run(side, question, controller.signal));
    }
    const { dense, pruned } = state.runs;
    if (dense?.question === pruned?.question) {
      const found = tell(part("figures"), part("fine"), state.runs, state.encoded, others);
      part("verdict").textContent = verdict(found, dense.text.trim() === pruned.text.trim());
      part("verdict").hidden = false;
      for (const side of ["dense", "pruned"]) part(side).querySelector(".first").textContent = `first token after ${seconds(found[side].first)}`;
    }
  } catch (error) {
    showError(error);
  } finally {
    if (state.running === controller) stop();
  }
}

function stop() {
  state.running?.abort();
  state.running = null;
  part("go").textContent = "Ask";
  part("running").textContent = "";
}

function submit(event) {
  event.preventDefault();
  if (state.running) {
    stop();
    part("running").textContent = "Stopped.";
    return;
  }
  const question = part("question").value.trim() || part("question").placeholder;
  if (state.picture) ask(["pruned", "dense"], question);
  else showError(new Told("Choose a picture first"));
}

// --- the key ---

function askForKey(wrong) {
  const dialog = part("key");
  part("key-why").textContent = wrong ? "That key was not right." : "It stays in this tab and is forgotten with it.";
  part("key-value").value = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve, reject) => {
    part("key-form").onsubmit = (event) => {
      event.preventDefault();
      setKey(part("key-value").value);
      dialog.close();
      resolve();
    };
    dialog.oncancel = () => reject(new Told("This server wants a key; load the page again to enter it"));
  });
}

// --- start ---

// A tab's icon without a file: nine patches, three of them kept.
function drawIcon() {
  const canvas = Object.assign(document.createElement("canvas"), { width: 32, height: 32 });
  const pen = canvas.getContext("2d");
  for (let i = 0; i < 9; i++) {
    pen.fillStyle = [1, 4, 5].includes(i) ? "#12b886" : "#8a93a6";
    pen.fillRect(1 + 11 * (i % 3), 1 + 11 * Math.floor(i / 3), 9, 9);
  }
  document.querySelector("link[rel=icon]").href = canvas.toDataURL();
}

function listen() {
  for (const id of ["file", "camera"]) {
    part(id).addEventListener("change", (event) => {
      if (event.target.files[0]) usePicture(event.target.files[0]);
      event.target.value = "";
    });
  }
  part("sample").addEventListener("click", async () => {
    const blob = await (await fetch("qap/sample.png")).blob();
    part("question").value = SAMPLE_QUESTION;
    usePicture(blob);
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData?.files[0]) usePicture(event.clipboardData.files[0]);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    part("drop").classList.add("over");
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || part("drop").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    part("drop").classList.remove("over");
    if (event.dataTransfer.files[0]) usePicture(event.dataTransfer.files[0]);
  });
  part("form").addEventListener("submit", submit);
  part("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  });
  part("views").addEventListener("change", redraw);
  part("overlay").addEventListener("pointermove", showUnder);
  part("overlay").addEventListener("pointerleave", redraw);
  part("k").addEventListener("input", moveK);
  let settled;
  part("k").addEventListener("change", () => {
    clearTimeout(settled);
    const last = state.runs.pruned?.question ?? state.runs.dense?.question;
    if (last) settled = setTimeout(() => ask(["pruned"], last), SETTLED_MS);
  });
  new ResizeObserver(redraw).observe(part("stage"));
}

async function start() {
  drawIcon();
  part("scale").querySelector("b").style.background = gradient();
  showK();
  try {
    state.settings = await (await call("qap/settings", {}, askForKey)).json();
    const { model, n_keep: k, keep_ratio: ratio } = state.settings;
    part("model").textContent = model;
    if (k !== null) state.asked = { n_keep: k };
    else if (ratio < 1) state.asked = { keep_ratio: ratio };
    if (k === null) part("k").value = Math.round(100 * state.asked.keep_ratio);
    showK();
    listen();
  } catch (error) {
    showError(error);
  }
}

start();
