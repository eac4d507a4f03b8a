// The picture, with words for the atom under the pointer. data: {width, height, radius, places, labels}
function draw(root, data, place) {
  const picture = place.querySelector("img").cloneNode();
  picture.style.cssText = "display:block;width:100%";
  const hint = "Point at an atom for its number.";
  const detail = make("div", { class: "biokit-detail", "aria-live": "polite", style: "padding:2px 12px;min-height:1.4em" }, hint);
  const overlay = shape("svg", { viewBox: `0 0 ${data.width} ${data.height}`, style: "position:absolute;inset:0;width:100%;height:100%" });
  data.places.forEach(([x, y], i) => {
    const mark = shape("circle", { cx: x, cy: y, r: data.radius, fill: "transparent", stroke: "none", "stroke-width": 2,
      class: "biokit-atom", tabindex: 0, role: "img", "aria-label": data.labels[i] },
      shape("title", {}, data.labels[i]));
    const on = () => { mark.setAttribute("stroke", "#212121"); detail.textContent = data.labels[i]; };
    const off = () => { mark.setAttribute("stroke", "none"); detail.textContent = hint; };
    for (const [name, run] of [["mouseenter", on], ["focus", on], ["mouseleave", off], ["blur", off]]) mark.addEventListener(name, run);
    overlay.append(mark);
  });
  root.append(make("div", { style: `position:relative;max-width:${data.width}px` }, picture, overlay), detail);
}
