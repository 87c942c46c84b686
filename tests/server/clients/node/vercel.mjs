// One generateImage of Vercel's ai. Its first argument is JSON: the `provider`'s package, `options` of
// the provider, the `model`, the `request`, and whether to `abort` it when stdin ends. Prints JSON: what
// came, or the error that was thrown.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateImage } from "ai";

const PROVIDERS = {
  "@ai-sdk/openai": createOpenAI,
  "@ai-sdk/openai-compatible": createOpenAICompatible,
};

globalThis.AI_SDK_LOG_WARNINGS = false;

const { provider, options, model, request, abort = false } = JSON.parse(process.argv[2]);

const controller = new AbortController();
if (abort) process.stdin.on("end", () => controller.abort()).resume();

async function generate() {
  const image = PROVIDERS[provider](options).imageModel(model);
  const abortSignal = controller.signal;
  const result = await generateImage({ maxRetries: 0, ...request, model: image, abortSignal });
  const { warnings, usage, providerMetadata } = result;
  const images = result.images.map(({ base64, mediaType }) => ({ base64, mediaType }));
  return { images, warnings, usage, providerMetadata };
}

function told(error) {
  const { name, message, statusCode, isRetryable, responseBody } = error;
  return { error: { name, message, statusCode, isRetryable, responseBody } };
}

console.log(JSON.stringify(await generate().catch(told)));
