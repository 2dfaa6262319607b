// The gallery: hundreds of concepts, page by page, each with the picture its adapter made of a test photo.

import { request } from "./api.js";

const PER_PAGE = 60;
const AT_ONCE = 3; // previews fetched at the same time, so that an edit finds a free connection
const SHARP = 192; // px of a tile, enough for dense screens

const byId = (id) => document.getElementById(id);
const tiles = byId("tiles");
const search = byId("search");
const category = byId("category");
const further = byId("further");

export function readable(id) {
  const words = id.replaceAll("-", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
}

export class Gallery {
  #known = new Map();
  #chosen = null;
  #page = 0;
  #pages = 1;
  #listing = null; // the AbortController of the list that is being fetched
  #previews = new Previews();

  // onChoose is given a concept's row; onProblem an error, and what does it again.
  constructor({ onChoose, onProblem }) {
    this.onChoose = onChoose;
    this.onProblem = onProblem;
    tiles.addEventListener("change", (event) => this.#choose(event.target.value));
    further.addEventListener("click", () => this.more());
    category.addEventListener("change", () => this.list());
    let typing;
    search.addEventListener("input", () => {
      clearTimeout(typing);
      typing = setTimeout(() => this.list(), 200);
    });
    search.form.addEventListener("submit", (event) => {
      event.preventDefault();
      clearTimeout(typing);
      this.list();
    });
    new IntersectionObserver(([entry]) => entry.isIntersecting && this.more(), { rootMargin: "300px" }).observe(further);
  }

  get chosen() {
    return this.#chosen;
  }

  get listed() {
    return this.#page > 0;
  }

  // Chooses the first one shown, as a click would; whether there is one.
  chooseFirst() {
    const first = tiles.querySelector("input");
    first?.click();
    return first !== null;
  }

  choose(id) {
    const tile = tiles.querySelector(`input[value="${CSS.escape(id)}"]`);
    if (tile) tile.click();
    else this.#choose(id);
  }

  #choose(id) {
    this.#chosen = this.#known.get(id) ?? { id };
    this.onChoose(this.#chosen);
  }

  // From the beginning, for what is asked for now.
  list() {
    this.#listing?.abort();
    this.#listing = null;
    this.#page = 0;
    this.#pages = 1;
    return this.more();
  }

  async more() {
    if (this.#listing || this.#page >= this.#pages) return;
    const mine = (this.#listing = new AbortController());
    const query = new URLSearchParams({ page: this.#page + 1, per_page: PER_PAGE });
    if (search.value.trim()) query.set("q", search.value.trim());
    if (category.value) query.set("category", category.value);
    try {
      const response = await request(`v1/concepts?${query}`, { signal: mine.signal });
      this.#show(await response.json());
    } catch (error) {
      if (mine.signal.aborted) return;
      this.onProblem(error, () => this.more());
    } finally {
      if (this.#listing === mine) this.#listing = null;
    }
    if (further.getBoundingClientRect().top < innerHeight && !further.hidden) this.more(); // it has not left the view
  }

  #show({ concepts, total, page, pages, categories }) {
    if (page === 1) {
      this.#previews.forget();
      tiles.querySelectorAll(".tile").forEach((tile) => tile.remove());
      this.#offer(categories);
    }
    this.#page = page;
    this.#pages = pages;
    for (const concept of concepts) {
      this.#known.set(concept.id, concept);
      tiles.append(this.#tile(concept));
    }
    further.hidden = page >= pages;
    const asked = search.value.trim();
    byId("count").textContent = total
      ? `${total} ${total === 1 ? "concept" : "concepts"}`
      : asked || category.value ? "Nothing here is like that. Try another word." : "Nothing is published yet.";
  }

  // The categories that there are, once: those of a search may be fewer.
  #offer(categories = []) {
    const named = categories.filter(({ id }) => id);
    if (category.length > 1 || named.length < 2) return;
    for (const { id, count } of named) category.add(new Option(`${readable(id)} (${count})`, id));
    category.parentElement.hidden = false;
  }

  #tile(concept) {
    const tile = byId("tile").content.firstElementChild.cloneNode(true);
    const input = tile.querySelector("input");
    input.value = concept.id;
    input.checked = concept.id === this.#chosen?.id;
    tile.title = concept.prompt ?? "";
    tile.querySelector(".label").textContent = readable(concept.id);
    tile.querySelector(".initial").textContent = readable(concept.id).charAt(0);
    tile.style.setProperty("--hue", [...concept.id].reduce((sum, letter) => (sum * 31 + letter.charCodeAt(0)) % 360, 7));
    this.#previews.watch(tile, concept);
    return tile;
  }
}

// Fetches the previews of tiles in view, a few at a time; with the key, which an image element could not send.
class Previews {
  #waiting = new Map();
  #running = 0;
  #observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) this.#waiting.set(target, this.#of.get(target));
      else this.#waiting.delete(target);
    }
    this.#next();
  }, { rootMargin: "200px" });
  #of = new WeakMap();

  watch(tile, concept) {
    this.#of.set(tile, concept);
    this.#observer.observe(tile);
  }

  forget() {
    this.#observer.disconnect();
    this.#waiting.clear();
  }

  #next() {
    for (const [tile, concept] of this.#waiting) {
      if (this.#running >= AT_ONCE) return;
      this.#waiting.delete(tile);
      this.#observer.unobserve(tile);
      this.#running++;
      this.#draw(tile, concept).catch(() => {}).finally(() => { // the initial stands in for a missing preview
        this.#running--;
        this.#next();
      });
    }
  }

  async #draw(tile, { id, version }) {
    const response = await request(`v1/concepts/${encodeURIComponent(id)}/preview.webp?small=true&version=${version}`);
    const sheet = await createImageBitmap(await response.blob());
    const face = tile.querySelector(".face");
    const { side, adapter, photo } = cells(sheet);
    for (const [name, top] of [["edited", adapter], ["original", photo]]) {
      const canvas = document.createElement("canvas");
      canvas.className = name;
      canvas.width = canvas.height = Math.min(side, SHARP);
      const context = canvas.getContext("2d");
      context.imageSmoothingQuality = "high";
      context.drawImage(sheet, 0, top, side, side, 0, 0, canvas.width, canvas.height);
      face.append(canvas);
    }
    sheet.close();
    face.classList.add("drawn");
  }
}

// A small preview is three square pictures below each other: a photo, the teacher's edit, the adapter's.
function cells({ width, height }) {
  return { side: width, photo: 0, adapter: height - width };
}
