// One images.generate of openai-node. Its first argument is JSON: `options` of the client, the
// `request`, after how many `events` of a stream to stop reading, and whether to `abort` the request
// when stdin ends. Prints JSON: the response or the events, or the error that was thrown; and the
// pauses, in milliseconds, that were made.
import OpenAI from "openai";

const { options, request, events = Infinity, abort = false } = JSON.parse(process.argv[2]);

const pauses = [];
const { setTimeout } = globalThis;
globalThis.setTimeout = (callback, pause, ...rest) => {
  pauses.push(pause);
  return setTimeout(callback, pause, ...rest);
};

const controller = new AbortController();
if (abort) process.stdin.on("end", () => controller.abort()).resume();

async function read(stream) {
  const found = [];
  for await (const event of stream) {
    found.push(event);
    if (found.length >= events) break;
  }
  return { events: found };
}

async function generate() {
  const client = new OpenAI({ maxRetries: 0, ...options });
  const answer = await client.images.generate(request, { signal: controller.signal });
  return request.stream ? read(answer) : { response: answer, id: answer._request_id };
}

function told(error) {
  const { message, status, code, param, type, requestID } = error;
  return { error: { name: error.constructor.name, message, status, code, param, type, requestID } };
}

console.log(JSON.stringify({ ...(await generate().catch(told)), pauses }));
