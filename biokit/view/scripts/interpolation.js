// A slider along the way between two molecules. data: {title, smiles, shares, similarities, sheet}
function draw(root, data) {
  const { sheet } = data;
  const last = data.smiles.length - 1;
  const [width, height, left, top] = [310, 190, 36, 10];
  const x = (share) => left + share * (width - left - 10);
  const y = (value) => top + (1 - value) * (height - top - 26);
  const svg = shape("svg", { width, height, role: "img", "aria-label": "similarity to both ends along the way", style: "max-width:100%" });
  for (const value of [0, 0.5, 1]) {
    svg.append(shape("line", { x1: left, x2: width - 10, y1: y(value), y2: y(value), stroke: "#dddddd" }),
      shape("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end", "font-size": 11, fill: "#616161" }, String(value)));
  }
  const known = data.shares.map((share, i) => [share, data.similarities[i]]).filter(([, pair]) => pair);
  ["#00528c", "#b84000"].forEach((colour, end) => {
    const points = known.map(([share, pair]) => `${x(share)},${y(pair[end])}`).join(" ");
    svg.append(shape("polyline", { points, fill: "none", stroke: colour, "stroke-width": 2, "stroke-dasharray": end ? "6 4" : "none" }));
    for (const [share, pair] of known) {
      svg.append(end ? shape("rect", { x: x(share) - 3, y: y(pair[end]) - 3, width: 6, height: 6, fill: colour })
        : shape("circle", { cx: x(share), cy: y(pair[end]), r: 3.5, fill: colour }));
    }
  });
  const cursor = shape("line", { y1: top, y2: height - 26, stroke: "#212121", "stroke-width": 1.5 });
  svg.append(cursor, shape("text", { x: left, y: height - 6, "font-size": 12, fill: "#616161" }, "similarity"),
    shape("text", { x: left + 75, y: height - 6, "font-size": 12, fill: "#00528c" }, "\u25cf to the first"),
    shape("text", { x: left + 175, y: height - 6, "font-size": 12, fill: "#b84000" }, "\u25a0 to the last"));

  const picture = make("div", { style: `width:${sheet.width}px;height:${sheet.height}px` });
  const label = make("div", { class: "biokit-label", "aria-live": "polite", style: "min-height:3em;overflow-wrap:anywhere" });
  const slider = make("input", { type: "range", min: "0", max: String(last), value: "0", step: "1", class: "biokit-slider",
    "aria-label": "point on the way", style: `width:${width - left}px;margin-left:${left - 8}px;max-width:90%`, oninput: () => show() });
  function show() {
    const i = Number(slider.value);
    const pair = data.similarities[i];
    picture.replaceChildren(sheet.drawn[i] ? tile(sheet, i, { "aria-label": data.smiles[i] })
      : make("div", { style: "padding:12px;border:1px dashed #9e9e9e;color:#a33600;overflow-wrap:anywhere" }, `not a molecule: ${data.smiles[i]}`));
    const words = pair ? `similarity to the first ${pair[0].toFixed(2)}, to the last ${pair[1].toFixed(2)}` : "not a molecule";
    label.replaceChildren(`point ${i + 1} of ${last + 1}, ${Math.round(100 * data.shares[i])} % of the way: ${words}`, make("br", {}),
      make("code", {}, data.smiles[i] || "(empty)"));
    cursor.setAttribute("x1", x(data.shares[i]));
    cursor.setAttribute("x2", x(data.shares[i]));
  }
  root.append(make("div", { style: "font-weight:bold;font-size:15px;margin:2px 0 6px" }, data.title),
    make("div", { style: "display:flex;flex-wrap:wrap;gap:12px;align-items:center" }, picture,
      make("div", { style: `max-width:${width}px` }, svg, slider)), label);
  show();
}
