// Speaks to the server: models, and pictures as a stream of events.

const KEY = "nitro.key";

export const getKey = () => localStorage.getItem(KEY) ?? "";
export const setKey = (key) => localStorage.setItem(KEY, key);

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const headers = () => (getKey() ? { authorization: `Bearer ${getKey()}` } : {});

async function refused(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `the server answered ${response.status}`;
  const retry = response.headers.get("retry-after");
  return new ApiError(response.status, retry ? `${message} (in about ${retry} s)` : message);
}

export async function models() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await refused(response);
  return (await response.json()).data;
}

// Asks for pictures; `settings` are the API's parameters, `init` a picture to start from. Events go to
// `hear`; `signal` cancels: the server notices that nobody listens and stops.
export async function generate(settings, init, hear, signal) {
  const wanted = { ...settings, stream: true, progress: true };
  let request;
  if (init) {
    const body = new FormData();
    for (const [name, value] of Object.entries(wanted)) body.append(name, value);
    body.append("image", init, "image.png");
    request = { path: "v1/images/edits", body, headers: headers() };
  } else {
    request = {
      path: "v1/images/generations",
      body: JSON.stringify(wanted),
      headers: { ...headers(), "content-type": "application/json" },
    };
  }
  const response = await fetch(request.path, {
    method: "POST", body: request.body, headers: request.headers, signal,
  });
  if (!response.ok) throw await refused(response);
  for await (const event of events(response.body)) {
    if (event.error) throw new ApiError(0, event.error.message);
    hear(event);
  }
}

// Server-sent events of a body, as objects.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:"));
      if (data.length) yield JSON.parse(data.map((line) => line.slice(5)).join("\n"));
    }
  }
}

export function pictureBlob(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}
