// The drawing page: strokes in, the gateway's answer out. Plain modern JavaScript, no library, no outside resource.
//
// The sample digits are MNIST test images, one of each, as the smallest PNG that Pillow writes:
//   images = np.fromfile("data/t10k-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 28, 28)
//   for digit, index in enumerate(SAMPLE_INDICES):
//       Image.fromarray(images[index]).save(f"sample-{digit}.png", optimize=True)
// with SAMPLE_INDICES = [10, 5, 35, 32, 4, 15, 21, 64, 266, 105]
"use strict";

const SIDE = 280; // the drawing's own units, and the side in pixels of the picture that is sent
const PAUSE_MS = 60; // between two requests while drawing
const TIMEOUT_MS = 10000;
const MAX_FILE_BYTES = 20 * 1024 * 1024;
const HELD = "image/"; // clipboard and drop items of this type are taken
const KEY = "api-key"; // in sessionStorage: forgotten with the tab

const $ = (id) => document.getElementById(id);
const canvas = $("canvas");
const pen = canvas.getContext("2d");
const answer = $("answer");

// What is on the sheet: strokes [{width, points: [[x, y], ...]}], or a picture {bitmap, blob, name, sample}.
let sheet = { strokes: [], picture: null };
const past = []; // earlier sheets, for undo
let stroke = null; // the one being drawn
let pointer = null; // its pointer's id

// --- drawing ---------------------------------------------------------------------------------------------------------

function trace(context, points, width, scale) {
  // A smooth line: quadratic curves between the midpoints of what the pointer reported.
  context.lineWidth = Math.max(width * scale, 1);
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  const at = (k) => [points[k][0] * scale, points[k][1] * scale];
  context.moveTo(...at(0));
  if (points.length === 1) context.lineTo(points[0][0] * scale + 0.01, points[0][1] * scale); // a dot: no length, no ink
  for (let k = 1; k < points.length - 1; k++) {
    const [x, y] = at(k), [nextX, nextY] = at(k + 1);
    context.quadraticCurveTo(x, y, (x + nextX) / 2, (y + nextY) / 2);
  }
  if (points.length > 1) context.lineTo(...at(points.length - 1));
  context.stroke();
}

function paint() {
  const scale = canvas.width / SIDE;
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
  if (sheet.picture?.bitmap) {
    const { width, height } = sheet.picture.bitmap;
    const fit = Math.min(canvas.width / width, canvas.height / height);
    const left = (canvas.width - width * fit) / 2, top = (canvas.height - height * fit) / 2;
    pen.imageSmoothingQuality = "high";
    pen.drawImage(sheet.picture.bitmap, left, top, width * fit, height * fit);
    if (sheet.picture.sample) {
      pen.globalCompositeOperation = "source-in";
      pen.fillStyle = pen.strokeStyle;
      pen.fillRect(0, 0, canvas.width, canvas.height);
      pen.globalCompositeOperation = "source-over";
    }
  }
  for (const one of stroke ? [...sheet.strokes, stroke] : sheet.strokes) trace(pen, one.points, one.width, scale);
  const empty = isEmpty();
  $("invite").hidden = !empty;
  $("undo").disabled = past.length === 0;
  $("clear").disabled = empty;
  const count = sheet.strokes.length;
  canvas.setAttribute("aria-label", "Drawing area: " + (
    sheet.picture ? sheet.picture.name : count ? `${count} ${count === 1 ? "stroke" : "strokes"} drawn` : "empty"));
  for (const button of $("samples").children) {
    button.setAttribute("aria-pressed", String(sheet.picture?.sample === button.dataset.digit));
  }
}

const isEmpty = () => !stroke && !sheet.strokes.length && !sheet.picture;

function change(next) {
  past.push(sheet);
  if (past.length > 100) past.shift();
  sheet = next;
  paint();
  ask();
}

function fitCanvas() {
  const side = Math.round(canvas.clientWidth * (window.devicePixelRatio || 1));
  if (side && side !== canvas.width) canvas.width = canvas.height = side;
  paint();
}

function pointOf(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * SIDE / box.width, (event.clientY - box.top) * SIDE / box.height];
}

canvas.addEventListener("pointerdown", (event) => {
  if (pointer !== null || event.button > 0) return; // a second finger, the palm, the right button
  event.preventDefault();
  pointer = event.pointerId;
  canvas.setPointerCapture(pointer);
  past.push(sheet);
  if (sheet.picture) sheet = { strokes: [], picture: null };
  stroke = { width: Number($("pen").value), points: [pointOf(event)] };
  paint();
});

