// Runs notebook 10 to its end, uses every view as a person does, and samples in its panel.
import { ACTIONS, lookAtRun, outputOf, screenshotStem, waitForRun, waitForView, waitUntil } from "./browser.mjs";

const ANSWER_TIMEOUT_MS = 30_000;
const VIEWS = {  // name -> [what its cell says, what a person does with it]
  conformers: ["show_conformers(", "conformers"],
  attention: ["show_attention(", "attention"],
  neighbours: ["show_grid(near", "grid"],
  found: ['title="New molecules around', "grid"],
  map: ["show_map(", "map"],
  interpolation: ["show_interpolation(way", "interpolation"],
  best: ["show_grid(top", "grid"],
  predicted: ['title="Predicted"', "grid"],
  contributions: ["show_contributions(example", "contributions"],
};

// Turns the radius up and samples; then asks for something that is no molecule.
async function usePanel(page, shoot) {
  const output = outputOf(page, "panel = SamplingPanel(");
  const row = output.locator(".widget-hslider", { hasText: "radius" });
  const image = output.locator(".widget-image, img.jupyter-widgets").first();
  const status = output.locator(".widget-hbox", { has: page.locator(".biokit-sample") }).locator(".widget-label");
  const press = () => output.locator("button.biokit-sample").click();
  const seen = { radii: [await row.locator(".widget-readout").innerText()], status: [await status.innerText()] };
  const first = await image.getAttribute("src");
  await shoot(output, "panel");
  await row.locator(".noUi-handle").focus();
  for (let i = 0; i < 5; i++) await row.locator(".noUi-handle").press("ArrowRight");
  seen.radii.push(await row.locator(".widget-readout").innerText());
  await press();
  await waitUntil(page, async () => (await image.getAttribute("src")) !== first, ANSWER_TIMEOUT_MS, async () => "no new samples");
  seen.status.push(await status.innerText());
  seen.width = await image.evaluate((one) => one.naturalWidth);
  await shoot(output, "panel_sampled");
  await output.locator(".widget-text input").fill("C1CC(");
  await press();
  await waitUntil(page, async () => !/are molecules/.test(await status.innerText()), ANSWER_TIMEOUT_MS, async () => "no error is told");
  seen.status.push(await status.innerText());
  await shoot(output, "panel_error");
  return { ...seen, stills: await output.locator(".biokit-view:visible").count() };
}

await lookAtRun(async (page, shoot) => {
  await waitForRun(page);
  const views = {};
  for (const [name, [source, action]] of Object.entries(VIEWS)) {
    const output = outputOf(page, source);
    await waitForView(output);
    views[name] = await ACTIONS[action](output);
    await shoot(output, name);
  }
  await outputOf(page, "show_conformers(").locator(".biokit-stage").screenshot({ path: `${screenshotStem}_stage.png` });
  const panel = await usePanel(page, shoot);
  const widths = await page.locator(".jp-RenderedImage img").evaluateAll((images) => images.map((one) => one.naturalWidth));
  const errors = await page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").allInnerTexts();
  return { views, panel, widths, stderr: errors };
});
