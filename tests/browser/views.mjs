// Looks at the views of an executed notebook: trusted and untrusted in JupyterLab, as a page of nbconvert without a
// network, the same where 3Dmol comes later or WebGL is missing, and as a sanitised preview without scripts.
// Reads views.json beside the notebook: [{name, alive}], `alive` a selector of what only a running script draws.
import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";
import {
  ACTIONS, chromium, chromiumPath, flags, lookAt, openNotebook, profileDir, screenshotStem, url, waitUntil,
} from "./browser.mjs";

const root = path.dirname(profileDir);
const views = JSON.parse(fs.readFileSync(path.join(root, "views.json"), "utf8"));
const ALIVE_TIMEOUT_MS = 20_000;
const outputs = (page) => page.locator(".jp-CodeCell .jp-OutputArea-child:has(.biokit-view), .jp-CodeCell .jp-OutputArea-child:has(img)");

// Every view in turn: alive, drawn, and answering.
async function lookAtLive(page, mode) {
  const seen = {};
  for (const [i, { name, alive }] of views.entries()) {
    const output = outputs(page).nth(i);
    await output.scrollIntoViewIfNeeded();
    await output.locator(alive).first().waitFor({ state: "visible", timeout: ALIVE_TIMEOUT_MS });
    await page.waitForTimeout(300);
    seen[name] = await ACTIONS[name]?.(output) ?? [];
    await page.waitForTimeout(300);
    await output.screenshot({ path: `${screenshotStem}_${mode}_${name}.png` });
  }
  await page.locator(".biokit-stage").first().screenshot({ path: `${screenshotStem}_${mode}_stage.png` });
  return seen;
}

// The pictures that stand for the views: width as stored, width on the page, alternative text.
async function lookAtPictures(page, mode) {
  const images = page.locator("img[alt]:not([alt=''])");
  await waitUntil(page, async () => (await images.count()) >= views.length, ALIVE_TIMEOUT_MS, async () => `${await images.count()} pictures`);
  await images.first().scrollIntoViewIfNeeded();
  await page.screenshot({ path: `${screenshotStem}_${mode}.png` });
  return images.evaluateAll((all) => all.map((one) => [one.naturalWidth, one.getBoundingClientRect().width, one.alt]));
}

async function withFile(file, options, prepare, look) {
  const browser = await chromium.launch({ executablePath: chromiumPath, headless: true, args: flags });
  try {
    const context = await browser.newContext({ offline: true, viewport: { width: 1200, height: 1000 }, ...options });
    const page = await context.newPage();
    await prepare?.(page);
    const requests = [];
    page.on("request", (request) => { if (!/^(file|data|blob):/.test(request.url())) requests.push(request.url()); });
    await page.goto(pathToFileURL(path.join(root, file)).href, { waitUntil: "load" });
    await page.waitForTimeout(1000);
    return { seen: await look(page), requests };
  } finally {
    await browser.close();
  }
}

async function lookAtStill(page) {
  const output = outputs(page).first();
  await output.scrollIntoViewIfNeeded();
  const note = output.locator(".biokit-note");
  await waitUntil(page, async () => (await note.textContent()) !== "", ALIVE_TIMEOUT_MS, async () => "no line says why it is still");
  return { note: await note.textContent(), width: await output.locator("img").evaluate((one) => one.naturalWidth) };
}

// The script arrives after the views: they wait with a picture and words, then come alive.
async function lookAtLate(page) {
  const still = await lookAtStill(page);
  await page.screenshot({ path: `${screenshotStem}_still.png` });
  await page.addScriptTag({ content: fs.readFileSync(path.join(root, "library.js"), "utf8") });
  await page.locator(".biokit-stage canvas").first().waitFor({ state: "visible", timeout: ALIVE_TIMEOUT_MS });
  return { ...still, notes: await page.locator(".biokit-note").count() };
}

await lookAt(async (page) => {
  await openNotebook(page, url);
  const trusted = await lookAtLive(page, "lab");
  await openNotebook(page, url.replace("views.ipynb", "untrusted.ipynb"));
  const untrusted = await lookAtPictures(page, "untrusted");
  const noWebgl = (page) => page.addInitScript(() => { HTMLCanvasElement.prototype.getContext = () => null; });
  return {
    trusted, untrusted,
    empty: await withFile("empty.html", {}, null, async () => null),
    converted: await withFile("views.html", {}, null, (page) => lookAtLive(page, "html")),
    late: await withFile("late.html", {}, null, lookAtLate),
    noWebgl: await withFile("views.html", {}, noWebgl, lookAtStill),
    preview: await withFile("preview.html", { javaScriptEnabled: false }, null, (page) => lookAtPictures(page, "preview")),
  };
});
