// Finding a concept among hundreds: by words, by state, in another order. Without it all of them are there.
const find = document.getElementById("find");
if (find) {
  const [words, state, order] = find.querySelectorAll("input, select");
  const told = find.querySelector("output");
  const gallery = document.getElementById("gallery");
  const cards = [...gallery.children];
  const by = {
    best: (a, b) => a.dataset.place - b.dataset.place,
    worst: (a, b) => b.dataset.place - a.dataset.place,
    name: (a, b) => a.id.localeCompare(b.id),
  };
  const show = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const card of cards) {
      const text = card.dataset.words;
      const shown = (!state.value || card.dataset.state === state.value) && wanted.every((word) => text.includes(word));
      card.hidden = !shown;
      count += shown;
    }
    told.textContent = count === cards.length ? `${count} concepts` : `${count} of ${cards.length} concepts`;
  };
  const sort = () => gallery.append(...[...cards].sort(by[order.value]));
  const reveal = () => {
    const card = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (card && card.hidden) {
      words.value = state.value = "";
      show();
      card.scrollIntoView();
    }
  };
  words.addEventListener("input", show);
  state.addEventListener("change", show);
  order.addEventListener("change", sort);
  addEventListener("hashchange", reveal);
  find.hidden = false;
  show();
}
