// Opens a notebook in JupyterLab with headless Chromium, runs all cells, waits for the live panel to show steps,
// clicks its stop button, and waits until the stopped run's last curve stands in the panel's place.
//
// node stop_button.mjs URL SCREENSHOT_STEM CHROMIUM PROFILE_DIR [FIRST_STEP]; prints one JSON object.
// playwright-core is found in the folder BIOKIT_NODE_MODULES, or in node_modules beside this file.
import { createRequire } from "node:module";
import path from "node:path";

const [url, screenshotStem, chromiumPath, profileDir, firstStep = "3"] = process.argv.slice(2);
const require = createRequire(path.join(process.env.BIOKIT_NODE_MODULES ?? import.meta.dirname, "stop_button.cjs"));
const { chromium } = require("playwright-core");

const CELL_TIMEOUT_MS = 240_000;
const STOP_TIMEOUT_MS = 30_000;
const flags = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];

const failed = [];
const foreign = [];
const errors = [];
const context = await chromium.launchPersistentContext(profileDir, {
  executablePath: chromiumPath, headless: true, args: flags, viewport: { width: 1200, height: 1000 },
});
try {
  const page = await context.newPage();
  const isLocal = (address) => ["127.0.0.1", "localhost", ""].includes(new URL(address).hostname);
  page.on("request", (request) => { if (!isLocal(request.url())) foreign.push(request.url()); });
  page.on("requestfailed", (request) => failed.push(`${request.url()} ${request.failure()?.errorText}`));
  page.on("console", (message) => { if (message.type() === "error") errors.push(message.text()); });

  await page.goto(url, { waitUntil: "load" });
  await page.waitForSelector(".jp-Notebook .jp-Cell", { timeout: CELL_TIMEOUT_MS });
  await page.waitForTimeout(3000);
  await page.locator(".lm-MenuBar-itemLabel", { hasText: /^Run$/ }).click();
  await page.locator(".lm-Menu-itemLabel", { hasText: /^Run All Cells$/ }).click();

  const button = page.locator("button.biokit-stop");
  await button.waitFor({ state: "visible", timeout: CELL_TIMEOUT_MS });
  const label = page.locator(".widget-hbox", { has: button }).locator(".widget-label");
  const step = async () => Number(/step (\d+)/.exec(await label.textContent())?.[1] ?? 0);
  const waitUntil = async (condition, timeoutMs, what) => {
    for (const end = Date.now() + timeoutMs; !(await condition()); await page.waitForTimeout(200)) {
      if (Date.now() > end) throw new Error(`${what} did not come; the panel says: ${await label.textContent()}`);
    }
  };
  const panelText = () => label.textContent();
  await waitUntil(async () => (await step()) >= Number(firstStep), CELL_TIMEOUT_MS, `step ${firstStep}`);
  const before = await panelText();
  await button.scrollIntoViewIfNeeded();
  await page.screenshot({ path: `${screenshotStem}_running.png` });

  const clicked = Date.now();
  await button.click();
  // the kernel answers by disabling it; by the next look it may be gone already
  const answered = async () => (await button.count()) === 0 || (await button.isDisabled({ timeout: 200 }).catch(() => true));
  let pressed = false;
  for (const end = Date.now() + 10_000; !pressed && Date.now() < end; await page.waitForTimeout(50)) pressed = await answered();
  await button.waitFor({ state: "detached", timeout: STOP_TIMEOUT_MS });  // the run's last curve takes the panel's place
  const seconds = (Date.now() - clicked) / 1000;
  const curve = page.locator(".jp-Cell", { hasText: "LivePanel(run)" }).locator(".jp-RenderedImage img");
  await curve.waitFor({ state: "visible", timeout: STOP_TIMEOUT_MS });
  await curve.scrollIntoViewIfNeeded();
  await page.waitForTimeout(1500);
  await page.screenshot({ path: `${screenshotStem}_stopped.png` });
  const width = await curve.evaluate((image) => image.naturalWidth);
  console.log(JSON.stringify({ before, pressed, seconds, width, failed, foreign, errors }));
} catch (error) {
  const page = context.pages().at(-1);
  await page?.screenshot({ path: `${screenshotStem}_error.png` }).catch(() => {});
  console.log(JSON.stringify({ error: String(error), failed, foreign, errors }));
  process.exitCode = 1;
} finally {
  await context.close();
}
