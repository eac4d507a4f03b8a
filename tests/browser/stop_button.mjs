// Waits for the live panel of notebook 03 to show steps, clicks its stop button, and waits until the stopped run's last
// curve stands in the panel's place.
import { CELL_TIMEOUT_MS, lookAtRun, waitUntil } from "./browser.mjs";

const FIRST_STEP = 3;
const STOP_TIMEOUT_MS = 30_000;

await lookAtRun(async (page, shoot) => {
  const button = page.locator("button.biokit-stop");
  await button.waitFor({ state: "visible", timeout: CELL_TIMEOUT_MS });
  const label = page.locator(".widget-hbox", { has: button }).locator(".widget-label");
  const step = async () => Number(/step (\d+)/.exec(await label.textContent())?.[1] ?? 0);
  const explain = async () => `no step ${FIRST_STEP}; the panel says: ${await label.textContent()}`;
  await waitUntil(page, async () => (await step()) >= FIRST_STEP, CELL_TIMEOUT_MS, explain);
  const before = await label.textContent();
  await shoot(button, "running");

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
  await shoot(curve, "stopped");
  return { before, pressed, seconds, width: await curve.evaluate((image) => image.naturalWidth) };
});
