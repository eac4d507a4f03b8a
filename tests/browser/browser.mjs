// What the browser scripts share: headless Chromium on notebooks.
//
// node SCRIPT URL SCREENSHOT_STEM CHROMIUM PROFILE_DIR; prints one JSON object.
// playwright-core is found in the folder BIOKIT_NODE_MODULES, or in node_modules beside this file.
import { createRequire } from "node:module";
import path from "node:path";

export const CELL_TIMEOUT_MS = 240_000;
const VIEW_TIMEOUT_MS = 20_000;
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

// Opens a notebook in JupyterLab and waits until its cells are there and its kernel, which the page is connected to, rests.
export async function openNotebook(page, address) {
  await page.goto(address, { waitUntil: "load" });
  await page.waitForSelector(".jp-Notebook .jp-Cell", { timeout: CELL_TIMEOUT_MS });
  const { origin, pathname } = new URL(address);
  let sessions = [];
  const isReady = async () => {
    sessions = await (await page.request.get(`${origin}/api/sessions`)).json();
    const kernel = sessions.find((one) => pathname.endsWith(`/tree/${one.path}`))?.kernel;
    return kernel?.execution_state === "idle" && kernel.connections > 0;
  };
  await waitUntil(page, isReady, CELL_TIMEOUT_MS, async () => `no kernel: ${JSON.stringify(sessions)}`);
  await page.waitForSelector(".jp-Notebook-ExecutionIndicator[data-status='idle']", { timeout: CELL_TIMEOUT_MS });
}

// Waits until every code cell has run; fails at the first cell with an error.
export async function waitForRun(page) {
  const prompts = page.locator(".jp-CodeCell .jp-InputArea-prompt");
  const error = page.locator(".jp-OutputArea-output", { hasText: /-{40,}\s*\w+\s+Traceback \(most recent call last\)/ });
  const open = async () => (await prompts.allTextContents()).filter((text) => !/\[\d+\]/.test(text));
  const isOver = async () => {
    if (await error.count() > 0) throw new Error(await error.first().innerText());
    return (await open()).length === 0;
  };
  await waitUntil(page, isOver, CELL_TIMEOUT_MS, async () => `not run: ${await open()}`);
}

// The outputs of the first cell that has this source.
export function outputOf(page, source) {
  return page.locator(".jp-CodeCell", { has: page.locator(".jp-InputArea", { hasText: source }) }).first().locator(".jp-Cell-outputArea");
}

// Scrolls to a view and waits until its script has drawn it: a 3D view has a canvas then.
export async function waitForView(output) {
  await output.scrollIntoViewIfNeeded();
  await output.locator(".biokit-live").first().waitFor({ state: "visible", timeout: VIEW_TIMEOUT_MS });
  if (await output.locator(".biokit-stage, .biokit-live > .biokit-note:empty").count() > 0) {
    await output.locator(".biokit-stage canvas").first().waitFor({ state: "visible", timeout: VIEW_TIMEOUT_MS });
  }
}

// What a person does with a view, and what it answers with.
export const ACTIONS = {
  async conformers(output) {
    const before = await output.locator(".biokit-caption").textContent();
    await output.locator(".biokit-next").click();
    await output.locator(".biokit-hydrogens").click();
    return [before, await output.locator(".biokit-caption").textContent()];
  },
  async contributions(output) {
    await output.locator(".biokit-atom").last().hover();
    return [await output.locator(".biokit-detail").textContent()];
  },
  async attention(output) {
    await output.locator(".biokit-head").selectOption("0");
    await output.locator(".biokit-atom").nth(3).hover();
    const encoder = await output.locator(".biokit-detail").textContent();
    await output.locator(".biokit-kind").selectOption("cross");
    await output.locator(".biokit-query").nth(2).hover();
    return [encoder, await output.locator(".biokit-detail").textContent()];
  },
  // sorted by the column that is under the tiles; then the first two are selected and copied
  async grid(output) {
    const cards = output.locator(".biokit-card");
    const legend = (await cards.first().innerText()).replace(/ \S+$/, "").trim();
    await output.locator(".biokit-sort").selectOption({ label: legend });
    const ascending = await cards.allInnerTexts();
    await output.locator(".biokit-direction").click();
    const descending = await cards.allInnerTexts();
    await cards.nth(0).click();
    await cards.nth(1).click();
    const detail = await output.locator(".biokit-detail").innerText();
    const count = await output.locator(".biokit-count").textContent();
    await output.locator(".biokit-copy").click();
    return { ascending, descending, detail, count, copied: JSON.parse(await output.locator(".biokit-selection").inputValue()),
      titles: [await cards.nth(0).getAttribute("title"), await cards.nth(1).getAttribute("title")] };
  },
  // points at the first molecule, keeps it by a click, points at the last one; frees it, points there again
  async map(output) {
    const map = output.locator(".biokit-map");
    const drawn = () => output.locator(".biokit-card [role=img]").getAttribute("aria-label");
    const at = (which) => map.evaluate((svg, which) => {
      const [frame, box] = [svg, [...svg.querySelectorAll("g > *")].at(which)].map((one) => one.getBoundingClientRect());
      return { x: box.x + box.width / 2 - frame.x, y: box.y + box.height / 2 - frame.y };
    }, which);
    const seen = [];
    for (const [act, which] of [["hover", 0], ["click", 0], ["hover", -1], ["click", -1], ["hover", -1]]) {
      await map[act]({ position: await at(which) });
      seen.push(await drawn());
    }
    return seen;
  },
  async interpolation(output) {
    const label = () => output.locator(".biokit-label").innerText();
    const seen = [await label()];
    await output.locator(".biokit-slider").focus();
    for (const key of ["ArrowRight", "End"]) {
      await output.locator(".biokit-slider").press(key);
      seen.push(await label());
    }
    return seen;
  },
};

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
    page.on("response", (response) => { if (response.status() >= 400) failed.push(`${response.url()} ${response.status()}`); });
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
