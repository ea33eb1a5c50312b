// server.js: what the page asks the server: with its key, in a stream, stoppable.
// The key stays in sessionStorage: this tab's, gone with it.

const KEY = "qap-key";

// An error that the page shows as it is, in one line.
export class Told extends Error {}

export const setKey = (key) => sessionStorage.setItem(KEY, key);

// A request of this server, with the key where there is one. askForKey: awaited on a 401, then the request is tried again.
export async function call(path, options, askForKey) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options?.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let reply;
    try {
      reply = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Told("The server cannot be reached; is it still running?");
    }
    if (reply.ok) return reply;
    if (reply.status !== 401) throw new Told(await reason(reply));
    sessionStorage.removeItem(KEY);
    await askForKey(Boolean(key));
  }
}

async function reason(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `The server answered with status ${reply.status}`;
  }
}

// The JSON objects of a stream of events, as they come.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (left + value).split("\n");
    left = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
    }
  }
}

// One answer. prune: the field of that name, null for all tokens. onText gets each piece of the text.
// Greedy, so that two answers differ by their tokens alone; not from the prompt cache, so that each reads its prompt.
// Returns {timings, usage, prune} as the server told them.
export async function answer({ uri, question, prune, maxTokens, signal, onText, askForKey }) {
  const content = [
    { type: "image_url", image_url: { url: uri } },
    { type: "text", text: question },
  ];
  const body = {
    messages: [{ role: "user", content }],
    prune,
    temperature: 0,
    max_tokens: maxTokens,
    cache_prompt: false,
    stream: true,
    stream_options: { include_usage: true },
  };
  const headers = { "Content-Type": "application/json" };
  const options = { method: "POST", headers, body: JSON.stringify(body), signal };
  const reply = await call("v1/chat/completions", options, askForKey);
  const told = {};
  for await (const event of events(reply.body)) {
    if (event.error) throw new Told(event.error.message);
    const delta = event.choices?.[0]?.delta;
    const text = (delta?.reasoning_content ?? "") + (delta?.content ?? "");
    if (text) onText(text);
    for (const name of ["timings", "usage", "prune"]) told[name] = event[name] ?? told[name];
  }
  if (!told.timings || !told.prune) throw new Told("The server ended the answer early; ask again");
  return told;
}

// How many requests of others the server has now.
export async function othersNow() {
  try {
    return (await (await fetch("health")).json()).requests;
  } catch {
    return 0;
  }
}

// --- pictures ---

const SENT = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/avif"];
const ROOM = 65536; // for the question and what stands around it

const asUri = (blob) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Told("The file cannot be read; choose it again"));
    reader.readAsDataURL(blob);
  });

async function smaller(bitmap, width, height) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, width, height);
  pen.drawImage(bitmap, 0, 0, width, height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}

// A file as the server takes it: {blob, uri, width, height, note}. What is too large for the server's limits, or of a kind
// that it does not read, is made anew here, and the note says so.
export async function takePicture(file, limits) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Told("This browser cannot read that file as a picture; choose a PNG, JPEG, WebP, GIF, BMP or AVIF");
  }
  const most = Math.min(limits.max_image_bytes, Math.floor(((limits.max_body_bytes - ROOM) * 3) / 4));
  let [blob, width, height, note] = [file, bitmap.width, bitmap.height, ""];
  let scale = Math.min(1, Math.sqrt(limits.max_pixels / (width * height)));
  if (!SENT.includes(file.type) || file.size > most || scale < 1) {
    do {
      width = Math.max(1, Math.floor(bitmap.width * scale));
      height = Math.max(1, Math.floor(bitmap.height * scale));
      blob = await smaller(bitmap, width, height);
      scale *= 0.8;
    } while (blob && blob.size > most && width * height > 1);
    if (!blob || blob.size > most) throw new Told("The picture is too large for this server; choose a smaller one");
    note = `Sent as a JPEG of ${width} × ${height} pixels: the server takes PNG, JPEG, WebP, GIF, BMP and AVIF up to `;
    note += `${(limits.max_pixels / 1e6).toLocaleString("en")} megapixels and ${(most / 2 ** 20).toFixed(1)} MiB.`;
  }
  bitmap.close();
  return { blob, uri: await asUri(blob), width, height, note };
}
