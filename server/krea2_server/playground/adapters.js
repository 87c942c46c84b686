// The menu of adapters (LoRA): what the server has, and what is chosen of it.

import { fetchAdapters } from "./api.js";
import { ChosenAdapter } from "./chosen_adapter.js";
import { byId } from "./dom.js";

const MAX_CHOSEN = 4;

export class Adapters {
  /**
   * @param {HTMLTextAreaElement} prompt  takes trigger words
   * @param {HTMLInputElement} key        of the API
   */
  constructor(prompt, key) {
    this.prompt = prompt;
    this.key = key;
    this.menu = byId("adapters");
    this.select = byId("adapter");
    /** @type {import("./api.js").Adapter[]} */
    this.served = [];
    /** @type {ChosenAdapter[]} */
    this.chosen = [];

    // Files come and go while the server runs.
    this.menu.addEventListener("toggle", () => this.menu.open && this.refresh());
    this.select.addEventListener("focus", () => this.refresh());
    prompt.addEventListener("input", () => this.#showWords());
    byId("add-adapter").addEventListener("click", () => {
      const added = this.#choose(this.select.value);
      this.#show();
      added.focus();
    });
  }

  /** Ask the server what it has for the key. */
  async refresh() {
    const key = this.key.value;
    // Without an answer the list stays: whoever generates is told what is wrong.
    const served = await fetchAdapters(key).catch(() => this.served);
    if (key !== this.key.value || JSON.stringify(served) === JSON.stringify(this.served)) return;
    this.served = served;
    this.#show();
  }

  /** @returns {import("./settings.js").ChosenScale[]} */
  settings() {
    return this.chosen.map((adapter) => adapter.settings());
  }

  /** Choose what generated a picture, whether the server has it still or not. */
  fill(settings) {
    for (const adapter of this.chosen) adapter.element.remove();
    this.chosen = [];
    for (const { name, scale } of settings) this.#choose(name).setScale(scale);
    this.#show();
  }

  #choose(name) {
    const gone = { name, title: null, trigger_words: [], default_scale: 1 };
    const info = this.served.find((adapter) => adapter.name === name) ?? gone;
    const chosen = new ChosenAdapter(info, this.#label(info), this.prompt);
    chosen.onRemove(() => this.#remove(chosen));
    this.chosen.push(chosen);
    byId("adapters-chosen").append(chosen.element);
    return chosen;
  }

  #remove(adapter) {
    this.chosen = this.chosen.filter((other) => other !== adapter);
    adapter.element.remove();
    this.#show();
    const isOffering = !this.menu.hidden && !byId("adapters-add").hidden;
    (isOffering ? this.select : this.prompt).focus();
  }

  #show() {
    const names = this.chosen.map(({ info }) => info.name);
    const offered = this.served.filter(({ name }) => !names.includes(name));
    const isFull = names.length >= MAX_CHOSEN;
    this.menu.hidden = this.served.length + names.length === 0;
    byId("adapters-count").textContent = names.length > 0 ? `${names.length} chosen` : "";
    byId("adapters-add").hidden = isFull || offered.length === 0;
    byId("adapters-full").hidden = !isFull;
    this.#offer(offered);
    this.#showWords();
  }

  #offer(adapters) {
    const { value } = this.select;
    this.select.replaceChildren(
      ...adapters.map((info) => {
        const option = new Option(this.#label(info), info.name);
        option.title = info.name;
        return option;
      }),
    );
    if (adapters.some(({ name }) => name === value)) this.select.value = value;
  }

  #showWords() {
    for (const adapter of this.chosen) adapter.showWords();
  }

  // Titles are people's, who may give the same to two.
  #label({ name, title }) {
    if (!title) return name;
    const isOnly = !this.served.some((other) => other.title === title && other.name !== name);
    return isOnly ? title : `${title} (${name})`;
  }
}
