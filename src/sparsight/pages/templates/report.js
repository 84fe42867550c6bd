for (const part of document.querySelectorAll(".latents")) {
  const cards = part.querySelector(".cards");
  const all = [...cards.children];
  const find = part.querySelector("input[type=search]");
  const sort = part.querySelector("select");
  find.hidden = sort.parentElement.hidden = false;
  find.addEventListener("input", () => {
    const words = find.value.toLowerCase().split(/\s+/);
    for (const card of all) card.hidden = !words.every((word) => card.dataset.find.includes(word));
  });
  sort.addEventListener("change", () => {
    const by = sort.value;
    const sign = by === "entropy" ? 1 : -1;
    const order = by ? [...all].sort((a, b) => sign * (a.dataset[by] - b.dataset[by])) : all;
    cards.append(...order);
  });
}
