// One chat completion as a stream of events.

/** An answer of the server that is not 200; `status` is its code. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Headers of every request: the API key, if one was given. */
export function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/**
 * Sends a body to /v1/chat/completions and yields the chunks as they come.
 * Aborting `signal` ends it; the server then ends the request.
 */
export async function* chatChunks(body, key, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw new ServerError(response.status, await errorText(response));
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(200, chunk.error.message);
    yield chunk;
  }
  throw new ServerError(200, "The connection ended before the answer did.");
}

/** The data of each server-sent event. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

async function errorText(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}.`;
  }
}
