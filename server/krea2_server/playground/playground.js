// The page: what its parts do together.

import { BASE_URL, fetchModel, readiness } from "./api.js";
import { byId } from "./dom.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { Job } from "./job.js";
import { asCurl, asPython, copyText } from "./snippets.js";
import { durationText, Tile } from "./tile.js";
import { Viewer } from "./viewer.js";

const POLL_MS = 2000;
const STATES = {
  loading: "the model is loading",
  failing: "the server is not ready",
  away: "the server cannot be reached",
};

const form = new Form();
const gallery = new Gallery();
const viewer = new Viewer(gallery, reuse);
let model = null;
let connecting = null;

/** Wait for the server and learn its model; once at a time, whoever asks. */
function connect() {
  connecting ??= reach().finally(() => {
    connecting = null;
  });
  return connecting;
}

async function reach() {
  for (let state; (state = await readiness()) !== "ready"; ) {
    showServer(state, STATES[state]);
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
  try {
    const isFirst = !model;
    model = await fetchModel(form.key.value);
    form.setModel(model);
    form.adapters.refresh();
    showServer("ready", model.id);
    // What led to this call, such as a lost connection, is still worth reading.
    if (isFirst) complain("");
  } catch (error) {
    const needsKey = error.status === 401;
    showServer("refusing", needsKey ? "an API key is needed" : "the model is not known");
    explain(error);
  }
}

function showServer(state, text) {
  byId("server").dataset.state = state;
  byId("server").textContent = text;
  byId("generate").setAttribute("aria-disabled", String(state in STATES));
}

async function generate() {
  if (byId("server").dataset.state in STATES) {
    complain(`Not yet: ${byId("server").textContent}.`);
    return;
  }
  if (!model) await connect();
  if (!model) return;
  const settings = form.settings();
  const actions = { open: (tile) => viewer.open(tile), reuse };
  const tiles = Array.from({ length: settings.n }, () => new Tile(settings, actions));
  const job = new Job(settings, tiles);
  const start = performance.now();
  gallery.add(tiles);
  complain("");
  say(`Generating ${images(settings.n)}.`);
  job.reveal();
  try {
    await job.run(model.id, form.key.value, () => {
      form.setLastSeed(firstSeed(tiles));
      gallery.trim();
      viewer.refresh();
    });
    say(`${capital(images(settings.n))} in ${durationText(performance.now() - start)}.`);
  } catch (error) {
    const done = tiles.length - job.unfinished.length;
    gallery.remove(job.unfinished);
    viewer.refresh();
    const kept = done > 0 ? ` ${done} of ${tiles.length} were finished.` : "";
    if (job.isStopped) say(`Stopped.${kept}`);
    else explain(error, kept);
  }
}

// Of the request: with it, all of its images come again.
function firstSeed(tiles) {
  const index = tiles.findIndex((tile) => tile.picture);
  return String(BigInt(tiles[index].picture.seed) - BigInt(index));
}

function reuse(picture) {
  form.fill(picture.settings, picture.seed);
  say("The picture's settings are in the form.");
}

function explain(error, kept = "") {
  say("");
  complain(error.message + kept);
  if (error.status === 401) form.askForKey();
  // The server may be starting anew.
  if (error.status === 0 || error.status === 503) connect();
}

function say(text) {
  byId("status").textContent = text;
}

function complain(text) {
  byId("alert").textContent = text;
  if (text) byId("alert").scrollIntoView({ block: "nearest" });
}

function images(n) {
  return n === 1 ? "one image" : `${n} images`;
}

function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}

async function copy(what, write) {
  if (!form.isValid()) return;
  const text = write(form.settings(), model?.id ?? "krea-2-turbo", BASE_URL, !!form.key.value);
  if (await copyText(text)) say(`Copied as ${what}.`);
}

form.element.addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
form.key.addEventListener("change", connect);
byId("copy-curl").addEventListener("click", () => copy("curl", asCurl));
byId("copy-python").addEventListener("click", () => copy("Python", asPython));
connect();
