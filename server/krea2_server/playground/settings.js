// What one request asks for, and how it is written down.

/**
 * @typedef {object} Settings  As the form has them; empty strings are left to the server.
 * @property {string} prompt
 * @property {string} size            WIDTHxHEIGHT in pixels
 * @property {number} n               images
 * @property {string} outputFormat    png, jpeg or webp
 * @property {string} seed            decimal; up to 63 bits, which a number cannot hold
 * @property {string} steps
 * @property {string} guidance
 * @property {string} negativePrompt  unused where guidance is 0
 * @property {ChosenScale[]} adapters
 */

/**
 * @typedef {object} ChosenScale  An adapter, and how strongly it works.
 * @property {string} name
 * @property {string} scale
 */

export const MAX_SEED = 2n ** 63n - 1n;

/** Fields of OpenAI's contract: names and values, written as JSON and Python both read them. */
export function standardFields(settings, model) {
  return [
    ["model", JSON.stringify(model)],
    ["prompt", JSON.stringify(settings.prompt)],
    ["n", String(settings.n)],
    ["size", JSON.stringify(settings.size)],
    ["output_format", JSON.stringify(settings.outputFormat)],
  ];
}

/** Our own fields, written likewise. */
export function ownFields(settings) {
  const fields = [];
  if (settings.seed) fields.push(["seed", String(BigInt(settings.seed))]);
  if (settings.steps) fields.push(["num_inference_steps", String(Number(settings.steps))]);
  if (settings.guidance) fields.push(["guidance_scale", String(Number(settings.guidance))]);
  // The server refuses one that can have no effect.
  if (settings.negativePrompt && Number(settings.guidance) > 0) {
    fields.push(["negative_prompt", JSON.stringify(settings.negativePrompt)]);
  }
  if (settings.adapters.length > 0) {
    fields.push(["lora", `[${settings.adapters.map(adapterField).join(", ")}]`]);
  }
  return fields;
}

function adapterField({ name, scale }) {
  const fields = [["name", JSON.stringify(name)]];
  if (scale) fields.push(["scale", String(Number(scale))]);
  return toObject(fields);
}

/** Body of a request. */
export function requestJson(settings, model, furtherFields = []) {
  return toObject([...standardFields(settings, model), ...ownFields(settings), ...furtherFields]);
}

/** `{"name": value, ...}` of written fields. */
export function toObject(fields) {
  return `{${fields.map(([name, value]) => `${JSON.stringify(name)}: ${value}`).join(", ")}}`;
}

/** Seed of an image. The server counts up from the one it was given. */
export function seedOf(settings, imageIndex, answered) {
  if (settings.seed) return String(BigInt(settings.seed) + BigInt(imageIndex));
  return String(answered);
}

/** Such as krea2-a-red-fox-1024x1024-seed7.png; safe on every file system. */
export function fileName(settings, seed) {
  const words = settings.prompt.toLowerCase().match(/[\p{L}\p{M}\p{N}]+/gu) ?? [];
  const slug = [...words.join("-")].slice(0, 40).join("").replace(/-$/, "");
  const extension = settings.outputFormat === "jpeg" ? "jpg" : settings.outputFormat;
  return `${["krea2", slug, settings.size, `seed${seed}`].filter(Boolean).join("-")}.${extension}`;
}

/** "1024 × 1024" of "1024x1024". */
export function sizeText(size) {
  return size.replace("x", " × ");
}
