// The form's settings as a command and as a program.

import { byId } from "./dom.js";
import { ownFields, requestJson, standardFields, toObject } from "./settings.js";

// Snippets are pasted into chats and tickets: they name the variable, never the key.
const KEY_VARIABLE = "KREA2_API_KEY";

/** A shell command that writes the images to files, or says what the server had against it. */
export function asCurl(settings, model, baseUrl, hasKey) {
  const lines = [`curl -sS ${quoted(`${baseUrl}/images/generations`)}`];
  if (hasKey) lines.push(`-H "Authorization: Bearer $${KEY_VARIABLE}"`);
  lines.push("-H 'Content-Type: application/json'");
  lines.push(`-d ${quoted(requestJson(settings, model))}`);
  const command = lines.join(" \\\n  ");
  const { n, outputFormat } = settings;
  const image = (index) => `.data[${index}].b64_json // error(.error.message)`;
  if (n === 1) {
    return `${command} \\\n  | jq -r '${image(0)}' | base64 -d > krea2.${outputFormat}\n`;
  }
  const indices = [...Array(n).keys()].join(" ");
  const save = `jq -r "${image("$i")}" krea2.json | base64 -d > "krea2-$i.${outputFormat}"`;
  return `${command} \\\n  -o krea2.json \\\n  && for i in ${indices}; do ${save}; done\n`;
}

/** A program for the official client. */
export function asPython(settings, model, baseUrl, hasKey) {
  const own = ownFields(settings);
  const fields = [...standardFields(settings, model)];
  if (own.length > 0) fields.push(["extra_body", toObject(own)]);
  const key = hasKey ? `os.environ["${KEY_VARIABLE}"]` : '"none"';
  return [
    "import base64",
    ...(hasKey ? ["import os"] : []),
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(baseUrl)}, api_key=${key})`,
    "response = client.images.generate(",
    ...fields.map(([name, value]) => `    ${name}=${value},`),
    ")",
    "for index, image in enumerate(response.data):",
    `    with open(f"krea2-{index}.${settings.outputFormat}", "wb") as file:`,
    "        file.write(base64.b64decode(image.b64_json))",
    "",
  ].join("\n");
}

// In single quotes a shell reads everything as it is, but for the quote itself.
function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** To the clipboard, or into a dialog where the browser forbids it (plain HTTP). */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = byId("copy-text");
    field.value = text;
    byId("copy").showModal();
    field.select();
    return false;
  }
}
