// A grid of molecules: sort, hover, select. data: {title, smiles, columns, values, legend, rest, sheet}
function draw(root, data) {
  const { sheet } = data;
  const selected = new Set();
  const order = data.smiles.map((_, i) => i);
  const words = (value) => (value === null ? "\u2013" : String(value));
  const describe = (i) => data.columns.map((name, c) => `${name} ${words(data.values[c][i])}`);

  const sorts = make("select", { "aria-label": "sort by", class: "biokit-sort", onchange: () => sort() },
    make("option", { value: "-1" }, "as given"),
    ...data.columns.map((name, c) => make("option", { value: String(c) }, name)));
  const direction = make("button", { type: "button", class: "biokit-direction", style: BUTTON, "aria-pressed": "false", onclick: () => {
    direction.setAttribute("aria-pressed", String(direction.getAttribute("aria-pressed") !== "true"));
    direction.textContent = direction.getAttribute("aria-pressed") === "true" ? "\u2193 high to low" : "\u2191 low to high";
    sort();
  } }, "\u2191 low to high");
  const count = make("span", { class: "biokit-count", "aria-live": "polite", style: "margin-left:auto" });
  const copied = make("textarea", { readonly: "", rows: "3", class: "biokit-selection", "aria-label": "selected SMILES",
    style: "display:none;width:100%;box-sizing:border-box;font:12px monospace" });
  const copy = make("button", { type: "button", class: "biokit-copy", style: BUTTON, onclick: () => {
    copied.value = JSON.stringify(order.filter((i) => selected.has(i)).map((i) => data.smiles[i]));
    copied.style.display = "block";
    copied.select();
    navigator.clipboard?.writeText(copied.value).catch(() => {});
  } }, "copy selected SMILES");
  const clear = make("button", { type: "button", class: "biokit-clear", style: BUTTON, onclick: () => {
    for (const i of Array.from(selected)) mark(i, false);
  } }, "clear");
  const detail = make("div", { class: "biokit-detail", style: "min-height:2.9em;padding:4px 0;overflow-wrap:anywhere" });
  const grid = make("div", { class: "biokit-grid", style: "display:grid;gap:4px;max-height:640px;overflow:auto;" +
    `grid-template-columns:repeat(auto-fill,minmax(${sheet.width + 6}px,1fr))` });

  function mark(i, on) {
    if (on) selected.add(i); else selected.delete(i);
    const card = cards[i];
    card.setAttribute("aria-pressed", String(on));
    card.style.borderColor = on ? "#00528c" : "#e0e0e0";
    card.style.background = on ? "#e3f0fa" : "#fff";
    card.querySelector(".biokit-check").style.visibility = on ? "visible" : "hidden";
    count.textContent = `${selected.size} of ${order.length} selected`;
  }
  const explain = (i) => { detail.replaceChildren(make("code", {}, data.smiles[i]), make("br", {}), describe(i).join(" \u00b7 ")); };

  const cards = data.smiles.map((smiles, i) => {
    const picture = sheet.drawn[i]
      ? tile(sheet, i, { "aria-label": smiles, style: "mix-blend-mode:multiply" })
      : make("div", { style: `width:${sheet.width}px;height:${sheet.height}px;overflow:hidden;overflow-wrap:anywhere;` +
          "font:11px monospace;color:#a33600" }, `not drawn: ${smiles}`);
    const legend = data.legend < 0 ? "" : describe(i)[data.legend];
    const check = make("span", { class: "biokit-check", style: "visibility:hidden;color:#00528c;font-weight:bold" }, "\u2713 ");
    const card = make("div", { class: "biokit-card", tabindex: "0", role: "button", "aria-pressed": "false", title: smiles,
      style: "border:2px solid #e0e0e0;border-radius:5px;cursor:pointer;display:flex;flex-direction:column;align-items:center",
      onclick: () => mark(i, !selected.has(i)), onmouseenter: () => explain(i), onfocus: () => explain(i),
      onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); mark(i, !selected.has(i)); } },
    }, picture, make("div", { style: "padding:2px 4px 4px;font-size:12px" }, check, legend));
    return card;
  });

  function sort() {
    const column = Number(sorts.value);
    const sign = direction.getAttribute("aria-pressed") === "true" ? -1 : 1;
    order.sort((a, b) => {
      if (column < 0) return sign * (a - b);
      const [x, y] = [data.values[column][a], data.values[column][b]];
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      return (typeof x === "number" ? sign * (x - y) : sign * String(x).localeCompare(String(y))) || a - b;
    });
    grid.replaceChildren(...order.map((i) => cards[i]));
  }

  if (data.title) root.append(make("div", { style: "font-weight:bold;font-size:15px;margin:2px 0 6px" }, data.title));
  const bar = make("div", { style: "display:flex;gap:8px;align-items:center;flex-wrap:wrap" }, "sort by", sorts, direction, count, copy, clear);
  root.append(bar, detail, grid, copied);
  if (data.rest) root.append(make("div", { style: "color:#616161" }, `and ${data.rest} more that are not shown`));
  detail.textContent = "Point at a molecule for its values; click to select it.";
  count.textContent = `0 of ${order.length} selected`;
  sort();
}
