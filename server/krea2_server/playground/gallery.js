// The pictures of this visit, newest first.

import { byId } from "./dom.js";

const MAX_PICTURES = 100;

export class Gallery {
  constructor() {
    this.list = byId("gallery");
    /** @type {import("./tile.js").Tile[]} */
    this.tiles = [];
  }

  /** Put the tiles of a new request in front, in their order. */
  add(tiles) {
    this.tiles.unshift(...tiles);
    this.list.prepend(...tiles.map((tile) => tile.element));
    byId("empty").hidden = true;
  }

  /** Take away tiles that came to nothing. */
  remove(tiles) {
    for (const tile of tiles) tile.remove();
    this.tiles = this.tiles.filter((tile) => !tiles.includes(tile));
    byId("empty").hidden = this.tiles.length > 0;
  }

  /** Let the oldest pictures go where there are too many; what is being generated stays. */
  trim() {
    this.remove(this.finished().slice(MAX_PICTURES));
  }

  /** Tiles with a picture. */
  finished() {
    return this.tiles.filter((tile) => tile.picture);
  }
}
