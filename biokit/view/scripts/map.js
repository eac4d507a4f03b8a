// A map of molecules: the one under the pointer is drawn. data: {title, smiles, places, names, groups, colours, markers,
// columns, values, sheet}
function draw(root, data) {
  const { sheet } = data;
  const [size, margin] = [520, 16];
  const counts = data.names.map((_, g) => data.groups.filter((group) => group === g).length);
  const forms = { o: null, s: [4, 45], D: [4, 0], "^": [3, -90], v: [3, 90], P: [5, -90] };  // corners, first angle
  function point(group, x, y, radius) {
    const form = forms[data.markers[group]];
    const look = { fill: data.colours[group], "fill-opacity": counts[group] <= 3 ? 1 : 0.75, stroke: counts[group] <= 3 ? "#212121" : "none" };
    if (!form) return shape("circle", { cx: x, cy: y, r: radius, ...look });
    const [corners, first] = form;
    const points = Array.from({ length: corners }, (_, k) => {
      const angle = ((first + (360 * k) / corners) * Math.PI) / 180;
      return `${(x + 1.25 * radius * Math.cos(angle)).toFixed(1)},${(y + 1.25 * radius * Math.sin(angle)).toFixed(1)}`;
    });
    return shape("polygon", { points: points.join(" "), ...look });
  }
  const at = (i) => [margin + data.places[i][0] * (size - 2 * margin), margin + (1 - data.places[i][1]) * (size - 2 * margin)];
  const svg = shape("svg", { viewBox: `0 0 ${size} ${size}`, role: "img", "aria-label": data.title, class: "biokit-map",
    style: `flex:1 1 ${0.7 * size}px;min-width:0;max-width:${size}px;border:1px solid #9e9e9e;border-radius:5px;cursor:crosshair` });
  const layers = data.names.map(() => svg.appendChild(shape("g", {})));
  data.groups.forEach((group, i) => layers[group].append(point(group, ...at(i), counts[group] <= 3 ? 9 : 4)));
  const ring = svg.appendChild(shape("circle", { r: 11, fill: "none", stroke: "#212121", "stroke-width": 2, visibility: "hidden" }));

  const card = make("div", { class: "biokit-card", "aria-live": "polite",
    style: `min-height:${sheet.height + 90}px;overflow-wrap:anywhere` });
  let [kept, shown] = [-1, -1];
  const hidden = new Set();
  function show(i) {
    if (i === shown) return;
    shown = i;
    const values = data.columns.map((name, c) => `${name} ${data.values[c][i] ?? "\u2013"}`);
    card.replaceChildren(
      sheet.drawn[i] ? tile(sheet, i, { "aria-label": data.smiles[i] }) : make("div", { style: "color:#a33600" }, "not drawn"),
      make("div", { style: `font-weight:bold;color:${data.colours[data.groups[i]]}` }, data.names[data.groups[i]]),
      make("code", { style: "font-size:12px" }, data.smiles[i]), ...values.map((text) => make("div", {}, text)));
    const [x, y] = at(i);
    ring.setAttribute("cx", x);
    ring.setAttribute("cy", y);
    ring.setAttribute("visibility", "visible");
  }
  function nearest(event) {
    const box = svg.getBoundingClientRect();
    const [px, py] = [((event.clientX - box.left) / box.width) * size, ((event.clientY - box.top) / box.height) * size];
    let [best, distance] = [-1, Infinity];
    data.places.forEach((_, i) => {
      if (hidden.has(data.groups[i])) return;
      const [x, y] = at(i);
      const apart = (x - px) ** 2 + (y - py) ** 2;
      if (apart < distance) [best, distance] = [i, apart];
    });
    return best;
  }
  svg.addEventListener("mousemove", (event) => { const i = nearest(event); if (kept < 0 && i >= 0) show(i); });
  svg.addEventListener("click", (event) => {
    const i = nearest(event);
    kept = kept < 0 ? i : -1;
    if (i >= 0) show(i);
    hint.textContent = kept < 0 ? free : "Kept; click again to go on.";
  });
  const legend = data.names.map((name, g) => {
    const key = shape("svg", { width: 18, height: 18 });
    key.append(point(g, 9, 9, 6));
    const button = make("button", { type: "button", "aria-pressed": "true", class: "biokit-group", onclick: () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      button.style.opacity = on ? 1 : 0.4;
      layers[g].setAttribute("visibility", on ? "visible" : "hidden");
      if (on) hidden.delete(g); else hidden.add(g);
    }, style: "display:flex;align-items:center;gap:5px;background:none;border:1px solid #ccc;border-radius:4px;cursor:pointer" }, key, `${name} (${counts[g]})`);
    return button;
  });
  const free = "Point at the map: the nearest molecule is drawn. Click to keep it.";
  const hint = make("div", { style: "color:#616161" }, free);
  root.append(make("div", { style: "font-weight:bold;font-size:15px;margin:2px 0 6px" }, data.title),
    make("div", { style: "display:flex;flex-wrap:wrap;gap:6px;margin-bottom:6px" }, ...legend),
    make("div", { style: "display:flex;flex-wrap:wrap;gap:16px;align-items:flex-start" }, svg, make("div", { style: `width:${sheet.width}px` }, hint, card)));
  show(data.groups.indexOf(Math.max(...data.groups)));
}
