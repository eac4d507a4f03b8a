// Runs notebook 04 to its end and looks at its cards and its dashboard, first while the run goes on, then at the end.
import { CELL_TIMEOUT_MS, lookAtRun, outputOf as outputOn, waitForRun, waitUntil } from "./browser.mjs";

await lookAtRun(async (page, shoot) => {
  const outputOf = (source) => outputOn(page, source);
  const cards = {
    finished: outputOf("first = start_training"),
    failed: outputOf("os.kill(os.getpid(), signal.SIGKILL)"),
    hung: outputOf("time.sleep(600)"),
    resumed: page.locator(".jp-CodeCell", { hasText: /^\s*\[.*\]:\s*resumed\s*/ }).last().locator(".jp-Cell-outputArea"),
  };
  const panel = outputOf("start_training(longer, 2, timeout_s=timeout_s).dashboard()");
  const button = panel.locator("button.biokit-stop");
  await button.waitFor({ state: "visible", timeout: CELL_TIMEOUT_MS });
  const image = panel.locator("img");
  const label = async () => (await panel.locator(".widget-label").first().textContent()) ?? "";
  const isDrawn = async () => (await image.count()) > 0 && /step [1-9]/.test(await label());
  await waitUntil(page, isDrawn, CELL_TIMEOUT_MS, async () => `no steps in the dashboard: ${await label()}`);
  const live = { label: await label() };
  await shoot(button, "dashboard_live");

  await waitForRun(page);
  await button.waitFor({ state: "detached", timeout: CELL_TIMEOUT_MS });  // the last picture takes the dashboard's place
  const texts = {};
  for (const [name, card] of Object.entries(cards)) {
    texts[name] = await card.innerText();
    await shoot(card, name);
  }
  await shoot(panel, "dashboard");
  await shoot(outputOf("show_plan(plans)"), "plan");
  const widths = await page.locator(".jp-OutputArea img").evaluateAll((images) => images.map((one) => one.naturalWidth));
  return { live, texts, widths, panel: await panel.innerText() };
});
