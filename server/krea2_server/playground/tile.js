// One image of the gallery, from waiting over previews to the picture.

import { element, fromTemplate } from "./dom.js";
import { fileName, seedOf, sizeText } from "./settings.js";

/**
 * @typedef {object} Picture
 * @property {string} url        of the image, in this page's memory
 * @property {string} fileName
 * @property {import("./settings.js").Settings} settings
 * @property {string} seed       its own
 * @property {string} facts      size, seed and the like, for a person
 */

export class Tile {
  /**
   * @param {import("./settings.js").Settings} settings
   * @param {{open(tile: Tile): void, reuse(picture: Picture): void}} actions
   */
  constructor(settings, actions) {
    this.settings = settings;
    /** @type {Picture | null} */
    this.picture = null;
    this.element = fromTemplate("tile-template");
    this.button = this.find(".open");
    this.image = this.find("img");
    const [width, height] = settings.size.split("x");
    this.find(".frame").style.aspectRatio = `${width} / ${height}`;
    this.find(".prompt").textContent = this.find(".prompt").title = settings.prompt;
    this.find(".facts").textContent = sizeText(settings.size);
    this.button.setAttribute("aria-label", `Open: ${settings.prompt}`);
    this.button.addEventListener("click", () => actions.open(this));
    this.find(".reuse").addEventListener("click", () => actions.reuse(this.picture));
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  waiting(text) {
    this.find(".progress-text").textContent = text;
  }

  step(step, total) {
    this.element.dataset.state = "generating";
    const bar = this.find("progress");
    bar.max = total;
    // A preview takes a moment to decode, and may come after the steps that follow it.
    bar.value = Math.max(bar.value, step);
    this.find(".progress-text").textContent = `step ${bar.value} of ${total}`;
  }

  preview(b64, format) {
    this.image.src = `data:image/${format};base64,${b64}`;
    this.image.hidden = false;
  }

  /** @param {object} answer the completed event's data */
  finish(answer) {
    const { settings } = this;
    const format = answer.output_format ?? settings.outputFormat;
    const seed = seedOf(settings, answer.image_index, answer.seed);
    const facts = [sizeText(answer.size ?? settings.size), `seed ${seed}`];
    if (settings.steps) facts.push(`${settings.steps} steps`);
    if (Number(settings.guidance) > 0) facts.push(`guidance ${settings.guidance}`);
    const used = answer.lora ?? [];
    facts.push(...used.map(({ name, scale }) => `${name} at\u00a0${scale}`));
    this.picture = {
      url: URL.createObjectURL(toBlob(answer.b64_json, `image/${format}`)),
      fileName: fileName({ ...settings, outputFormat: format }, seed),
      settings: { ...settings, adapters: withScales(settings.adapters, used) },
      seed,
      facts: facts.join(" · "),
    };
    this.image.src = this.picture.url;
    this.image.alt = settings.prompt;
    this.image.hidden = false;
    this.button.disabled = false;
    this.find(".facts").textContent = this.picture.facts;
    this.#showTimings(answer.timings ?? {});
    this.find(".note").hidden = !answer.prompt_truncated;
    this.find(".note").textContent = "The model reads only the beginning of a prompt this long.";
    Object.assign(this.find(".download"), {
      href: this.picture.url,
      download: this.picture.fileName,
    });
    this.find(".tile-actions").hidden = false;
    this.find(".progress").remove();
    this.element.dataset.state = "done";
  }

  remove() {
    if (this.picture) URL.revokeObjectURL(this.picture.url);
    this.element.remove();
  }

  #showTimings(timings) {
    const list = this.find(".timings");
    for (const [name, milliseconds] of Object.entries(timings)) {
      const group = document.createElement("div");
      group.append(element("dt", "", name.replace(/_ms$/, "")));
      group.append(element("dd", "", durationText(milliseconds)));
      list.append(group);
    }
    list.hidden = list.childElementCount === 0;
  }
}

/** Milliseconds in three digits or so. */
export function durationText(milliseconds) {
  if (milliseconds < 10) return `${milliseconds.toFixed(1)} ms`;
  if (milliseconds < 1000) return `${Math.round(milliseconds)} ms`;
  return `${(milliseconds / 1e3).toFixed(milliseconds < 1e4 ? 2 : 1)} s`;
}

// Defaults may change; those that the prompt names itself stay in the prompt alone.
function withScales(adapters, used) {
  return adapters.map(({ name, scale }) => {
    const found = used.find((adapter) => adapter.name === name);
    return { name, scale: found ? String(found.scale) : scale };
  });
}

function toBlob(b64, type) {
  const text = atob(b64);
  const bytes = new Uint8Array(text.length);
  for (let index = 0; index < text.length; index += 1) bytes[index] = text.charCodeAt(index);
  return new Blob([bytes], { type });
}
