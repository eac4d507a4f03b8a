// The picture that stands for a live panel, which is the output before it: the page shows one of the two. A panel that a
// saved notebook brings back without its kernel answers nothing, so it is the one that steps back.
// data: {panel} (the class of the live panel)
function draw(root, data, place) {
  root.append(...Array.from(place.childNodes), make("div", { class: "biokit-note", style: "color:#616161;padding:2px 0" },
    "A picture of the first samples. The panel itself needs a kernel: run the notebook."));
  const output = place.closest(".jp-OutputArea-child");
  const area = output?.parentElement ?? document.body;
  const show = () => {
    const isLive = area.querySelector(`.${data.panel}:not(.jupyter-widgets-disconnected)`) !== null;
    root.style.display = isLive ? "none" : "";
    const panel = output?.previousElementSibling;
    if (panel?.querySelector(".jupyter-widgets")) panel.style.display = isLive ? "" : "none";
  };
  new MutationObserver(show).observe(area, { subtree: true, childList: true, attributeFilter: ["class"] });
  show();
}
