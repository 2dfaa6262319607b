// Requests to the service. Its problem documents (RFC 9457) become errors, a busy service is asked again when it says,
// and a key is asked for when it wants one. The key stays in this tab and goes nowhere but into a header.

import { keep, recall } from "./storage.js";

const TRIES = 6;
const LONGEST_WAIT = 60;
const dialog = document.getElementById("key");
const field = document.getElementById("key-field");

let key = recall("sessionStorage", "key") ?? "";
let asking = null;

export class Problem extends Error {
  constructor(status, { detail, near } = {}) {
    super(sentence(detail || `the service answered with status ${status}`));
    this.status = status;
    this.near = near ?? [];
  }
}

// onBusy is told the seconds that a busy service is waited for, and its sentence.
export async function request(path, { signal, onBusy, headers, ...options } = {}) {
  for (let tries = 1; ; tries++) {
    const used = key;
    const authorization = used ? { Authorization: `Bearer ${used}` } : {};
    let response;
    try {
      response = await fetch(path, { ...options, signal, headers: { ...headers, ...authorization } });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Problem(0, { detail: "the service does not answer; is it still running?" });
    }
    if (response.ok) return response;
    const problem = new Problem(response.status, await response.json().catch(() => ({})));
    if (problem.status === 401) {
      if (key === used) await askForKey(problem, used, signal);
    } else if ((problem.status === 503 || problem.status === 429) && tries < TRIES) {
      const seconds = Math.min(Number(response.headers.get("Retry-After")) || 1, LONGEST_WAIT);
      onBusy?.(seconds, problem.message);
      await pause(seconds * 1000, signal);
    } else {
      throw problem;
    }
  }
}

// One dialog for all the requests that were refused; they go on, or fail, together.
function askForKey(problem, refused, signal) {
  asking ??= new Promise((resolve, reject) => {
    document.getElementById("key-why").textContent = refused ? problem.message : "Whoever runs it can give you one.";
    field.value = "";
    dialog.addEventListener("close", () => {
      asking = null;
      if (!field.value) return reject(problem);
      key = field.value;
      field.value = "";
      keep("sessionStorage", "key", key);
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return unlessAborted(asking, signal);
}

dialog.addEventListener("cancel", () => (field.value = ""));
dialog.querySelector("[data-do=close]").addEventListener("click", () => {
  field.value = "";
  dialog.close();
});

function unlessAborted(promise, signal) {
  if (!signal) return promise;
  return Promise.race([
    promise,
    new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason), { once: true })),
  ]);
}

function pause(milliseconds, signal) {
  return unlessAborted(new Promise((resolve) => setTimeout(resolve, milliseconds)), signal);
}

export function sentence(text) {
  const trimmed = text.trim();
  return trimmed.charAt(0).toUpperCase() + trimmed.slice(1) + (/[.?!…]$/.test(trimmed) ? "" : ".");
}

// A Server-Timing header as [step, milliseconds] in its order.
export function timings(header) {
  return [...(header ?? "").matchAll(/([\w-]+);[^,]*?\bdur=([\d.]+)/g)].map(([, step, took]) => [step, Number(took)]);
}
