// Packs for phones, where the store has any.

import { request } from "./api.js";

const FORMATS = { coreml: "Core ML, iOS 18", "coreml-single": "Core ML, iOS 16", onnx: "ONNX, Android" };
const box = document.getElementById("packs");

// onProblem is given an error, and what does it again.
export async function offerPacks(onProblem) {
  const { packs } = await (await request("v1/packs")).json();
  box.querySelector("ul").replaceChildren(...packs.map((pack) => row(pack, onProblem)));
  box.hidden = packs.length === 0;
}

function row(pack, onProblem) {
  const made = document.createElement("li");
  const name = `${FORMATS[pack.format] ?? pack.format}, ${counted(pack.concepts.length, "concept")}`;
  const older = pack.older.length ? `, ${pack.older.length} of them not the newest` : "";
  const about = `${pack.side} px, base in ${pack.precision}, ${(pack.bytes / 1e6).toFixed(1)} MB, ${pack.made_at.slice(0, 10)}${older}`;
  const told = document.createElement("span");
  told.append(
    Object.assign(document.createElement("strong"), { textContent: name }),
    Object.assign(document.createElement("span"), { className: "small", textContent: about }),
  );
  told.title = pack.concepts.join(", ");
  const button = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: "Download" });
  button.setAttribute("aria-label", `Download the pack: ${name}, ${about}`);
  const take = async () => {
    button.disabled = true;
    try {
      await save(pack);
    } catch (error) {
      onProblem(error, take);
    } finally {
      button.disabled = false;
    }
  };
  button.addEventListener("click", take);
  made.append(told, button);
  return made;
}

// Through a request, for a link cannot send the key.
async function save(pack) {
  const response = await request(pack.download.slice(1));
  const url = URL.createObjectURL(await response.blob());
  const link = document.createElement("a");
  link.href = url;
  link.download = `${pack.format}-${pack.digest.slice(0, 12)}.zip`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

function counted(count, what) {
  return `${count} ${what}${count === 1 ? "" : "s"}`;
}