canvas.addEventListener("pointermove", (event) => {
  if (event.pointerId !== pointer) return;
  event.preventDefault();
  const moves = event.getCoalescedEvents?.() ?? [];
  for (const move of moves.length ? moves : [event]) {
    const point = pointOf(move), last = stroke.points.at(-1);
    if (Math.hypot(point[0] - last[0], point[1] - last[1]) >= 1) stroke.points.push(point);
  }
  paint();
  if (sheet.strokes.length || stroke.points.length > 4) ask(); // the first touch alone is no digit yet
});

function lift(event) {
  if (event.pointerId !== pointer) return;
  pointer = null;
  sheet = { strokes: [...sheet.strokes, stroke], picture: null };
  stroke = null;
  paint();
  ask();
}
canvas.addEventListener("pointerup", lift);
canvas.addEventListener("pointercancel", lift);
canvas.addEventListener("lostpointercapture", lift);

function clear() {
  if (!isEmpty() && !stroke) change({ strokes: [], picture: null });
  say("");
}

function undo() {
  if (stroke || !past.length) return;
  sheet = past.pop();
  paint();
  ask();
}

// --- asking the gateway ----------------------------------------------------------------------------------------------

let busy = false; // a request is under way
let stale = false; // what it asks about is no longer what is on the sheet
let lastSent = 0;

function pictureToSend() {
  if (sheet.picture) return Promise.resolve(sheet.picture.blob);
  const small = document.createElement("canvas");
  small.width = small.height = SIDE;
  const context = small.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, SIDE, SIDE);
  context.strokeStyle = "#000";
  for (const one of stroke ? [...sheet.strokes, stroke] : sheet.strokes) trace(context, one.points, one.width, 1);
  return new Promise((resolve) => small.toBlob(resolve, "image/png"));
}

/** One request at a time; while it runs, the latest drawing waits and all between are skipped. */
async function ask() {
  answer.dataset.settled = "false";
  stale = true;
  if (busy) return;
  busy = true;
  try {
    while (stale) {
      const wait = lastSent + PAUSE_MS - performance.now();
      if (wait > 0) await new Promise((resolve) => setTimeout(resolve, wait));
      stale = false;
      lastSent = performance.now();
      if (isEmpty()) showIdle();
      else await classify();
    }
  } finally {
    busy = false;
    answer.dataset.settled = "true";
    speakSoon();
  }
}

