// Structures in 3D, one at a time. data: {title, captions, molecules, key, hydrogens, height}; `addStructures`
// gives them to the viewer. Until 3Dmol is on the page, and without WebGL, the picture stays, and a line says why.
function draw(root, data, place) {
  const picture = make("div", {}, ...Array.from(place.childNodes));
  const note = make("div", { class: "biokit-note", role: "status", style: "color:#616161;padding:2px 0" });
  root.append(picture, note);
  const start = () => {
    if (typeof window.$3Dmol?.createViewer !== "function") {
      note.textContent = "A still picture: the script for 3D is not on this page. Run the cell with the first 3D view " +
        "again; if it is gone, restart the kernel and run this cell.";
      window.addEventListener("biokit-3dmol", start, { once: true });
      return;
    }
    try {
      if (!document.createElement("canvas").getContext("webgl2")) throw new Error("no WebGL 2");
      show(root, data, picture);
      note.remove();
    } catch (error) {
      root.replaceChildren(picture, note);
      note.textContent = `A still picture: this browser cannot draw in 3D (${error.message}).`;
    }
  };
  // 3Dmol measures its place, which is on the page only when somebody may see it
  const watch = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    watch.disconnect();
    start();
  }, { rootMargin: "300px" });
  watch.observe(root);
}

function show(root, data, picture) {
  const stage = make("div", { class: "biokit-stage", role: "img", "aria-label": picture.querySelector("img")?.alt ?? "",
    style: `position:relative;width:100%;max-width:660px;height:${data.height}px` });
  const caption = make("span", { class: "biokit-caption", "aria-live": "polite", style: "overflow-wrap:anywhere" });
  const step = (by, label, sign) => make("button", { type: "button", class: `biokit-${label}`, style: BUTTON, "aria-label": `${label} structure`,
    onclick: () => select((selected + by + data.captions.length) % data.captions.length) }, sign);
  const hydrogens = make("input", { type: "checkbox", checked: "", class: "biokit-hydrogens", onchange: () => {
    viewer.setStyle({ elem: "H" }, hydrogens.checked ? data.hydrogens : {});
    viewer.render();
  } });
  const key = data.key.map(({ element, colour }) => make("span", { style: "white-space:nowrap" },
    make("span", { style: `display:inline-block;width:12px;height:12px;border-radius:6px;border:1px solid #9e9e9e;background:${colour};` +
      "vertical-align:-2px;margin-right:4px" }), element));
  const row = "display:flex;gap:10px;align-items:center;flex-wrap:wrap;padding:4px 0;max-width:660px";
  const steps = data.captions.length > 1 ? [step(-1, "previous", "\u25c0"), step(1, "next", "\u25b6")] : [];
  const title = data.title ? [make("div", { style: "font-weight:bold;font-size:15px;margin:2px 0 6px" }, data.title)] : [];
  root.replaceChildren(...title, stage, make("div", { style: row }, ...steps, caption),
    make("div", { style: row }, ...key, make("label", { style: "margin-left:auto" }, hydrogens, " hydrogens"),
      make("span", { style: "color:#616161" }, "drag: turn \u00b7 scroll: zoom")));
  const viewer = window.$3Dmol.createViewer(stage, { backgroundColor: "white" });
  if (!viewer) throw new Error("no viewer");
  addStructures(viewer);
  const models = data.captions.map((_, i) => viewer.getModel(i));
  let selected = -1;
  function select(index) {
    if (data.molecules[index] !== data.molecules[selected]) {
      viewer.zoomTo({ model: index });
      viewer.zoom(1.15);
    }
    selected = index;
    models.forEach((model, i) => (i === index ? model.show() : model.hide()));
    caption.textContent = data.captions[index];
    viewer.render();
  }
  select(0);
  viewer.setHoverable({}, true, (atom) => {
    if (!atom.label) atom.label = viewer.addLabel(`${atom.elem}${atom.index + 1}`, { position: atom, fontSize: 13, inFront: true });
  }, (atom) => {
    if (atom.label) viewer.removeLabel(atom.label);
    delete atom.label;
  });
  viewer.render();
}
