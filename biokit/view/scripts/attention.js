// Attention of one molecule. data: {title, image, width, height, radius, tokens, targets, atoms: [[token, x, y]], layers,
// heads, encoder, cross}; the weights are bytes, 255 times the square root, [layer][head][looks][is looked at].
const WARM = "245,143,77";
function draw(root, data) {
  const unpack = (text) => Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
  const weights = { encoder: unpack(data.encoder), cross: unpack(data.cross) };
  const numKeys = data.tokens.length;
  const looking = () => (kind.value === "encoder" ? data.tokens : data.targets);
  const same = data.targets.every((token, i) => token === data.tokens[i]); // the decoder reads the molecule itself
  let selected = data.atoms[0][0];

  const option = (value, text) => make("option", { value: String(value) }, text);
  const choice = (name, ...options) => make("select", { class: `biokit-${name}`, "aria-label": name, onchange: () => fill() }, ...options);
  const kind = choice("kind", option("encoder", "encoder looks at itself"), option("cross", "decoder looks at encoder"));
  const layer = choice("layer", ...Array.from({ length: data.layers }, (_, i) => option(i, `layer ${i + 1}`)));
  const head = choice("head", option(-1, `mean of ${data.heads} heads`), ...Array.from({ length: data.heads }, (_, i) => option(i, `head ${i + 1}`)));
  layer.value = String(data.layers - 1);

  function row(query) {
    const values = weights[kind.value];
    const chosen = Number(head.value) < 0 ? Array.from({ length: data.heads }, (_, i) => i) : [Number(head.value)];
    return data.tokens.map((_, key) => chosen.reduce((sum, h) => {
      const at = ((Number(layer.value) * data.heads + h) * looking().length + query) * numKeys + key;
      return sum + (values[at] / 255) ** 2;
    }, 0) / chosen.length);
  }

  const svg = shape("svg", { viewBox: `0 0 ${data.width} ${data.height}`, style: `display:block;width:100%;max-width:${data.width}px` },
    shape("image", { href: data.image, width: data.width, height: data.height }));
  const discs = data.atoms.map(([token, x, y]) => {
    const disc = shape("circle", { cx: x, cy: y, r: data.radius, class: "biokit-atom", tabindex: 0, role: "button",
      style: "mix-blend-mode:multiply;cursor:pointer", stroke: "#00528c" }, shape("title", {}, ""));
    const pick = () => { if (kind.value === "encoder" || same) select(token); };
    disc.addEventListener("mouseenter", pick);
    disc.addEventListener("focus", pick);
    svg.append(disc);
    return disc;
  });
  const chip = (token, attributes) => make("button", { type: "button", ...attributes,
    style: "font:13px monospace;padding:2px 5px;margin:1px;border:2px solid #d0d0d0;border-radius:4px;color:#212121;background:#fff" }, token);
  const queries = make("div", { class: "biokit-queries" });
  const keys = data.tokens.map((token) => chip(token, { class: "biokit-key", tabindex: "-1" }));
  const detail = make("div", { class: "biokit-detail", "aria-live": "polite", style: "padding:4px 0;min-height:2.8em" });

  function fill() {
    queries.replaceChildren(...looking().map((token, i) => chip(token, { class: "biokit-query", onmouseenter: () => select(i), onfocus: () => select(i) })));
    select(Math.min(selected, looking().length - 1));
  }
  function select(query) {
    selected = query;
    const shares = row(query);
    const most = Math.max(...shares);
    const colour = (key) => `rgba(${WARM},${(shares[key] / most).toFixed(3)})`;
    data.atoms.forEach(([token], i) => {
      discs[i].setAttribute("fill", colour(token));
      discs[i].setAttribute("stroke-width", token === query && (kind.value === "encoder" || same) ? 3 : 0);
      discs[i].firstChild.textContent = `${data.tokens[token]}: ${shares[token].toFixed(3)}`;
    });
    keys.forEach((element, key) => { element.style.background = colour(key); element.title = shares[key].toFixed(3); });
    Array.from(queries.children).forEach((element, i) => { element.style.borderColor = i === query ? "#00528c" : "#d0d0d0"; });
    const order = shares.map((_, key) => key).sort((a, b) => shares[b] - shares[a]).slice(0, 4);
    detail.textContent = `${looking()[query]} (token ${query + 1}) looks at ` +
      order.map((key) => `${data.tokens[key]} (token ${key + 1}) ${shares[key].toFixed(3)}`).join(", ");
  }

  const label = (text) => make("div", { style: "color:#616161;padding-top:4px" }, text);
  root.append(make("div", { style: "font-weight:bold;font-size:15px;margin:2px 0 6px" }, data.title),
    make("div", { style: "display:flex;gap:8px;flex-wrap:wrap" }, kind, layer, head), svg, detail,
    label("point at the token or atom that looks (blue frame)"), queries,
    label("the darker, the more it is looked at"), make("div", { class: "biokit-keys" }, ...keys));
  fill();
}
