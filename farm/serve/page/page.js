// The page: one photo, one concept, how strongly, and what came of it.

import { Problem, request, sentence, timings } from "./api.js";
import { Gallery, readable } from "./gallery.js";
import { offerPacks } from "./packs.js";
import { Photo, watchForPhotos } from "./photo.js";
import { keep } from "./storage.js";

const STEPS = {
  receive: "receive the photo", decode: "decode it", wait: "wait for a turn", load: "load the adapter",
  edit: "edit", call: "hand it over and back", encode: "encode the answer",
};
const NEVER = new Set([400, 404, 413, 415, 422]); // asked again, the answer would be the same
const byId = (id) => document.getElementById(id);
const frame = byId("frame");
const before = byId("before");
const after = byId("after");
const split = byId("split");
const strength = byId("strength");
const format = byId("format");
const download = byId("download");
const problem = byId("problem");

let photo = null;
let running = null; // the AbortController of the edit under way
let soon;

const gallery = new Gallery({ onChoose, onProblem: (error, again) => tellProblem(error, again) });

// What is shown

function tell(text) {
  byId("status").textContent = text;
}

function tellProblem(error, again) {
  tell("");
  problem.querySelector("p").textContent = error instanceof Problem ? error.message : sentence(String(error));
  const buttons = (error.near ?? []).map((id) => button(readable(id), () => gallery.choose(id)));
  if (again) buttons.push(button("Try again", again));
  problem.querySelector(".buttons").replaceChildren(...buttons);
  problem.hidden = false;
  problem.scrollIntoView({ block: "nearest" }); // on a phone it may be far above
}

function button(text, act) {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  made.addEventListener("click", () => {
    problem.hidden = true;
    act();
  });
  return made;
}

function onChoose(concept) {
  byId("name").textContent = readable(concept.id);
  byId("prompt").textContent = concept.prompt ?? "";
  if (!photo) tell("Now it wants a photo.");
  editSoon();
}

async function onPhoto(file) {
  running?.abort();
  forgetAnswer();
  photo?.close();
  const mine = (photo = new Photo(file));
  await mine.open();
  if (photo !== mine) return;
  if (mine.shown) before.src = mine.image.src;
  before.hidden = !mine.shown;
  present(mine.shown && mine.image);
  if (gallery.chosen) edit();
  else if (!gallery.chooseFirst()) tell("Now choose a concept.");
}

// The frame, in the image's shape; without one, the place to drop a photo.
function present(image) {
  if (image) frame.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  frame.hidden = byId("again").hidden = !image;
  byId("empty").hidden = Boolean(image);
}

function forgetAnswer() {
  if (after.src) URL.revokeObjectURL(after.src);
  after.removeAttribute("src");
  after.hidden = split.hidden = true;
  byId("more").hidden = true;
  download.removeAttribute("href");
  download.setAttribute("aria-disabled", "true");
  frame.classList.remove("both");
}

// The edit

function editSoon() {
  clearTimeout(soon);
  running?.abort();
  soon = setTimeout(edit, 120); // arrow keys run through concepts and strengths
}

async function edit() {
  clearTimeout(soon);
  running?.abort();
  const concept = gallery.chosen;
  if (!photo || !concept) return;
  const mine = (running = new AbortController());
  problem.hidden = true;
  frame.classList.add("busy");
  tell("Editing…");
  try {
    const began = performance.now();
    const response = await answer(photo, concept.id, mine.signal);
    const blob = await response.blob();
    const took = performance.now() - began;
    await show(blob, concept.id, mine.signal);
    if (!mine.signal.aborted) explain(response, concept.id, took);
  } catch (error) {
    if (!mine.signal.aborted) tellProblem(error, NEVER.has(error.status) ? null : edit);
  } finally {
    if (running === mine) frame.classList.remove("busy");
  }
}

