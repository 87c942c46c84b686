// One picture large, with the gallery on the arrow keys.

import { byId } from "./dom.js";

export class Viewer {
  /**
   * @param {import("./gallery.js").Gallery} gallery
   * @param {(picture: import("./tile.js").Picture) => void} reuse
   */
  constructor(gallery, reuse) {
    this.gallery = gallery;
    this.dialog = byId("viewer");
    this.tile = null;
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") this.#turn(-1);
      if (event.key === "ArrowRight") this.#turn(1);
    });
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close();
    });
    this.dialog.addEventListener("close", () => this.tile.button.focus());
    byId("viewer-newer").addEventListener("click", () => this.#turn(-1));
    byId("viewer-older").addEventListener("click", () => this.#turn(1));
    byId("viewer-close").addEventListener("click", () => this.dialog.close());
    byId("viewer-reuse").addEventListener("click", () => {
      const { picture } = this.tile;
      this.dialog.close();
      // After the close event, which gives the focus back to the tile.
      setTimeout(() => reuse(picture));
    });
  }

  open(tile) {
    this.#show(tile);
    this.dialog.showModal();
    byId("viewer-close").focus();
  }

  /** Show the position again after the gallery has changed. */
  refresh() {
    if (this.dialog.open) this.#show(this.tile);
  }

  #turn(by) {
    const tiles = this.gallery.finished();
    const tile = tiles[tiles.indexOf(this.tile) + by];
    if (tile) this.#show(tile);
  }

  #show(tile) {
    this.tile = tile;
    const { picture } = tile;
    const tiles = this.gallery.finished();
    const index = tiles.indexOf(tile);
    const image = byId("viewer-image");
    if (image.src !== picture.url) image.src = picture.url;
    image.alt = picture.settings.prompt;
    byId("viewer-prompt").textContent = picture.settings.prompt;
    byId("viewer-position").textContent = `${index + 1} of ${tiles.length}`;
    byId("viewer-facts").textContent = picture.facts;
    // Not disabled: the focus would leave the dialog, and the arrow keys with it.
    byId("viewer-newer").ariaDisabled = String(index <= 0);
    byId("viewer-older").ariaDisabled = String(index === tiles.length - 1);
    Object.assign(byId("viewer-download"), { href: picture.url, download: picture.fileName });
  }
}
