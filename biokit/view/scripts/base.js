"use strict";
// What every view shares. A view's own script defines `draw(root, data, place)`, which returns nothing; `biokitView`
// calls it for each place on the page where the view stands, and leaves the picture there if it fails.
function biokitView(places, data) {
  for (const place of Array.from(places)) {
    if (place.dataset.drawn) continue;
    const root = document.createElement("div");
    root.className = "biokit-live";
    // JupyterLab leaves the keys to an element with this mark, else an arrow moves the notebook instead of a slider
    root.addEventListener("focusin", (event) => { event.target.dataset.lmSuppressShortcuts = "true"; });
    root.style.cssText = "font:13px/1.4 'DejaVu Sans',Verdana,sans-serif;color:#212121;background:#fff;max-width:100%";
    try {
      draw(root, data, place);
    } catch (error) {
      console.error("biokit: the view stays a picture:", error);
      continue;
    }
    place.dataset.drawn = "yes";
    place.replaceChildren(root);
  }
}

const BUTTON = "font:inherit;padding:1px 8px;border:1px solid #9e9e9e;border-radius:4px;background:#f5f5f5;color:#212121;cursor:pointer";

// An element with attributes and children; text is always set as text, never read as HTML.
function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (key === "style") element.style.cssText = value;
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

// The same for a shape of an SVG drawing.
function shape(name, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// One molecule out of a sheet of drawings: {image, width, height, columns}.
function tile(sheet, index, attributes) {
  const x = (index % sheet.columns) * sheet.width;
  const y = Math.floor(index / sheet.columns) * sheet.height;
  const style = `width:${sheet.width}px;height:${sheet.height}px;background:url(${sheet.image}) -${x}px -${y}px no-repeat`;
  return make("div", { role: "img", ...attributes, style: `${style};${attributes?.style ?? ""}` });
}
