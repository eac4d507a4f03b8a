// Runs notebook 00 to its end and looks at its live panel while the training runs, at its curve and at its molecules.
import { CELL_TIMEOUT_MS, lookAtRun, outputOf, waitForRun, waitUntil } from "./browser.mjs";

await lookAtRun(async (page, shoot) => {
  const panel = outputOf(page, "panel = LivePanel(run)");
  const button = panel.locator("button.biokit-stop");
  await button.waitFor({ state: "visible", timeout: CELL_TIMEOUT_MS });
  const label = panel.locator(".widget-label");
  let live = "";
  const hasSteps = async () => /^running: step [1-9]/.test(live = await label.textContent());
  await waitUntil(page, hasSteps, CELL_TIMEOUT_MS, async () => `no steps in the panel: ${live}`);
  const liveWidth = await panel.locator("img").evaluate((image) => image.naturalWidth);
  await shoot(button, "live");

  await waitForRun(page);
  await button.waitFor({ state: "detached", timeout: CELL_TIMEOUT_MS });  // the last curve takes the panel's place
  const widths = {};
  const shown = { panel, curve: outputOf(page, "show_training(run)"), known: outputOf(page, "show_molecules(known[:8]"),
    novel: outputOf(page, "show_molecules(novel[:12]") };
  for (const [name, output] of Object.entries(shown)) {
    const image = output.locator("img");
    await waitUntil(page, () => image.evaluate((one) => one.complete), CELL_TIMEOUT_MS, async () => `${name} does not load`);
    widths[name] = await image.evaluate((one) => one.naturalWidth);
    await shoot(image, name);
  }
  return { live, liveWidth, widths, finished: await outputOf(page, "state = follow(run)").innerText() };
});
