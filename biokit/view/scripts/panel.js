// The picture that stands for a live panel: where the panel itself is on the page, the picture steps back.
// data: {panel} (the class of the live panel)
const LOOK_MS = 500, LOOKS = 60;
function draw(root, data, place) {
  const picture = Array.from(place.childNodes);
  root.append(...picture);
  let looks = 0;
  const watch = setInterval(() => {
    root.style.display = document.getElementsByClassName(data.panel).length ? "none" : "";
    if (++looks >= LOOKS || root.style.display === "none") clearInterval(watch);
  }, LOOK_MS);
}
