// Opens notebooks as they are committed, one after the other, and looks at every output; no cell is run.
// Reads notebooks.json beside the profile: [{notebook, cells, outputs}], how many of each there are to be.
import fs from "node:fs";
import path from "node:path";
import { lookAt, openNotebook, profileDir, screenshotStem, url, waitForView, waitUntil } from "./browser.mjs";

const SHOWN_TIMEOUT_MS = 20_000;
const { origin } = new URL(url);
const expected = JSON.parse(fs.readFileSync(path.join(path.dirname(profileDir), "notebooks.json"), "utf8"));

// One output: its size on the page, whether a view of ours is alive in it, its pictures (natural widths), its words.
async function lookAtOutput(page, output, stem) {
  const view = await output.locator(".biokit-view").count() > 0;
  if (view) await waitForView(output);
  if (!(await output.isVisible())) return { width: 0, height: 0, view, alive: false, images: [], text: "" };
  await output.scrollIntoViewIfNeeded();
  const images = output.locator("img");
  const areLoaded = () => images.evaluateAll((all) => all.every((one) => one.complete));
  await waitUntil(page, areLoaded, SHOWN_TIMEOUT_MS, async () => `a picture does not load: ${stem}`);
  const { width, height } = await output.boundingBox();
  if (view || (await output.locator("img, table").count()) > 0) await output.screenshot({ path: `${stem}.png` });
  const stage = output.locator(".biokit-stage");
  if ((await stage.count()) > 0) await stage.screenshot({ path: `${stem}_stage.png` });
  return { width, height, view, alive: (await output.locator(".biokit-live").count()) > 0,
    images: await images.evaluateAll((all) => all.map((one) => one.naturalWidth)), text: await output.innerText() };
}

await lookAt(async (page) => {
  const seen = {};
  for (const { notebook, cells, outputs } of expected) {
    await openNotebook(page, `${origin}/lab/tree/${notebook}?reset`);
    const all = page.locator(".jp-Notebook .jp-OutputArea-child");
    const counts = async () => `${await page.locator(".jp-Notebook .jp-Cell").count()} cells, ${await all.count()} outputs`;
    await waitUntil(page, async () => (await counts()) === `${cells} cells, ${outputs} outputs`, SHOWN_TIMEOUT_MS,
      async () => `${notebook}: ${await counts()}, not ${cells} and ${outputs}`);
    const stem = `${screenshotStem}_${notebook.replace(".ipynb", "").replace("/", "_")}`;
    seen[notebook] = [];
    for (const [i, output] of (await all.all()).entries()) seen[notebook].push(await lookAtOutput(page, output, `${stem}_${i + 1}`));
  }
  return { notebooks: seen };
});
