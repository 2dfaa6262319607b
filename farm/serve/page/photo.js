// Photos: chosen, dropped, pasted or taken, shown as they are, and reduced where the service takes none so large.

import { sentence } from "./api.js";

const LONGEST = 4096; // px: the largest edit there is
const HEAVY = 8_000_000; // bytes: less than what the service takes unless it is told otherwise
const KNOWN = ["image/jpeg", "image/png", "image/webp"]; // others are drawn anew, where the browser knows them
const byId = (id) => document.getElementById(id);

export class Photo {
  constructor(file) {
    this.body = file;
    this.name = (file.name ?? "").replace(/\.\w+$/, "") || "photo";
    this.image = new Image();
    this.image.src = URL.createObjectURL(file);
  }

  // Whether this browser can show it. The service may know formats that it does not, and says best what is no image.
  async open() {
    this.shown = await this.image.decode().then(() => this.image.naturalWidth > 0, () => false);
    if (!this.shown) return this;
    const { naturalWidth: width, naturalHeight: height } = this.image;
    this.longest = Math.max(width, height);
    const unknown = this.body.type && !KNOWN.includes(this.body.type);
    if (this.longest > LONGEST || this.body.size > HEAVY || unknown) await this.#draw(Math.min(this.longest, LONGEST));
    return this;
  }

  get canShrink() {
    return this.shown && this.longest > 512;
  }

  shrink() {
    return this.#draw(Math.round(this.longest * 0.7));
  }

  async #draw(longest) {
    const { naturalWidth: width, naturalHeight: height } = this.image;
    const factor = longest / Math.max(width, height);
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(width * factor));
    canvas.height = Math.max(1, Math.round(height * factor));
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(this.image, 0, 0, canvas.width, canvas.height);
    const type = this.body.type === "image/jpeg" ? "image/jpeg" : "image/webp"; // WebP keeps transparency
    this.body = await new Promise((done) => canvas.toBlob(done, type, 0.92));
    this.longest = longest;
  }

  close() {
    URL.revokeObjectURL(this.image.src);
  }
}

// Calls take(file) for every photo that comes in.
export function watchForPhotos(take) {
  const input = byId("file");
  input.addEventListener("change", () => {
    if (input.files[0]) take(input.files[0]);
    input.value = ""; // the same file may be chosen again
  });
  for (const button of document.querySelectorAll("[data-do=choose]")) {
    button.addEventListener("click", () => input.click());
  }

  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files][0];
    if (file) take(file);
  });

  let inside = 0; // dragenter and dragleave come for every element on the way
  const over = (change) => {
    inside = change ? inside + change : 0;
    document.body.classList.toggle("dropping", inside > 0);
  };
  const files = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragenter", (event) => files(event) && over(1));
  document.addEventListener("dragleave", (event) => files(event) && over(-1));
  document.addEventListener("dragover", (event) => files(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!files(event)) return;
    event.preventDefault();
    over(0);
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });

  watchCamera(take);
}

function watchCamera(take) {
  const dialog = byId("camera");
  const video = dialog.querySelector("video");
  const shutter = dialog.querySelector("[data-do=take]");
  const problem = dialog.querySelector(".problem");

  async function start() {
    shutter.disabled = true;
    problem.hidden = true;
    video.hidden = false;
    dialog.showModal();
    try {
      if (!navigator.mediaDevices?.getUserMedia) throw new DOMException("", "SecurityError");
      const size = { width: { ideal: 1920 }, height: { ideal: 1080 } };
      const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user", ...size } });
      if (!dialog.open) return stop(stream);
      video.srcObject = stream;
      await video.play();
      shutter.disabled = false;
    } catch (error) {
      video.hidden = true;
      problem.textContent = sentence(wrongWithCamera(error));
      problem.hidden = false;
    }
  }

  dialog.addEventListener("close", () => {
    if (video.srcObject) stop(video.srcObject);
    video.srcObject = null;
  });
  dialog.querySelector("[data-do=close]").addEventListener("click", () => dialog.close());
  shutter.addEventListener("click", () => {
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    dialog.close();
    canvas.toBlob((blob) => take(new File([blob], "camera.jpg", { type: blob.type })), "image/jpeg", 0.95);
  });
  for (const button of document.querySelectorAll("[data-do=camera]")) button.addEventListener("click", start);
}

function stop(stream) {
  for (const track of stream.getTracks()) track.stop();
}

function wrongWithCamera(error) {
  switch (error.name) {
    case "NotFoundError":
    case "OverconstrainedError":
      return "no camera was found; connect one, or choose a photo instead";
    case "NotAllowedError":
      return "the camera may not be used; allow it for this page in the browser, or choose a photo instead";
    case "NotReadableError":
    case "AbortError":
      return "the camera is in use elsewhere; close what uses it, or choose a photo instead";
    case "SecurityError":
      return "browsers give cameras only to pages at localhost or over HTTPS; choose a photo instead";
    default:
      return `the camera does not work (${error.name}); choose a photo instead`;
  }
}
