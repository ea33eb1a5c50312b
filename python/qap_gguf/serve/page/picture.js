// picture.js: what is drawn over the picture: the patches that were kept, or a score of every token as colours.
// A row is what the server tells of a picture or of one tile of it: n_tokens, grid [columns, lines], and where they were
// asked for indices, padding, scores (native/programs/qap-server.h).

// Dark to light, evenly bright to the eye; the same in both colour schemes, for it lies over the picture.
const COLOURS = [[13, 8, 60], [84, 15, 109], [152, 36, 102], [212, 72, 66], [245, 125, 21], [250, 193, 39], [252, 255, 164]];
const DIM = "rgba(10, 12, 18, 0.72)";
const LINE = "#2ee6a8";

function colour(part, alpha) {
  const place = Math.min(Math.max(part, 0), 1) * (COLOURS.length - 1);
  const low = Math.min(Math.floor(place), COLOURS.length - 2);
  const mixed = COLOURS[low].map((value, i) => Math.round(value + (COLOURS[low + 1][i] - value) * (place - low)));
  return `rgba(${mixed.join(",")},${alpha})`;
}

export const gradient = () => `linear-gradient(90deg, ${COLOURS.map((c) => `rgb(${c.join(",")})`).join(",")})`;

// Where each row's tokens lie, in parts of the stage: all of it for one row; tiles side by side, in their order.
function boxes(rows) {
  const across = Math.ceil(Math.sqrt(rows.length));
  const down = Math.ceil(rows.length / across);
  const gap = rows.length > 1 ? 0.015 : 0;
  return rows.map((_, i) => ({
    left: (i % across) / across + gap / 2,
    top: Math.floor(i / across) / down + gap / 2,
    width: 1 / across - gap,
    height: 1 / down - gap,
  }));
}

// Are there grids to draw on?
export const drawable = (rows) => rows.length > 0 && rows.every((row) => row.grid && row.indices);

// The lowest and the highest value of a score, over all rows, padding left out; null without scores.
export function range(rows, score) {
  if (!rows.length || !rows.every((row) => row.scores)) return null;
  let [low, high] = [Infinity, -Infinity];
  for (const row of rows) {
    const padding = new Set(row.padding);
    row.scores[score].forEach((value, token) => {
      if (!padding.has(token)) [low, high] = [Math.min(low, value), Math.max(high, value)];
    });
  }
  return low <= high ? [low, high] : null;
}

// Draw the view ("plain", "kept" or a score) over the canvas; returns how many tokens it marked as kept.
export function draw(canvas, rows, view) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(canvas.clientHeight * ratio);
  const pen = canvas.getContext("2d");
  if (view === "plain" || !drawable(rows)) return 0;
  if (rows.length > 1) {
    pen.fillStyle = "#14161c";
    pen.fillRect(0, 0, canvas.width, canvas.height);
  }
  const limits = view === "kept" ? null : range(rows, view);
  if (view !== "kept" && !limits) return 0;
  const all = boxes(rows);
  return rows.map((row, i) => drawRow(pen, row, all[i], view, limits, ratio)).reduce((a, b) => a + b, 0);
}

function drawRow(pen, row, box, view, limits, ratio) {
  const [columns, lines] = row.grid;
  const kept = new Set(row.indices);
  const padding = new Set(row.padding);
  const x = (column) => Math.round((box.left + (box.width * column) / columns) * pen.canvas.width);
  const y = (line) => Math.round((box.top + (box.height * line) / lines) * pen.canvas.height);
  let marked = 0;
  for (let token = 0; token < row.n_tokens; token++) {
    const [column, line] = [token % columns, Math.floor(token / columns)];
    const at = [x(column), y(line), x(column + 1) - x(column), y(line + 1) - y(line)];
    if (limits && !padding.has(token)) {
      const part = (row.scores[view][token] - limits[0]) / (limits[1] - limits[0] || 1);
      pen.fillStyle = colour(part, 0.82);
      pen.fillRect(...at);
    } else if (!kept.has(token)) {
      pen.fillStyle = DIM;
      pen.fillRect(...at);
    }
    marked += kept.has(token) ? 1 : 0;
  }
  outline(pen, kept, columns, lines, x, y, ratio, limits ? "#ffffff" : LINE);
  return marked;
}

// The border between kept tokens and the others: a line where the neighbour is not kept.
function outline(pen, kept, columns, lines, x, y, ratio, line) {
  pen.beginPath();
  const half = Math.max(1, ratio) * 0.75;
  for (const token of kept) {
    const [column, row] = [token % columns, Math.floor(token / columns)];
    const [left, right, top, bottom] = [x(column) + half, x(column + 1) - half, y(row) + half, y(row + 1) - half];
    const open = (c, r) => c < 0 || r < 0 || c >= columns || r >= lines || !kept.has(r * columns + c);
    if (open(column - 1, row)) pen.moveTo(left, top), pen.lineTo(left, bottom);
    if (open(column + 1, row)) pen.moveTo(right, top), pen.lineTo(right, bottom);
    if (open(column, row - 1)) pen.moveTo(left, top), pen.lineTo(right, top);
    if (open(column, row + 1)) pen.moveTo(left, bottom), pen.lineTo(right, bottom);
  }
  pen.lineWidth = half * 2;
  pen.lineCap = "square";
  pen.strokeStyle = line;
  pen.stroke();
}

// What lies under a point, in parts of the stage: {row, token, column, line}, or null.
export function find(rows, across, down) {
  const all = boxes(rows);
  for (const [i, row] of rows.entries()) {
    const box = all[i];
    const [right, below] = [(across - box.left) / box.width, (down - box.top) / box.height];
    if (right < 0 || right >= 1 || below < 0 || below >= 1) continue;
    const [column, line] = [Math.floor(right * row.grid[0]), Math.floor(below * row.grid[1])];
    return { row, token: line * row.grid[0] + column, column, line };
  }
  return null;
}
