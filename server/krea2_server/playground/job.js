// One request in flight: its line with Stop, and its tiles.

import { generateImages } from "./api.js";
import { byId, fromTemplate } from "./dom.js";
import { requestJson } from "./settings.js";

const STREAM_FIELDS = [
  ["stream", "true"],
  ["partial_images", "3"],
];

export class Job {
  /**
   * @param {import("./settings.js").Settings} settings
   * @param {import("./tile.js").Tile[]} tiles one for each image
   */
  constructor(settings, tiles) {
    this.settings = settings;
    this.tiles = tiles;
    this.abort = new AbortController();
    this.line = fromTemplate("job-template");
    this.line.querySelector(".job-prompt").textContent = settings.prompt;
    const stop = this.line.querySelector(".stop");
    stop.setAttribute("aria-label", `Stop: ${settings.prompt}`);
    stop.addEventListener("click", () => this.abort.abort());
    this.#say("waiting");
    byId("jobs").append(this.line);
  }

  get unfinished() {
    return this.tiles.filter((tile) => !tile.picture);
  }

  get isStopped() {
    return this.abort.signal.aborted;
  }

  /** Bring its Stop in sight: in a low window the form is longer than what is seen of it. */
  reveal() {
    this.line.scrollIntoView({ block: "nearest" });
  }

  /**
   * Generate to the end.
   *
   * @param {string} model
   * @param {string} key of the API
   * @param {(tile: import("./tile.js").Tile) => void} onPicture
   * @throws ServerError; AbortError after Stop
   */
  async run(model, key, onPicture) {
    const body = requestJson(this.settings, model, STREAM_FIELDS);
    const messages = generateImages(body, this.settings.n, key, this.abort.signal);
    try {
      for await (const message of messages) this.#take(message, onPicture);
    } finally {
      this.#leave();
    }
  }

  #take(message, onPicture) {
    if (message.kind === "queued") {
      this.#queued(message.ahead);
      return;
    }
    const tile = this.tiles[message.image];
    if (!tile || tile.picture) return;
    if (message.kind === "completed") {
      tile.finish(message.answer);
      onPicture(tile);
    } else {
      tile.step(message.step, message.total);
      if (message.kind === "preview") tile.preview(message.b64, message.format);
    }
    const done = this.tiles.length - this.unfinished.length;
    const progress = tile.find(".progress-text")?.textContent;
    const together = `${done} of ${this.tiles.length} done`;
    this.#say(this.tiles.length > 1 ? together : (progress ?? "done"));
  }

  #queued(ahead) {
    const text = ahead > 0 ? `waiting, ${ahead} ahead` : "waiting, next";
    this.#say(text);
    for (const tile of this.unfinished) tile.waiting(text);
  }

  #say(text) {
    this.line.querySelector(".job-state").textContent = text;
  }

  #leave() {
    const hadFocus = this.line.contains(document.activeElement);
    this.line.remove();
    if (hadFocus) byId("generate").focus();
  }
}
