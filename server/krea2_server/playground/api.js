// The server's API, as the page needs it.

import { readEvents } from "./event_stream.js";

// The page may lie below a proxy's prefix, and the API then lies there too.
export const BASE_URL = new URL("v1", document.baseURI).href;

/** What the server, or the way to it, has against a request. */
export class ServerError extends Error {
  /** @param {number} status of HTTP; 0 where there is none */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** @returns {Promise<"ready" | "loading" | "away" | "failing">} */
export async function readiness() {
  try {
    const response = await fetch(new URL("ready", document.baseURI), { cache: "no-store" });
    if (response.status !== 503) return "ready";
    const body = await response.json().catch(() => null);
    return body?.error?.code === "engine_unavailable" ? "loading" : "failing";
  } catch {
    return "away";
  }
}

/** The model's id, and its limits and defaults. */
export async function fetchModel(key) {
  const response = await send("models", { headers: headers(key) });
  const { data } = await response.json();
  return { id: data[0].id, ...data[0].krea2 };
}

/**
 * @typedef {object} Adapter  That requests may name.
 * @property {string} name
 * @property {string | null} title
 * @property {string[]} trigger_words
 * @property {number} default_scale
 */

/**
 * The adapters that can be used; a server that knows of none has none.
 *
 * @returns {Promise<Adapter[]>}
 */
export async function fetchAdapters(key) {
  try {
    const response = await send("loras", { headers: headers(key) });
    const { data } = await response.json();
    return data.filter((adapter) => !adapter.error);
  } catch (error) {
    if (error.status === 404) return [];
    throw error;
  }
}

/**
 * Generate, and tell how it goes.
 *
 * @yields {{kind: "queued", ahead: number}
 *   | {kind: "step", image: number, step: number, total: number}
 *   | {kind: "preview", image: number, step: number, total: number, b64: string, format: string}
 *   | {kind: "completed", image: number, answer: object}}
 * @throws {ServerError}; AbortError after the signal
 */
export async function* generateImages(body, n, key, signal) {
  const response = await send("images/generations", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body,
    signal,
  });
  let completed = 0;
  for await (const item of untilBroken(readEvents(response.body), signal)) {
    const message = item.comment === undefined ? ofEvent(item) : ofComment(item.comment);
    if (message?.kind === "completed") completed += 1;
    if (message) yield message;
  }
  if (completed < n) throw new ServerError(0, "The connection to the server was lost.");
}

// A broken connection ends the stream like any other end; what matters is what has come by then.
async function* untilBroken(events, signal) {
  try {
    yield* events;
  } catch (error) {
    if (signal.aborted) throw error;
  }
}

function ofComment(text) {
  const queued = /^queued ahead=(\d+)/.exec(text);
  if (queued) return { kind: "queued", ahead: Number(queued[1]) };
  const step = /^step image=(\d+) step=(\d+) total=(\d+)/.exec(text);
  if (!step) return null;
  const [image, done, total] = step.slice(1).map(Number);
  return { kind: "step", image, step: done, total };
}

function ofEvent({ event, data }) {
  switch (event) {
    case "image_generation.partial_image": {
      const { image_index: image, step, total_steps: total, ...rest } = JSON.parse(data);
      const { b64_json: b64, output_format: format } = rest;
      return { kind: "preview", image, step, total, b64, format };
    }
    case "image_generation.completed": {
      const answer = JSON.parse(data);
      return { kind: "completed", image: answer.image_index, answer };
    }
    case "error":
      throw new ServerError(0, JSON.parse(data).error.message);
    default:
      return null;
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(`${BASE_URL}/${path}`, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ServerError(0, "The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered with status ${response.status}.`;
  const wait = retryAfter(response.headers.get("Retry-After"));
  if (wait === null) return new ServerError(response.status, message);
  const sentence = /[.!?]$/.test(message) ? message : `${message}.`;
  return new ServerError(response.status, `${sentence} Try again in ${wait} s.`);
}

/** Seconds of a Retry-After header, which is a number of them or a date. */
function retryAfter(value) {
  if (!value) return null;
  const seconds = /^\d+$/.test(value) ? Number(value) : (Date.parse(value) - Date.now()) / 1e3;
  return Number.isFinite(seconds) ? Math.max(0, Math.ceil(seconds)) : null;
}