async function classify() {
  const source = sheet.picture?.name ?? "drawing";
  let response, body;
  const started = performance.now();
  try {
    const blob = await pictureToSend();
    response = await fetch("classify", {
      method: "POST",
      body: blob,
      headers: { "Content-Type": blob.type || "application/octet-stream", Accept: "application/json", ...bearer() },
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    body = await response.json().catch(() => null);
  } catch (error) {
    const late = error.name === "TimeoutError";
    showError(late ? "No answer" : "The server cannot be reached",
      late ? `Nothing came back within ${TIMEOUT_MS / 1000} seconds.` : "Is it still running? Trying again…");
    return waitUntilReady(late ? "The server is slow to answer." : "The server cannot be reached.");
  }
  const elapsed = performance.now() - started;
  if (response.status === 401) askForKey(); // whatever is on the sheet by now
  if (isEmpty()) return showIdle(); // cleared meanwhile
  if (response.status === 401) {
    return showError("A key is needed", "This server answers those who have an API key.");
  }
  if (response.ok && Array.isArray(body?.probabilities)) return showAnswer(body, elapsed, source);
  const code = body?.error?.code ?? "", message = body?.error?.message ?? `The server answered ${response.status}.`;
  if (response.status === 503 || response.status === 504) {
    showError("The model is not ready", message);
    return waitUntilReady(message);
  }
  if (response.status === 429) {
    showError("The server is busy", "Trying again in a moment…");
    const seconds = Number(response.headers.get("Retry-After")) || 1;
    setTimeout(ask, Math.min(seconds, 10) * 1000);
    return;
  }
  showError({ bad_image: "No digit to read", too_large: "Too large a picture" }[code] ?? "That did not work", message);
}

// --- the key, where the server wants one ---

const bearer = () => {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
};

function askForKey() {
  $("key-words").textContent = sessionStorage.getItem(KEY) ? "That key was not accepted." : "This server wants an API key.";
  sessionStorage.removeItem(KEY);
  if (!$("key-form").hidden) return;
  $("key-form").hidden = false;
  if (!stroke) $("key").focus(); // not while a digit is being drawn
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  if (!key) return;
  sessionStorage.setItem(KEY, key);
  $("key").value = "";
  $("key-form").hidden = true;
  ask();
});

let waiting = false;

/** Asks /readyz until it says yes, then reads what is on the sheet. */
async function waitUntilReady(why) {
  if (waiting) return;
  waiting = true;
  if (why) notice(`${why} This page tries again by itself.`);
  setModel("waiting", "Waiting for the model…");
  for (let pause = 500; ; pause = Math.min(pause * 1.5, 5000)) {
    const reason = await readiness();
    if (!reason) break;
    notice(`${reason} This page tries again by itself.`);
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
  waiting = false;
  notice("");
  if (!isEmpty()) ask();
}

/** "" when the model is ready (its version is shown if there is but one: which of several answers, an answer says), otherwise a sentence that says why not. */
async function readiness() {
  try {
    const response = await fetch("readyz", { signal: AbortSignal.timeout(5000), headers: { Accept: "application/json" } });
    const body = await response.json().catch(() => ({}));
    if (response.ok) {
      const versions = body?.versions ?? [];
      setModel("ready", versions.length === 1 ? `Model version ${versions[0]}` : "Model ready");
      return "";
    }
    const why = [body?.error?.message, body?.error, body?.reason, body?.message, body?.detail].find((text) => typeof text === "string" && text);
    const sentence = why ?? "The model is not ready yet.";
    return /[.!?]$/.test(sentence) ? sentence : `${sentence}.`;
  } catch {
    return "The server cannot be reached.";
  }
}

// --- showing ---------------------------------------------------------------------------------------------------------

const percent = (share) => (share >= 0.9995 ? "> 99.9" : share < 0.0005 ? "0.0" : (share * 100).toFixed(1)) + " %";

function setBars(probabilities, top) {
  [...$("rows").children].forEach((row, digit) => {
    const share = probabilities?.[digit] ?? 0;
    row.querySelector(".bar span").style.transform = `translateX(${(share - 1) * 100}%)`;
    row.querySelector(".number").textContent = probabilities ? percent(share) : "–";
    row.toggleAttribute("data-top", digit === top);
  });
}

function showAnswer(body, elapsed, source) {
  const { digit, probabilities } = body;
  const confidence = body.confidence ?? probabilities[digit];
  const second = probabilities.map((share, k) => [share, k]).filter(([, k]) => k !== digit).sort((a, b) => b[0] - a[0])[0];
  const doubt = body.unsure || confidence < 0.7;
  answer.dataset.state = "read";
  answer.toggleAttribute("data-doubt", doubt);
  $("digit").textContent = digit;
  const named = (k) => body.label === undefined ? `${k === 8 ? "an" : "a"} ${k}` : k === digit ? body.label : `class ${k}`;
  $("words").textContent = `${doubt ? "Perhaps" : confidence < 0.95 ? "Probably" : "It is"} ${named(digit)}`;
  const other = doubt ? `; it could also be ${named(second[1])} (${percent(second[0])})` : "";
  $("sure").textContent = `${percent(confidence)} sure${other}` + (body.unsure ? ". The model would rather not say." : "");
  $("version").textContent = body.model_version ?? "–";
  $("latency").textContent = `${Math.round(elapsed)} ms`;
  $("source").textContent = source;
  setBars(probabilities, digit);
  setModel("ready", body.model_version ? `Model version ${body.model_version}` : "Model ready");
  if (!waiting) notice("");
}

function showIdle() {
  answer.dataset.state = "idle";
  answer.removeAttribute("data-doubt");
  $("digit").textContent = "?";
  $("words").textContent = "Nothing drawn yet";
  $("sure").textContent = "The answer appears here.";
  $("latency").textContent = $("source").textContent = "–";
  setBars(null, null);
}

function showError(title, message) {
  answer.dataset.state = "error";
  answer.removeAttribute("data-doubt");
  $("digit").textContent = "?";
  $("words").textContent = title;
  $("sure").textContent = message.charAt(0).toUpperCase() + message.slice(1);
  $("latency").textContent = $("source").textContent = "–";
  setBars(null, null);
}

function setModel(state, text) {
  if ($("model").dataset.state !== state) $("model").dataset.state = state;
  if ($("model-text").textContent !== text) $("model-text").textContent = text;
}

function notice(text, kind = "wait") {
  text = text.charAt(0).toUpperCase() + text.slice(1);
  if ($("notice").textContent !== text) $("notice").textContent = text;
  $("notice").dataset.kind = kind;
  $("notice").hidden = !text;
}

let speaker = 0;
const say = (text) => { $("spoken").textContent = text; };

/** Screen readers hear an answer once it has held for a moment, not every frame of the drawing. */
function speakSoon() {
  clearTimeout(speaker);
  speaker = setTimeout(() => {
    if (stroke || answer.dataset.state === "idle") return;
    say(`${$("words").textContent}. ${$("sure").textContent}`);
  }, 500);
}

// --- pictures: samples, files, drops, the clipboard ------------------------------------------------------------------

async function takeFile(file) {
  if (!file) return;
  const name = file.name || "pasted picture";
  if (file.size > MAX_FILE_BYTES) {
    notice(`${name} has ${Math.round(file.size / 1e6)} MB; at most ${MAX_FILE_BYTES / 1024 / 1024} MB can be sent. Scale it down.`, "error");
    return;
  }
  notice("");
  // A browser may not show what the server reads well (TIFF): then only the preview is missing.
  const bitmap = await createImageBitmap(file).catch(() => null);
  change({ strokes: [], picture: { bitmap, blob: file, name, sample: null } });
}

async function takeSample(digit) {
  try {
    const response = await fetch(`static/sample-${digit}.png`);
    if (!response.ok) throw new Error(String(response.status));
    const blob = await response.blob();
    change({ strokes: [], picture: { bitmap: await asInk(blob), blob, name: `sample ${digit}`, sample: String(digit) } });
  } catch {
    notice(`Sample ${digit} could not be loaded from the server.`, "error");
  }
}

/** A white-on-black sample as ink on nothing: its brightness becomes opacity, and paint() gives it the page's ink. */
async function asInk(blob) {
  const bitmap = await createImageBitmap(blob);
  const copy = document.createElement("canvas");
  copy.width = bitmap.width;
  copy.height = bitmap.height;
  const context = copy.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, copy.width, copy.height);
  for (let k = 0; k < pixels.data.length; k += 4) pixels.data[k + 3] = pixels.data[k];
  context.putImageData(pixels, 0, 0);
  return copy;
}

$("upload").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  takeFile($("file").files[0]);
  $("file").value = ""; // the same file may be chosen again
});
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith(HELD));
  if (file) takeFile(file);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("sheet").toggleAttribute("data-drop", true);
});
for (const type of ["dragleave", "drop", "dragend"]) {
  document.addEventListener(type, (event) => {
    if (type !== "dragleave" || event.relatedTarget === null) $("sheet").removeAttribute("data-drop");
  });
}
document.addEventListener("drop", (event) => {
  event.preventDefault();
  const file = event.dataTransfer?.files?.[0];
  if (file) takeFile(file);
});

