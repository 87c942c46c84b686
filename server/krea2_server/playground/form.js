// The form: its values as settings, its limits by the model.

import { Adapters } from "./adapters.js";
import { byId } from "./dom.js";
import { MAX_SEED } from "./settings.js";
import { CUSTOM, offerSizes, sidesOf } from "./sizes.js";

const KEY_ITEM = "krea2-api-key";
const UNKNOWN_MODEL = {
  max_side: 2048,
  max_pixels: 2048 * 2048,
  trained_side: 2048,
  size_multiple: 16,
  max_aspect: 3,
  max_prompt: 32_000,
  output_formats: ["png", "jpeg", "webp"],
};

export class Form {
  constructor() {
    this.element = byId("form");
    this.prompt = byId("prompt");
    this.size = byId("size");
    this.custom = this.element.querySelectorAll(".custom");
    this.width = byId("width");
    this.height = byId("height");
    this.seed = byId("seed");
    this.key = byId("key");
    this.adapters = new Adapters(this.prompt, this.key);
    this.limits = UNKNOWN_MODEL;
    this.sizeIsChosen = false;
    this.lastSeed = null;

    offerSizes(this.size, this.limits);
    this.key.value = sessionStorage.getItem(KEY_ITEM) ?? "";
    this.prompt.addEventListener("keydown", (event) => this.#enter(event));
    this.size.addEventListener("change", () => {
      this.sizeIsChosen = true;
      this.#showCustom();
      this.#check();
    });
    this.element.addEventListener("input", () => this.#check());
    this.key.addEventListener("change", () => this.#keepKey());
    byId("reuse-seed").addEventListener("click", () => {
      this.seed.value = this.lastSeed;
      this.#check();
    });
    // A field in closed details cannot be pointed at.
    this.element.addEventListener("invalid", (event) => this.#reveal(event.target), true);
    this.#showCustom();
    this.#check();
  }

  /** Take over a model's limits, and its defaults where nothing is entered. */
  setModel(model) {
    this.limits = { ...UNKNOWN_MODEL, ...model };
    offerSizes(this.size, this.limits, this.sizeIsChosen ? this.size.value : null);
    for (const side of [this.width, this.height]) {
      side.max = this.limits.max_side;
      side.min = side.step = this.limits.size_multiple;
    }
    for (const format of byId("format").options) {
      format.hidden = format.disabled = !this.limits.output_formats.includes(format.value);
    }
    byId("count").max = model.max_n;
    byId("steps").max = model.max_steps;
    byId("guidance").max = model.max_guidance;
    byId("steps").value ||= model.default_steps;
    byId("guidance").value ||= model.default_guidance;
    this.#showCustom();
    this.#check();
  }

  /** @returns {import("./settings.js").Settings} */
  settings() {
    const custom = `${this.width.valueAsNumber}x${this.height.valueAsNumber}`;
    return {
      prompt: this.prompt.value.trim(),
      size: this.size.value === CUSTOM ? custom : this.size.value,
      n: byId("count").valueAsNumber,
      outputFormat: byId("format").value,
      seed: this.seed.value.trim(),
      steps: byId("steps").value,
      guidance: byId("guidance").value,
      negativePrompt: byId("negative").value.trim(),
      adapters: this.adapters.settings(),
    };
  }

  /** Fill in what generated one picture: with its seed, that picture comes again. */
  fill(settings, seed) {
    this.prompt.value = settings.prompt;
    [this.width.value, this.height.value] = sidesOf(settings.size);
    this.size.value = settings.size;
    if (this.size.value !== settings.size) this.size.value = CUSTOM;
    this.sizeIsChosen = true;
    byId("count").value = 1;
    byId("format").value = settings.outputFormat;
    this.seed.value = seed;
    byId("steps").value = settings.steps;
    byId("guidance").value = settings.guidance;
    byId("negative").value = settings.negativePrompt;
    this.adapters.fill(settings.adapters);
    this.#showCustom();
    this.#check();
    this.prompt.focus();
  }

  /** The seed that "reuse last" fills in. */
  setLastSeed(seed) {
    this.lastSeed = seed;
    byId("reuse-seed").disabled = false;
  }

  /** Show and focus the field of the API key. */
  askForKey() {
    this.#reveal(this.key);
    this.key.focus();
    this.key.select();
  }

  /** Whether all is valid; points at what is not. */
  isValid() {
    return this.element.reportValidity();
  }

  #enter(event) {
    // An input method's Enter ends a word, and a held key is no second request.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.repeat) return;
    event.preventDefault();
    this.element.requestSubmit();
  }

  #showCustom() {
    const isCustom = this.size.value === CUSTOM;
    if (!isCustom) [this.width.value, this.height.value] = sidesOf(this.size.value);
    for (const field of this.custom) field.hidden = !isCustom;
    this.width.disabled = this.height.disabled = !isCustom;
  }

  #check() {
    this.height.setCustomValidity(this.#sizeProblem());
    const seed = this.seed.value.trim();
    const isSeed = seed === "" || (/^\d{1,19}$/.test(seed) && BigInt(seed) <= MAX_SEED);
    this.seed.setCustomValidity(isSeed ? "" : `A whole number from 0 to ${MAX_SEED}, or nothing.`);
    const isBlank = this.prompt.value.trim() === "";
    this.prompt.setCustomValidity(
      isBlank ? "Say what to generate." : this.#lengthProblem(this.prompt),
    );
    const negative = byId("negative");
    const isSent = Number(byId("guidance").value) > 0;
    negative.setCustomValidity(isSent ? this.#lengthProblem(negative) : "");
  }

  #sizeProblem() {
    const [width, height] = [this.width.valueAsNumber, this.height.valueAsNumber];
    const { max_pixels: maxPixels, max_aspect: maxAspect } = this.limits;
    if (width * height > maxPixels) {
      return `At most ${maxPixels.toLocaleString("en")} pixels in all.`;
    }
    const isTooLong = Math.max(width, height) > maxAspect * Math.min(width, height);
    return isTooLong ? `At most ${maxAspect} times as long as wide.` : "";
  }

  #lengthProblem(field) {
    // As the server counts: an emoji is one.
    const { length } = [...field.value.trim()];
    const { max_prompt: maxPrompt } = this.limits;
    return length > maxPrompt ? `At most ${maxPrompt.toLocaleString("en")} characters.` : "";
  }

  #keepKey() {
    sessionStorage.setItem(KEY_ITEM, this.key.value);
    if (!this.key.value) sessionStorage.removeItem(KEY_ITEM);
  }

  #reveal(field) {
    const details = field.closest("details");
    if (details) details.open = true;
  }
}