async function answer(upload, concept, signal) {
  const query = new URLSearchParams();
  if (strength.value !== "100") query.set("strength", strength.value / 100);
  for (;;) {
    try {
      return await request(`v1/edit/${encodeURIComponent(concept)}${query.size ? `?${query}` : ""}`, {
        method: "POST",
        headers: { Accept: format.value, "Content-Type": upload.body.type || "application/octet-stream" },
        body: upload.body,
        signal,
        onBusy: (seconds, why) => tell(`${why} Trying again in ${seconds} s.`),
      });
    } catch (error) {
      if (error.status !== 413 || !upload.canShrink) throw error;
      tell("The photo is too large for this service; making it smaller…");
      await upload.shrink();
      signal.throwIfAborted();
    }
  }
}

async function show(blob, concept, signal) {
  const url = URL.createObjectURL(blob);
  const image = new Image();
  image.src = url;
  await image.decode();
  if (signal.aborted) return URL.revokeObjectURL(url);
  const first = after.hidden;
  if (after.src) URL.revokeObjectURL(after.src);
  after.src = url;
  after.alt = `The photo edited: ${readable(concept)}`;
  after.hidden = false;
  byId("after-tag").textContent = readable(concept);
  if (!photo.shown) present(image);
  split.hidden = !photo.shown;
  frame.classList.toggle("both", photo.shown);
  if (first && photo.shown) reveal();
  download.href = url;
  download.download = `${photo.name}-${concept}.${format.value === "image/jpeg" ? "jpg" : format.value.slice(6)}`;
  download.removeAttribute("aria-disabled");
}

function explain(response, concept, took) {
  const steps = new Map(timings(response.headers.get("Server-Timing")));
  const inside = ["load", "wait", "edit"].reduce((sum, step) => sum + (steps.get(step) ?? 0), 0);
  if (steps.has("call")) steps.set("call", Math.max(0, steps.get("call") - inside)); // it is around those
  const model = steps.has("edit") ? `, ${milliseconds(steps.get("edit"))} of it in the model` : "";
  tell(`${readable(concept)} in ${milliseconds(took)}${model}`);
  const most = Math.max(...steps.values());
  byId("times").replaceChildren(...[...steps].map(([step, duration]) => {
    const row = document.createElement("li");
    row.style.setProperty("--part", most ? duration / most : 0);
    for (const text of [STEPS[step] ?? step, milliseconds(duration)]) {
      row.append(Object.assign(document.createElement("span"), { textContent: text }));
    }
    return row;
  }));
  const header = (name) => response.headers.get(name) ?? "unknown";
  byId("made-by").textContent =
    `Version ${header("X-Adapter-Version")}, adapter ${header("X-Adapter-Digest").slice(0, 12)}, ` +
    `base ${header("X-Base-Digest").slice(0, 12)}`;
  byId("more").hidden = false;
}

function milliseconds(duration) {
  if (duration >= 995) return `${(duration / 1000).toFixed(1)} s`;
  return `${duration.toFixed(duration < 10 ? 1 : 0)} ms`;
}

// Controls

function setSplit() {
  frame.style.setProperty("--split", split.value);
  split.setAttribute("aria-valuetext", `${split.value} % before, ${100 - split.value} % after`);
}

function reveal() {
  frame.classList.remove("reveal");
  split.value = 100;
  setSplit();
  requestAnimationFrame(() => {
    frame.classList.add("reveal");
    split.value = 50;
    setSplit();
  });
}

split.addEventListener("input", () => {
  frame.classList.remove("reveal");
  setSplit();
});
strength.addEventListener("input", () => {
  byId("strength-told").textContent = `${strength.value}\u2009%`;
  strength.style.setProperty("--fill", `${strength.value}%`);
  editSoon();
});
format.addEventListener("change", edit);

const root = document.documentElement;
for (const choice of document.getElementsByName("theme")) {
  choice.checked = choice.value === (root.dataset.theme ?? "auto");
  choice.addEventListener("change", () => {
    root.dataset.theme = choice.value;
    keep("localStorage", "theme", choice.value);
  });
}

setSplit();
watchForPhotos(onPhoto);
await gallery.list();
if (photo && !gallery.chosen) gallery.chooseFirst();
if (gallery.listed) offerPacks(tellProblem);
