// One adapter in the form: its scale, as a slider and as a number, and its trigger words.

import { element, fromTemplate } from "./dom.js";

export class ChosenAdapter {
  /**
   * @param {import("./api.js").Adapter} info
   * @param {string} label                what people call it
   * @param {HTMLTextAreaElement} prompt  takes its trigger words
   */
  constructor(info, label, prompt) {
    this.info = info;
    this.prompt = prompt;
    this.element = fromTemplate("adapter-template");
    this.slider = this.#find(".slider");
    this.number = this.#find(".scale");
    this.#find(".adapter-label").textContent = label;
    this.#find(".adapter-label").title = info.name;
    this.#find(".remove").setAttribute("aria-label", `Remove ${label}`);
    for (const text of this.element.querySelectorAll("label span")) {
      text.textContent = `Scale of ${label}`;
    }
    this.number.placeholder = info.default_scale;
    this.setScale(info.default_scale);
    this.slider.addEventListener("input", () => {
      this.number.value = this.slider.value;
    });
    this.number.addEventListener("input", () => this.#moveSlider());
    this.words = info.trigger_words.filter((word) => word.trim()).map((word) => this.#offer(word));
    this.#find(".words").hidden = this.words.length === 0;
  }

  /** @returns {import("./settings.js").ChosenScale} */
  settings() {
    return { name: this.info.name, scale: this.number.value };
  }

  setScale(scale) {
    this.number.value = scale;
    this.#moveSlider();
  }

  focus() {
    this.slider.focus();
  }

  onRemove(act) {
    this.#find(".remove").addEventListener("click", act);
  }

  /** Tell the trigger words that the prompt has from those that it lacks. */
  showWords() {
    for (const { button, word } of this.words) {
      const isThere = hasWords(this.prompt.value, word);
      // Not disabled: the focus would be lost.
      button.ariaDisabled = String(isThere);
      button.setAttribute("aria-label", `${isThere ? "In" : "Add to"} the prompt: ${word}`);
    }
  }

  #find(selector) {
    return this.element.querySelector(selector);
  }

  // A slider goes no further than its ends; the number may.
  #moveSlider() {
    this.slider.value = this.number.value || this.info.default_scale;
  }

  #offer(word) {
    const button = element("button", "word", word);
    button.type = "button";
    button.title = word;
    button.addEventListener("click", () => {
      if (button.ariaDisabled !== "true") this.#append(word);
    });
    this.#find(".words").append(button);
    return { button, word };
  }

  #append(word) {
    const { prompt } = this;
    const before = prompt.value.trimEnd();
    const between = before === "" ? "" : /[,.;:]$/.test(before) ? " " : ", ";
    prompt.value = before + between + word;
    // As if it were typed: the form checks it.
    prompt.dispatchEvent(new Event("input", { bubbles: true }));
  }
}

/** Whether all of `words` are in a text, in their order, and not as parts of others. */
function hasWords(text, words) {
  return spaced(text).includes(spaced(words));
}

function spaced(text) {
  return ` ${(text.toLowerCase().match(/[\p{L}\p{M}\p{N}]+/gu) ?? []).join(" ")} `;
}
