// Server-sent events out of a response's body; EventSource cannot send a POST.

/**
 * Events and comments in order. A line may end in LF, CRLF or CR, and a chunk anywhere at all.
 * An event that the stream breaks off in is dropped, as the standard has it.
 *
 * @param {ReadableStream<Uint8Array>} body
 * @yields {{comment: string} | {event: string, data: string}}
 */
export async function* readEvents(body) {
  let event = "";
  let data = [];
  for await (const line of readLines(body)) {
    if (line === "") {
      if (data.length > 0) yield { event: event || "message", data: data.join("\n") };
      event = "";
      data = [];
    } else if (line.startsWith(":")) {
      yield { comment: line.slice(1).trim() };
    } else {
      const [name, value] = splitField(line);
      if (name === "event") event = value;
      if (name === "data") data.push(value);
    }
  }
}

function splitField(line) {
  const colon = line.indexOf(":");
  if (colon < 0) return [line, ""];
  const start = line[colon + 1] === " " ? colon + 2 : colon + 1;
  return [line.slice(0, colon), line.slice(start)];
}

async function* readLines(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  // A picture is one line of megabytes in many chunks: each is searched once, never the whole line.
  let unfinished = "";
  let afterCarriageReturn = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      let text = decoder.decode(value, { stream: true });
      if (text === "") continue;
      if (afterCarriageReturn && text[0] === "\n") text = text.slice(1);
      afterCarriageReturn = text === "" ? false : text.endsWith("\r");
      const pieces = text.split(/\r\n|\n|\r/);
      pieces[0] = unfinished + pieces[0];
      unfinished = pieces.pop();
      yield* pieces;
    }
  } finally {
    // Where the consumer leaves early, the server is told to stop sending.
    await reader.cancel().catch(() => {});
  }
}