// --- tools and keys --------------------------------------------------------------------------------------------------

function setPen(width) {
  $("pen").value = width;
  const side = Math.max(2, Number($("pen").value) * 0.8);
  $("nib").style.width = $("nib").style.height = `${side}px`;
  $("pen").setAttribute("aria-valuetext", `${$("pen").value} of 48`);
}
$("pen").addEventListener("input", () => setPen($("pen").value));
$("clear").addEventListener("click", clear);
$("undo").addEventListener("click", undo);

document.addEventListener("keydown", (event) => {
  if (event.target.id === "key") return; // a key is being typed in
  if ((event.ctrlKey || event.metaKey) && !event.altKey && !event.shiftKey && event.key.toLowerCase() === "z") {
    event.preventDefault();
    return undo();
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !$("keys").checked) return;
  const key = event.key.toLowerCase();
  if (/^[0-9]$/.test(key)) takeSample(Number(key));
  else if (key === "c" || key === "escape") clear();
  else if (key === "u") $("upload").click();
  else if (key === "[") setPen(Number($("pen").value) - 2);
  else if (key === "]") setPen(Number($("pen").value) + 2);
});

// --- start -----------------------------------------------------------------------------------------------------------

for (let digit = 0; digit < 10; digit++) {
  const row = $("rows").insertRow();
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = digit;
  const bar = document.createElement("span");
  bar.className = "bar";
  bar.setAttribute("aria-hidden", "true");
  bar.append(document.createElement("span"));
  row.append(head);
  row.insertCell().append(bar);
  row.insertCell().className = "number";

  const button = document.createElement("button");
  button.type = "button";
  button.dataset.digit = digit;
  button.setAttribute("aria-label", `Sample ${digit}`);
  button.setAttribute("aria-pressed", "false");
  button.title = `A handwritten ${digit} (key ${digit})`;
  const image = document.createElement("img");
  image.src = `static/sample-${digit}.png`;
  image.alt = "";
  image.width = image.height = 28;
  button.append(image);
  button.addEventListener("click", () => takeSample(digit));
  $("samples").append(button);
}
showIdle();
setPen(18);
new ResizeObserver(fitCanvas).observe(canvas);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
fitCanvas();
readiness().then((reason) => { if (reason) waitUntilReady(reason); });
