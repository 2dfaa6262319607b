// On the page about troubleshooting: paste an error, see the entries whose sentence it is.
(() => {
  const place = document.getElementById("find");
  if (!place) return;

  const SHOWN = 4;
  const EXACT = 1000;
  const words = (text) => text.toLowerCase().match(/[a-z0-9_]{2,}/g) || [];
  const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&").replace(/\s+/g, "\\s+");
  const entries = [...place.closest("article").querySelectorAll("li > code:first-child")].map((code) => {
    const parts = code.textContent.split(/\{[^{}]*\}/);
    return {
      item: code.parentElement,
      pattern: new RegExp(parts.map(escaped).join("[\\s\\S]*?"), "i"),
      length: parts.join("").length,
      words: new Set(words(parts.join(" "))),
    };
  });

  // A sentence that is there word for word counts for its length, any other for the words they share.
  const likeness = (entry, text, said) => {
    if (entry.pattern.test(text)) return EXACT + entry.length;
    const shared = [...entry.words].filter((word) => said.has(word)).length;
    return shared < 2 ? 0 : (100 * shared) / Math.max(entry.words.size, 4);
  };

  const box = document.createElement("textarea");
  box.rows = 2;
  box.placeholder = "error: …";
  box.setAttribute("aria-label", "An error to look for");
  const found = document.createElement("div");
  found.setAttribute("aria-live", "polite");
  place.append(box, found);

  box.addEventListener("input", () => {
    const text = box.value.replace(/\s+/g, " ");
    const said = new Set(words(text));
    const liked = entries.map((entry) => [likeness(entry, text, said), entry]).sort(([one], [other]) => other - one);
    const least = liked[0][0] >= EXACT ? EXACT : 40;
    const best = liked.filter(([score]) => score >= least).slice(0, SHOWN);
    const list = document.createElement("ul");
    for (const [, entry] of best) {
      const copy = entry.item.cloneNode(true);
      const heading = headingOf(entry.item);
      const link = document.createElement("a");
      link.href = `#${heading.id}`;
      link.textContent = heading.firstChild.textContent;
      link.className = "room";
      copy.append(link);
      list.append(copy);
    }
    found.replaceChildren(...(best.length ? [list] : text.trim() ? [document.createTextNode("No sentence is like this one.")] : []));
  });

  function headingOf(item) {
    let node = item.parentElement;
    while (node.tagName !== "H2") node = node.previousElementSibling;
    return node;
  }
})();
