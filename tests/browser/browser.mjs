// What the browser scripts share: headless Chromium on notebooks.
//
// node SCRIPT URL SCREENSHOT_STEM CHROMIUM PROFILE_DIR; prints one JSON object.
// playwright-core is found in the folder BIOKIT_NODE_MODULES, or in node_modules beside this file.
import { createRequire } from "node:module";
import path from "node:path";

export const CELL_TIMEOUT_MS = 240_000;
export const [url, screenshotStem, chromiumPath, profileDir] = process.argv.slice(2);
const require = createRequire(path.join(process.env.BIOKIT_NODE_MODULES ?? import.meta.dirname, "browser.cjs"));
export const { chromium } = require("playwright-core");
export const flags = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];

// Opens the notebook, has all cells run, and calls `look(page, shoot)`.
export async function lookAtRun(look) {
  await lookAt(async (page, shoot) => {
    await openNotebook(page, url);
    await page.locator(".lm-MenuBar-itemLabel", { hasText: /^Run$/ }).click();
    await page.locator(".lm-Menu-itemLabel", { hasText: /^Run All Cells$/ }).click();
    return await look(page, shoot);
  });
}

// Opens a notebook in JupyterLab and waits until its cells are there.
export async function openNotebook(page, address) {
  await page.goto(address, { waitUntil: "load" });
  await page.waitForSelector(".jp-Notebook .jp-Cell", { timeout: CELL_TIMEOUT_MS });
  await page.waitForTimeout(3000);
}

// Calls `look(page, shoot)`; prints what it returns, and which requests failed or left this machine.
// `shoot(locator, name)` scrolls to something and takes a picture of the window.
export async function lookAt(look) {
  const [failed, foreign, errors] = [[], [], []];
  const context = await chromium.launchPersistentContext(profileDir, {
    executablePath: chromiumPath, headless: true, args: flags, viewport: { width: 1200, height: 1000 },
  });
  const page = await context.newPage();
  const shoot = async (locator, name) => {
    await locator.scrollIntoViewIfNeeded();
    await page.waitForTimeout(500);
    await page.screenshot({ path: `${screenshotStem}_${name}.png` });
  };
  try {
    const isLocal = (address) => ["127.0.0.1", "localhost", ""].includes(new URL(address).hostname);
    page.on("request", (request) => { if (!isLocal(request.url())) foreign.push(request.url()); });
    page.on("requestfailed", (request) => failed.push(`${request.url()} ${request.failure()?.errorText}`));
    page.on("console", (message) => { if (message.type() === "error") errors.push(message.text()); });
    console.log(JSON.stringify({ ...(await look(page, shoot)), failed, foreign, errors }));
  } catch (error) {
    await page.screenshot({ path: `${screenshotStem}_error.png` }).catch(() => {});
    console.log(JSON.stringify({ error: String(error), failed, foreign, errors }));
    process.exitCode = 1;
  } finally {
    await context.close();
  }
}

// Looks again and again until a condition holds; `explain` says what stands there where it does not.
export async function waitUntil(page, condition, timeoutMs, explain) {
  for (const end = Date.now() + timeoutMs; !(await condition()); await page.waitForTimeout(200)) {
    if (Date.now() > end) throw new Error(await explain());
  }
}
